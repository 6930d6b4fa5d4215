// Tiles of operands in shared memory and their product in registers, by a worker of 8 warps.
//
// A buffer holds one step of both operands, 128 bytes deep: A [ROWS, depth] or [depth, ROWS], then B [COLUMNS, depth]
// or [depth, COLUMNS]. For a computed A the values that it is computed with follow, laid out as A. Rows of shared
// memory are made of 16-byte chunks; chunk c of row r stands at c ^ (r % 8), so that eight rows of one column meet no
// bank twice.
#pragma once

#include "packs.cuh"

namespace resnet_fused::cuda {

template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));  // of a step
constexpr int kSubsteps = 4;                               // products of a step, 32 bytes deep

template <class T, int ROWS_, int COLUMNS_, int WARPS_DOWN>
struct Tile {
  using Value = T;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS_ACROSS = 8 / WARPS_DOWN;
  static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
  static constexpr int M = WARP_ROWS / 16, N = WARP_COLUMNS / 8;  // products of a warp
  static constexpr int A_BYTES = ROWS * 128, B_BYTES = COLUMNS * 128;
  static constexpr int STEP_BYTES = A_BYTES + B_BYTES;  // and A_BYTES more for a computed A
  static constexpr int PITCH = COLUMNS + 8;             // of a row of results in shared memory: banks differ
  static constexpr int RESULT_BYTES = ROWS * PITCH * 4;
};

template <class T>
using Small = Tile<T, 64, 64, 2>;
// Twice the columns would double a thread's accumulators: too many for two workers per SM, which hide each other's
// waits.
template <class T>
using Large = Tile<T, 128, 64, 4>;

// Byte offset of a chunk where a row has `chunks` of them.
DEVICE int chunk_offset(int row, int chunk, int chunks) { return (row * chunks + (chunk ^ (row & 7))) * 16; }

template <class S>
struct Accumulators {
  float value[S::M][S::N][4];

  DEVICE void clear() {
    UNROLL for (int m = 0; m < S::M; ++m) UNROLL for (int n = 0; n < S::N; ++n) UNROLL for (int i = 0; i < 4; ++i)
        value[m][n][i] = 0.0f;
  }
};

// This thread's place: its warp's first row and column of the tile, and its lane.
template <class S>
struct Place {
  int row, column, lane;
  DEVICE Place() {
    const int warp = thread_index() / 32;
    row = warp / S::WARPS_ACROSS * S::WARP_ROWS;
    column = warp % S::WARPS_ACROSS * S::WARP_COLUMNS;
    lane = thread_index() % 32;
  }
};

// A in a buffer: [ROWS, depth], or [depth, ROWS] where DEPTH_FIRST.
template <class S, bool DEPTH_FIRST>
struct BufferedA {
  const char* base;

  // The fragment of the warp's m-th 16 rows at substep `k`.
  DEVICE void fragment16(uint32_t (&a)[4], const Place<S>& place, int m, int k) const {
    const int i = place.lane / 8, j = place.lane % 8, row = place.row + m * 16;
    if constexpr (DEPTH_FIRST)
      ldmatrix_transposed(a, base + chunk_offset(k * 16 + j + i / 2 * 8, row / 8 + i % 2, S::ROWS / 8));
    else
      ldmatrix(a, base + chunk_offset(row + j + i % 2 * 8, k * 2 + i / 2, 8));
  }
  // Row lane / 4 of the m-th 16, or the eighth after it.
  DEVICE float value(const Place<S>& place, int m, int half, int depth) const {
    const int row = place.row + m * 16 + half * 8 + place.lane / 4, chunks = DEPTH_FIRST ? S::ROWS / 4 : 8;
    const int r = DEPTH_FIRST ? depth : row, c = DEPTH_FIRST ? row : depth;
    return *reinterpret_cast<const float*>(base + chunk_offset(r, c / 4, chunks) + c % 4 * 4);
  }
};

// B in a buffer: [COLUMNS, depth], or [depth, COLUMNS] where DEPTH_FIRST.
template <class S, bool DEPTH_FIRST>
struct BufferedB {
  const char* base;

  // The fragments of 16 columns from `column` at substep `k`: two of b0, b1.
  DEVICE void fragments16(uint32_t (&b)[4], int column, int k, int lane) const {
    const int i = lane / 8, j = lane % 8;
    if constexpr (DEPTH_FIRST)
      ldmatrix_transposed(b, base + chunk_offset(k * 16 + j + i % 2 * 8, column / 8 + i / 2, S::COLUMNS / 8));
    else
      ldmatrix(b, base + chunk_offset(column + j + i / 2 * 8, k * 2 + i % 2, 8));
  }
  DEVICE float value(int column, int depth) const {
    const int chunks = DEPTH_FIRST ? S::COLUMNS / 4 : 8;
    const int r = DEPTH_FIRST ? depth : column, c = DEPTH_FIRST ? column : depth;
    return *reinterpret_cast<const float*>(base + chunk_offset(r, c / 4, chunks) + c % 4 * 4);
  }
};

