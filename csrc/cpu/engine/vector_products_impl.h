// Products by vector instructions: a tile of positions times a panel, or a part of one, stays in registers while a
// chunk of the depth is multiplied. Included once per instruction set.
//
// All tiles of a block pass before the next chunk, so that the chunk's weights come from the first cache, and the next
// chunk's arrive in the second meanwhile.

#include "epilogue_impl.h"
#if VECTOR_BYTES == 32
#include "depth_loop_avx2.h"
#endif

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Factor;
using engine::Task;

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

constexpr int64_t kBlockTiles = 16;         // at most, so that their sums stay in the first cache
constexpr int64_t kBlockBytes = 768 << 10;  // of their input, which stays in the second

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

static inline Vector::Type weights_of(const float* row, int column) { return Vector::load(row + column); }
static inline Vector::Type weights_of(const bf16* row, int column) {
  return Vector::load_pairs(row + column / 16 * 512 + column % 16 * 2);
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
// next: weights to fetch meanwhile, `stride` bytes at each step.
template <class T, class Finish, int rows>
static void multiply_tile(
    const Run<T>* run, const Run<T>* end, int64_t first, const Tile& tile, const char* next, int64_t stride) {
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
    const auto take = [&](int steps) __attribute__((always_inline)) {
      __builtin_prefetch(next, 0, 2);
      _Pragma("GCC unroll 2") for (int s = 0; s < steps; ++s, w += 32) {
        Vector::Type b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = weights_of(w, column + v * Vector::lanes);
        EACH_ROW multiply_row(r, x.at(r, s), b, sum[r]);
      }
      next += steps * stride;
      x.advance(steps);
    };
    // bfloat16: the halves of a panel lie apart, in groups of 32 channels
    const int64_t group = sizeof(T) == 2 ? 32 : left, gap = sizeof(T) == 2 ? 512 : 0;
    constexpr int steps = sizeof(T) == 4 && VECTOR_BYTES == 64 ? 2 : 1;
    for (; left > 0; left -= group, w += gap) {
      const int64_t count = group / kStep<T>;
      for (const T* beyond = w + count / steps * steps * 32; w != beyond;) take(steps);
      if (count % steps != 0) take(1);
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
template <class T, class Finish>
constexpr MultiplyTile<T> kMultiplyTile[] = {
    nullptr,
    multiply_tile<T, Finish, 1>,
    multiply_tile<T, Finish, 2>,
    multiply_tile<T, Finish, 3>,
    multiply_tile<T, Finish, 4>,
    multiply_tile<T, Finish, 5>,
    multiply_tile<T, Finish, 6>,
#if VECTOR_BYTES == 64
    multiply_tile<T, Finish, 7>,
    multiply_tile<T, Finish, 8>,
    multiply_tile<T, Finish, 9>,
    multiply_tile<T, Finish, 10>,
    multiply_tile<T, Finish, 11>,
    multiply_tile<T, Finish, 12>,
    multiply_tile<T, Finish, 13>,
    multiply_tile<T, Finish, 14>
#endif
};

// The depth of a panel's products, chunk by chunk.
template <class T>
class Chunks {
 public:
  Chunks(const Factor<T>* two, int64_t panel) : factors_(two), panel_(panel) { skip_ends(); }

  bool more() const { return factor_ < 2; }
  void take() {
    count_ = steps_ = 0;
    for (int64_t left = kChunk<T>; left > 0 && more(); skip_ends()) {
      const Factor<T>& f = factors_[factor_];
      const int64_t rest = f.depth - channel_, channels = rest < left ? rest : left;
      runs_[count_++] = {
          f.input + (f.first_channel ? f.first_channel[panel_] : 0) + f.taps[tap_] + channel_, f.pitch,
          f.weights + ((panel_ * f.tap_count + tap_) * f.depth + channel_) * kPanel, channels};
      left -= channels;
      channel_ += channels;
      steps_ += channels / kStep<T>;
    }
  }
  int64_t steps() const { return steps_; }
  const Run<T>* begin() const { return runs_; }
  const Run<T>* end() const { return runs_ + count_; }

 private:
  // Turns the end of a tap or factor into the beginning of the next.
  void skip_ends() {
    if (more() && channel_ == factors_[factor_].depth) {
      ++tap_;
      channel_ = 0;
    }
    for (; more() && tap_ == factors_[factor_].tap_count; ++factor_) tap_ = 0;
  }

  const Factor<T>* factors_;
  int64_t panel_, tap_ = 0, channel_ = 0;
  int factor_ = 0;
  Run<T> runs_[kChunk<T> / engine::kDepthStep<T>];
  int64_t count_ = 0, steps_ = 0;
};

// How many tiles pass each chunk of weights.
template <class T, class Out>
static int64_t tiles_at_once(const Task<T, Out>& task) {
  int64_t depth = 0;
  for (const Factor<T>& f : task.factors) depth += f.tap_count * f.depth;
  if (depth < kChunk<T> && task.panels_inner) return 1;  // weights wait in the second cache, the tile in the first
  const int64_t bytes = kVectorRows * task.factors[0].pitch * static_cast<int64_t>(sizeof(T));
  const int64_t most = kBlockBytes / bytes, held = most < 1 ? 1 : most > kBlockTiles ? kBlockTiles : most;
  const int64_t blocks = (task.row_count + held - 1) / held;
  return (task.row_count + blocks - 1) / blocks;
}

template <class T, class Out>
static void multiply(const Task<T, Out>& task) {
  const Epilogue<Out>& e = task.epilogue;
  with_finish(e, [&](auto finish) {
    using Finish = decltype(finish);
    alignas(64) float sums[kBlockTiles][kVectorRows * kPanel];
    const int64_t at_once = tiles_at_once(task);
    const engine::Rows* end = task.rows + task.row_count;
    for (const engine::Rows* block = task.rows; block < end; block += at_once) {
      const int64_t rest = end - block, count = rest < at_once ? rest : at_once;
      constexpr int64_t passes = kPanel / kColumns;  // of a tile
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        const int64_t channel = panel * kPanel;
        // The first panel meanwhile fetches the next block's input, or the next band's, where few channels of it lie in
        // memory; the others the weights that come next.
        const Factor<T>& f = task.factors[0];
        const bool fetches_input =
            task.prefetches && f.depth <= kChunk<T> && panel == task.panel_begin && task.row_count > at_once;
        const char* next =
            reinterpret_cast<const char*>(f.input + (block[count - 1].first + block[count - 1].end) * f.pitch);
        int64_t stride = kVectorRows * kStep<T> * static_cast<int64_t>(sizeof(T)) / passes;
        bool adds = false;
        for (Chunks<T> chunks(task.factors, panel); chunks.more(); adds = true) {
          chunks.take();
          if (!fetches_input) {
            next = reinterpret_cast<const char*>(chunks.begin()->weights) + chunks.steps() * kBytesOfStep;
            stride = (kBytesOfStep + count * passes - 1) / (count * passes);
          }
          const MultiplyTile<T>* multiply_tile = kMultiplyTile<T, Unfinished>;
          bool finishes = !chunks.more();
          if constexpr (kFinishesTile<Finish>)
            if (finishes && channel + kPanel <= e.channels) {
              multiply_tile = kMultiplyTile<T, Finish>;
              finishes = false;
            }
          for (int64_t i = 0; i < count; ++i) {
            const int height = block[i].end - block[i].begin, first = block[i].first + block[i].begin;
            FinishedTile<Out> tile{{0, adds, sums[i]}, e, channel, e.target + first};
            for (; tile.column < kPanel; tile.column += kColumns, next += stride * chunks.steps())
              multiply_tile[height](chunks.begin(), chunks.end(), first, tile, next, stride);
            if (finishes) finish_rows<Finish>(sums[i], e, channel, tile.target, 0, height);
          }
        }
      }
    }
  });
}

template <class T, class Out = T>
static constexpr engine::Products<T, Out> kVectorProducts{kVectorRows, false, &multiply<T, Out>};

}  // namespace resnet_fused::cpu::KERNELS_ISA
