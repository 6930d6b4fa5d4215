#pragma once

// A tile of positions times a panel of 32 outputs, or a part of one, which stays in registers while a run of channels
// is multiplied. Included once per instruction set, by the products of a convolution and by those of its weight
// gradient.

#include "epilogue_impl.h"
#if VECTOR_BYTES == 32
#include "depth_loop_avx2.h"
#endif

namespace resnet_fused::cpu::KERNELS_ISA {

constexpr int kVectors = 2;                               // of a row of the tile
constexpr int kVectorRows = VECTOR_BYTES == 64 ? 14 : 6;  // with them the accumulators fill the registers
constexpr int kColumns = kVectors * Vector::lanes;        // of a tile

// Unrolled early: the accumulators would otherwise be kept in memory.
#define EACH_ROW _Pragma("GCC unroll 16") for (int r = 0; r < rows; ++r)

// One step multiplies a channel of float, or a pair of bfloat16, by a row of the panel as it is packed (pack.h).
template <class T>
constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;
// The channels of a chunk. Their products are summed in registers, then the sums are added: one long sum rounds more.
template <class T>
constexpr int64_t kChunk = 256 * kStep<T>;
constexpr int64_t kBytesOfStep = 128;  // of weights

// Neighbouring channels, multiplied by neighbouring rows of a panel.
template <class T>
struct Run {
  const T* input;  // of position 0
  int64_t pitch;
  const T* weights;
  int64_t channels;
};

// The rows of a tile that a step reads. With two pointers and three distances their addresses need few registers: an
// address that lies in the stack or a vector costs a product.
template <class T>
class RowsOfInput {
 public:
  RowsOfInput(const T* first, int64_t pitch)
      : low_(reinterpret_cast<const char*>(first)), pitch_(pitch * static_cast<int64_t>(sizeof(T))) {
    three_ = 3 * pitch_;
    five_ = 5 * pitch_;
    high_ = low_ + 7 * pitch_;
    asm("" : "+r"(three_), "+r"(five_));  // computed once
  }
  // What step `step` from here reads.
  inline const T* at(int row, int step) const {
    const int r = row % 7;
    const int64_t distance = r == 3 ? three_ : r == 5 ? five_ : r == 6 ? 2 * three_ : r * pitch_;
    return reinterpret_cast<const T*>((row < 7 ? low_ : high_) + distance) + step * kStep<T>;
  }
  inline void advance(int steps) {
    low_ += steps * kStep<T> * sizeof(T);
    high_ += steps * kStep<T> * sizeof(T);
    asm("" : "+r"(low_), "+r"(high_));  // or each row gets a pointer of its own
  }