// v as the sum of two tf32.
DEVICE void split(float v, uint32_t& high, uint32_t& low) {
  high = to_tf32(v);
  low = v == float_of(high) ? 0u : to_tf32(v - float_of(high));  // also of an infinite v
}

// acc += A B at substep `k` of a buffer.
template <class S, class A, class B>
DEVICE void multiply_substep(Accumulators<S>& acc, const A& a, const B& b, const Place<S>& place, int k, bool tf32) {
  using T = typename S::Value;
  if constexpr (sizeof(T) == 2) {
    uint32_t fa[S::M][4], fb[S::N / 2][4];
    UNROLL for (int m = 0; m < S::M; ++m) a.fragment16(fa[m], place, m, k);
    UNROLL for (int n = 0; n < S::N / 2; ++n) b.fragments16(fb[n], place.column + n * 16, k, place.lane);
    UNROLL for (int m = 0; m < S::M; ++m) UNROLL for (int n = 0; n < S::N; ++n)
        mma(acc.value[m][n], fa[m], fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1], T{});
  } else {
    // float32 as tf32, or as the sum of two tf32 (three products; what the fourth would add is below float32's
    // rounding)
    const int g = place.lane / 4, t = place.lane % 4;
    uint32_t b_high[S::N][2], b_low[S::N][2];
    UNROLL for (int n = 0; n < S::N; ++n) UNROLL for (int i = 0; i < 2; ++i)
        split(b.value(place.column + n * 8 + g, k * 8 + t + i * 4), b_high[n][i], b_low[n][i]);
    UNROLL for (int m = 0; m < S::M; ++m) {
      uint32_t high[4], low[4];
      UNROLL for (int i = 0; i < 4; ++i) split(a.value(place, m, i % 2, k * 8 + t + i / 2 * 4), high[i], low[i]);
      UNROLL for (int n = 0; n < S::N; ++n) {
        if (!tf32) {
          mma_tf32(acc.value[m][n], low, b_high[n][0], b_high[n][1]);
          mma_tf32(acc.value[m][n], high, b_low[n][0], b_low[n][1]);
        }
        mma_tf32(acc.value[m][n], high, b_high[n][0], b_high[n][1]);
      }
    }
  }
}

// acc += A B over the first `substeps` of a buffer.
template <class S, class A, class B>
DEVICE void multiply_step(Accumulators<S>& acc, const A& a, const B& b, int substeps, bool tf32) {
  const Place<S> place;
  if (sizeof(typename S::Value) == 2 && substeps == kSubsteps) {
    UNROLL for (int k = 0; k < kSubsteps; ++k) multiply_substep(acc, a, b, place, k, tf32);
  } else {
    ROLLED for (int k = 0; k < substeps; ++k) multiply_substep(acc, a, b, place, k, tf32);
  }
}

// The steps of a product through the buffers of shared memory: copies run `buffers - 1` steps ahead of the
// multiplication.
//
// Loader: load(buffer) issues the copies of its next step, finish(buffer) computes what this thread copied,
// substeps() is the depth of the step that is multiplied next; a(buffer) and b(buffer) are the operands.
template <class S, class Loader>
DEVICE void multiply(Accumulators<S>& acc, Loader& loader, int steps, int buffers, int buffer_bytes, bool tf32) {
  char* const memory = work_memory();
  for (int s = 0; s < buffers - 1; ++s) {
    if (s < steps) loader.load(memory + s * buffer_bytes);
    cp_async_commit();
  }
  int reading = 0, writing = buffers - 1;
  for (int step = 0; step < steps; ++step) {
    if (buffers == 2)
      cp_async_wait<0>();
    else if (buffers == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<2>();
    char* const buffer = memory + reading * buffer_bytes;
    loader.finish(buffer);
    sync_threads();  // the buffer is whole, and nobody reads any more from the one that is loaded next
    if (step + buffers - 1 < steps) loader.load(memory + writing * buffer_bytes);
    cp_async_commit();
    multiply_step(acc, loader.a(buffer), loader.b(buffer), loader.substeps(), tf32);
    if (++reading == buffers) reading = 0;
    if (++writing == buffers) writing = 0;
  }
  cp_async_wait<0>();
  sync_threads();  // the buffers are free
}

// Leaves the tile of results in shared memory, float32 [ROWS, PITCH].
template <class S>
DEVICE void store_results(const Accumulators<S>& acc) {
  const Place<S> place;
  auto* const results = reinterpret_cast<float*>(work_memory());
  const int g = place.lane / 4, t = place.lane % 4;
  UNROLL for (int m = 0; m < S::M; ++m) UNROLL for (int n = 0; n < S::N; ++n) UNROLL for (int i = 0; i < 4; ++i)
      results[(place.row + m * 16 + g + i / 2 * 8) * S::PITCH + place.column + n * 8 + t * 2 + i % 2] =
          acc.value[m][n][i];
}

}  // namespace resnet_fused::cuda
