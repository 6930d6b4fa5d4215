// Products by vector instructions: a tile of positions times a panel, or a part of one, stays in registers for the
// whole depth. Included once per instruction set.

#include "epilogue_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Factor;
using engine::Task;

constexpr int kVectors = 2;                               // of a row of the tile
constexpr int kVectorRows = VECTOR_BYTES == 64 ? 14 : 6;  // with them the accumulators fill the registers
constexpr int kColumns = kVectors * Vector::lanes;        // of a tile

// Unrolled early: the accumulators would otherwise be kept in memory.
#define EACH_ROW _Pragma("GCC unroll 16") for (int r = 0; r < rows; ++r)

// The packed layout of bfloat16 (pack.h): pairs of channels, for 32 channels and 16 outputs at a time.
static inline const bf16* packed(const bf16* panel, int64_t depth, int column) {
  return panel + depth * kPanel + column / 16 * 512 + column % 16 * 2;
}

// Float products of this many channels are summed in registers, then the sums are added: one long sum rounds more.
constexpr int64_t kSummedAtOnce = 256;

// sums[row][column + 0 ..] := the products of `rows` positions with some columns of a panel
template <int rows>
static void multiply_tile(const Task<float>& task, int64_t first, int64_t panel, int column, float* sums) {
  Vector::Type sum[rows][kVectors];
  const auto begin = [&] { EACH_ROW for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::zero(); };
  bool adds = false;
  const auto put = [&] {
    EACH_ROW for (int v = 0; v < kVectors; ++v) {
      float* at = sums + r * kPanel + column + v * Vector::lanes;
      Vector::store(at, adds ? Vector::add(Vector::load(at), sum[r][v]) : sum[r][v]);
    }
    adds = true;
  };
  begin();
  int64_t left = kSummedAtOnce;
  for (const Factor<float>& f : task.factors) {
    const float* w = f.weights + panel * f.tap_count * f.depth * kPanel + column;
    const float* base = f.input + first * f.pitch + (f.first_channel ? f.first_channel[panel] : 0);
    for (int64_t tap = 0; tap < f.tap_count; ++tap) {
      const float* a = base + f.taps[tap];
      for (int64_t from = 0; from < f.depth;) {
        const int64_t to = f.depth - from < left ? f.depth : from + left;
        left -= to - from;
        for (int64_t k = from; k < to; ++k, w += kPanel) {
          Vector::Type b[kVectors];
          for (int v = 0; v < kVectors; ++v) b[v] = Vector::load(w + v * Vector::lanes);
          EACH_ROW {
            const auto value = Vector::broadcast(a + r * f.pitch + k);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::multiply_add(value, b[v], sum[r][v]);
          }
        }
        from = to;
        if (left == 0) {
          put();
          begin();
          left = kSummedAtOnce;
        }
      }
    }
  }
  put();
}

template <int rows>
static void multiply_tile(const Task<bf16>& task, int64_t first, int64_t panel, int column, float* sums) {
  Vector::Type sum[rows][kVectors];
  EACH_ROW for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::zero();
  for (const Factor<bf16>& f : task.factors) {
    const bf16* w = f.weights + panel * f.tap_count * f.depth * kPanel;
    const bf16* base = f.input + first * f.pitch + (f.first_channel ? f.first_channel[panel] : 0);
    for (int64_t tap = 0; tap < f.tap_count; ++tap, w += f.depth * kPanel) {
      const bf16* a = base + f.taps[tap];
      for (int64_t k = 0; k < f.depth; k += 2) {
        Vector::Type b[kVectors];
        const int64_t step = k & ~int64_t{31}, pair = (k & 31) / 2;
        for (int v = 0; v < kVectors; ++v)
          b[v] = Vector::load_pairs(packed(w, step, column + v * Vector::lanes) + pair * 32);
        EACH_ROW {
          const auto value = Vector::broadcast_pair(a + r * f.pitch + k);
          for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::multiply_pairs(sum[r][v], value, b[v]);
        }
      }
    }
  }
  EACH_ROW for (int v = 0; v < kVectors; ++v) Vector::store(sums + r * kPanel + column + v * Vector::lanes, sum[r][v]);
}

template <class T>
using MultiplyTile = void (*)(const Task<T>&, int64_t, int64_t, int, float*);

// Calls the function for the given number of rows.
template <class T>
constexpr MultiplyTile<T> kMultiplyTile[] = {
    nullptr,           multiply_tile<1>,  multiply_tile<2>, multiply_tile<3>,  multiply_tile<4>,
    multiply_tile<5>,  multiply_tile<6>,
#if VECTOR_BYTES == 64
    multiply_tile<7>,  multiply_tile<8>,  multiply_tile<9>, multiply_tile<10>, multiply_tile<11>,
    multiply_tile<12>, multiply_tile<13>, multiply_tile<14>
#endif
};

template <class T>
static void multiply(const Task<T>& task) {
  const Epilogue<T>& e = task.epilogue;
  with_finish(e, [&](auto finish) {
    const auto tile = [&](const engine::Rows& rows, int64_t panel) {
      alignas(64) float sums[kVectorRows * kPanel];
      const int64_t count = rows.end - rows.begin, first = rows.first + rows.begin;
      for (int column = 0; column < kPanel; column += kColumns)
        kMultiplyTile<T>[count](task, first, panel, column, sums);
      finish_rows<decltype(finish)>(sums, e, panel * kPanel, e.target + first, 0, static_cast<int>(count));
    };
    const engine::Rows* end = task.rows + task.row_count;
    if (task.panels_inner) {
      for (const auto* rows = task.rows; rows != end; ++rows)
        for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) tile(*rows, panel);
    } else {
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
        for (const auto* rows = task.rows; rows != end; ++rows) tile(*rows, panel);
    }
  });
}

template <class T>
static constexpr engine::Products<T> kVectorProducts{kVectorRows, false, &multiply<T>};

}  // namespace resnet_fused::cpu::KERNELS_ISA