 private:
  const char *low_, *high_;  // rows 0 and 7
  int64_t pitch_, three_, five_;
};

// Where the halves of a panel of pairs lie, which are 16 outputs each: those of 32 channels apart, as a tile wants them
// (pack.h), or those of each pair side by side (gradient_products.h).
enum class Halves { apart, together };

template <Halves>
static inline Vector::Type weights_of(const float* row, int column) {
  return Vector::load(row + column);
}
template <Halves halves>
static inline Vector::Type weights_of(const bf16* row, int column) {
  constexpr int half = halves == Halves::apart ? 512 : 32;
  return Vector::load_pairs(row + column / 16 * half + column % 16 * 2);
}
// Multiplies both vectors of weights by what x begins with.
static inline void multiply_row(int, const bf16* x, const Vector::Type* weights, Vector::Type* sum) {
  const auto pair = Vector::broadcast_pair(x);
  for (int v = 0; v < kVectors; ++v) sum[v] = Vector::multiply_pairs(sum[v], pair, weights[v]);
}
static inline void multiply_row(int row, const float* x, const Vector::Type* weights, Vector::Type* sum) {
#if VECTOR_BYTES == 64
  // Loaded by the products: an instruction less, but a load more, for which a third of the rows leaves room.
  if (row % 3 == 0) {
    for (int v = 0; v < kVectors; ++v) sum[v] = Vector::multiply_add(x, weights[v], sum[v]);
    return;
  }
#endif
  const auto value = Vector::broadcast(x);
  for (int v = 0; v < kVectors; ++v) sum[v] = Vector::multiply_add(value, weights[v], sum[v]);
}

// A tile that is not finished here: its sums are added to, or another struct finishes them.
struct Unfinished {};
// Whether a tile, which is a whole panel wide then, is finished where its sums are.
template <class Finish>
constexpr bool kFinishesTile = false;
template <class Out, bool adds>
constexpr bool kFinishesTile<InRegisters<Out, adds, false>> = kColumns == kPanel;

// Where the sums of a tile go.
struct Tile {
  int column;   // of the panel
  bool adds;    // to `sums` what they hold
  float* sums;  // [rows][32]
};
// The same, and what finishes them.
template <class Out>
struct FinishedTile : Tile {
  const Epilogue<Out>& epilogue;
  int64_t channel;        // of the panel
  const int32_t* target;  // of each row
};

// The products of `rows` positions with some columns of a panel become sums or, finished, results.
// next: what to fetch meanwhile, `stride` bytes at each step.
template <class T, class Finish, int rows, Halves halves>
static void multiply_tile(
    const Run<T>* run, const Run<T>* end, int64_t first, const Tile& tile, const char* next, int64_t stride) {
  constexpr bool grouped = sizeof(T) == 2 && halves == Halves::apart;
  constexpr int64_t row = sizeof(T) == 2 && !grouped ? 64 : 32;  // elements of a step
  Vector::Type sum[rows][kVectors];
  EACH_ROW for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::zero();
  for (; run != end; ++run) {
    const T *input = run->input + first * run->pitch, *w = run->weights;
    int64_t left = run->channels;
#if VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4 && rows >= 4) {
      const DepthLoop loop{run->pitch * 4, left / 4, next, stride * 4};
      w += tile.column;
      if (loop.count > 0) multiply_depth<rows>(input, w, sum, loop);
      w -= tile.column;
      next += loop.count * loop.stride;
      left %= 4;
    }
#endif
    RowsOfInput<T> x(input, run->pitch);
    const int column = kColumns == kPanel ? 0 : tile.column;  // addresses need every register that there is
    constexpr int at_once = sizeof(T) == 4 && VECTOR_BYTES == 64 ? 2 : 1;
    const bool two_lines = at_once * stride > 64, four_lines = at_once * stride > 128;  // few tiles pass the weights
    const auto take = [&](int steps) __attribute__((always_inline)) {
      __builtin_prefetch(next, 0, 2);
      if (two_lines) __builtin_prefetch(next + 64, 0, 2);
      if (four_lines) {
        __builtin_prefetch(next + 128, 0, 2);
        __builtin_prefetch(next + 192, 0, 2);
      }
      _Pragma("GCC unroll 2") for (int s = 0; s < steps; ++s, w += row) {
        Vector::Type b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = weights_of<halves>(w, column + v * Vector::lanes);
        EACH_ROW multiply_row(r, x.at(r, s), b, sum[r]);
      }
      next += steps * stride;
      x.advance(steps);
    };
    const int64_t group = grouped ? 32 : left, gap = grouped ? 512 : 0;
    for (; left > 0; left -= group, w += gap) {
      const int64_t count = group / kStep<T>;
      for (const T* beyond = w + count / at_once * at_once * row; w != beyond;) take(at_once);
      if (count % at_once != 0) take(1);
    }
  }
  float* sums = tile.sums + tile.column;
  if (tile.adds) {
    EACH_ROW for (int v = 0; v < kVectors; ++v) sum[r][v] =
        Vector::add(Vector::load(sums + r * kPanel + v * Vector::lanes), sum[r][v]);
  }
  if constexpr (kFinishesTile<Finish>) {
    const auto& finished = static_cast<const FinishedTile<typename Finish::Element>&>(tile);
    const typename Finish::Panel panel(finished.epilogue, finished.channel);
    EACH_ROW panel.row(sum[r], finished.target[r]);
  } else {
    EACH_ROW for (int v = 0; v < kVectors; ++v) Vector::store(sums + r * kPanel + v * Vector::lanes, sum[r][v]);
  }
}

template <class T>
using MultiplyTile = void (*)(const Run<T>*, const Run<T>*, int64_t, const Tile&, const char*, int64_t);

// Calls the function for the given number of rows.
template <class T, class Finish, Halves halves = Halves::apart>
constexpr MultiplyTile<T> kMultiplyTile[] = {
    nullptr,
    multiply_tile<T, Finish, 1, halves>,
    multiply_tile<T, Finish, 2, halves>,
    multiply_tile<T, Finish, 3, halves>,
    multiply_tile<T, Finish, 4, halves>,
    multiply_tile<T, Finish, 5, halves>,
    multiply_tile<T, Finish, 6, halves>,
#if VECTOR_BYTES == 64
    multiply_tile<T, Finish, 7, halves>,
    multiply_tile<T, Finish, 8, halves>,
    multiply_tile<T, Finish, 9, halves>,
    multiply_tile<T, Finish, 10, halves>,
    multiply_tile<T, Finish, 11, halves>,
    multiply_tile<T, Finish, 12, halves>,
    multiply_tile<T, Finish, 13, halves>,
    multiply_tile<T, Finish, 14, halves>
#endif
};

}  // namespace resnet_fused::cpu::KERNELS_ISA
