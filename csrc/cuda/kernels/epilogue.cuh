// What happens to results before they are stored: norm or bias, residual, activation or mask, sums. Every phase that
// produces activations ends here, a pack of 8 channels of a pixel at a time; `Epilogue` (phase.h) has the formula.
#pragma once

#include "operand.cuh"
#include "reductions.cuh"
#include "tile.cuh"

namespace resnet_fused::cuda {

// Coefficients of a block of channels in shared memory, float [kConstants, columns].
enum Constant {
  kScale, kShift, kCenter,                          // of acc, factor and bias included
  kResidualScale, kResidualShift, kResidualCenter,  // residual_scale included
  kYScale, kYShift, kYCenter,                       // factor included where the mask reads them
  kSCenter,
  kDz, kDy, kD,                                     // of dx
  kConstants
};
constexpr int constant_bytes(int columns) { return kConstants * columns * 4; }

NOINLINE_DEVICE void write_constants(const Epilogue& e, float* constants, int first, int columns) {
  for (int column = thread_index(); column < columns; column += kThreads) {
    const int c = first + column;
    float* at = constants + column;
    const auto put = [&](Constant row, double v) { at[row * columns] = static_cast<float>(v); };
    if (c >= e.channels) {
      for (int row = 0; row < kConstants; ++row) at[row * columns] = 0.0f;
      continue;
    }
    const double factor = load(e.factor, c, 1.0), acc_factor = e.mask == Mask::by_norm ? 1.0 : factor;
    const Affine norm = affine(e.norm, c);
    put(kScale, acc_factor * norm.scale);
    put(kShift, acc_factor * norm.shift + load(e.bias, c, 0.0) + load(e.second_bias, c, 0.0));
    put(kCenter, norm.center);
    const double scale = load(e.residual_scale, c, 1.0);
    const Affine residual = affine(e.residual_norm, c);
    put(kResidualScale, scale * residual.scale);
    put(kResidualShift, scale * residual.shift);
    put(kResidualCenter, residual.center);
    const Affine y = affine(e.y_norm, c);
    put(kYScale, factor * y.scale);
    put(kYShift, factor * y.shift);
    put(kYCenter, y.center);
    put(kSCenter, affine(e.s_norm, c).center);
    if (e.dx != nullptr) {
      put(kDz, e.dx_table[c].x);
      put(kDy, e.dx_table[c].y);
      put(kD, e.dx_table[c].z);
    }
  }
  sync_threads();
}

// What the epilogue reads for one pack.
template <class T>
struct Fetched {
  Pack<T> other;  // the residual or what masks: never both
  Pack<T> y, s;
  uint32_t bits;
};

// index: of the pack's first value. pixel, channel: its place. count: channels of the pack that exist, 0 for none.
template <class T>
DEVICE void fetch(Fetched<T>& f, const Epilogue& e, int64_t index, int64_t pixel, int channel, int count) {
  if (count == 0) return;
  if (e.residual != nullptr) load_pack<T>(f.other, e.residual, index, count, e.wide);
  if (e.mask == Mask::by_out) load_pack<T>(f.other, e.mask_by, index, count, e.wide);
  if (e.mask == Mask::by_bits)
    f.bits = static_cast<const uint8_t*>(e.mask_by)[pixel * ceil_div(e.channels, kPack) + channel / kPack];
  if (e.y != nullptr) load_pack<T>(f.y, e.y, index, count, e.wide);
  if (e.s != nullptr) load_pack<T>(f.s, e.s, index, count, e.wide);
}

// Finishes one pack of results v. column: of its first channel within the block of `columns`.
template <class T>
DEVICE void finish(
    float (&v)[kPack], const Fetched<T>& f, const Epilogue& e, const float* constants, int columns, int column,
    int64_t index, int64_t pixel, int channel, int count, ThreadSums<T>& sums) {
  const float* at = constants + column;
  UNROLL for (int i = 0; i < kPack; ++i)
      v[i] = (v[i] - at[kCenter * columns + i]) * at[kScale * columns + i] + at[kShift * columns + i];
  if (e.residual != nullptr) {
    UNROLL for (int i = 0; i < kPack; ++i) {
      const float r = f.other.get(i) - at[kResidualCenter * columns + i];
      v[i] += r * at[kResidualScale * columns + i] + at[kResidualShift * columns + i];
    }
  }
  if (e.relu) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = relu(v[i]);
  }
  if (e.mask == Mask::by_out) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = f.other.get(i) <= 0.0f ? 0.0f : v[i];
  } else if (e.mask == Mask::by_bits) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = (f.bits >> i & 1u) != 0 ? v[i] : 0.0f;
  }
  float y[kPack] = {};
  if (e.y != nullptr) {
    UNROLL for (int i = 0; i < kPack; ++i) y[i] = f.y.get(i) - at[kYCenter * columns + i];
    if (e.mask == Mask::by_norm) {
      UNROLL for (int i = 0; i < kPack; ++i)
          v[i] = y[i] * at[kYScale * columns + i] + at[kYShift * columns + i] <= 0.0f ? 0.0f : v[i];
    }
  }
  if (e.out != nullptr) {
    Pack<T> out;
    out.set(v);
    store_pack<T>(e.out, index, count, e.wide, out);
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = out.get(i);  // what later phases read is what is counted
  }
  if (e.bits != nullptr) {
    uint32_t bits = 0;
    UNROLL for (int i = 0; i < kPack; ++i) bits |= (i < count && !(v[i] <= 0.0f) ? 1u : 0u) << i;
    e.bits[pixel * ceil_div(e.channels, kPack) + channel / kPack] = static_cast<uint8_t>(bits);
  }
  if (e.dx != nullptr) {
    float d[kPack];
    UNROLL for (int i = 0; i < kPack; ++i)
        d[i] = at[kDz * columns + i] * v[i] + (at[kDy * columns + i] * y[i] + at[kD * columns + i]);
    Pack<T> dx;
    dx.set(d);
    store_pack<T>(e.dx, index, count, e.wide, dx);
  }
  if (e.reduce == Reduce::statistics) {
    sums.add_statistics(v);
  } else if (e.reduce == Reduce::sums) {
    UNROLL for (int i = 0; i < kPack; ++i) {
      const sum_t<T> wide = v[i];
      sums.a[i] += wide;
      if (e.y != nullptr) sums.b[i] += wide * y[i];
      if (e.s != nullptr) sums.c[i] += wide * (f.s.get(i) - at[kSCenter * columns + i]);
    }
  }
}

// Finishes the tile of results that stands in shared memory (store_results), whose columns begin at channel `first`.
// pixel_of(row): the pixel of a row, -1 where it has none.
template <class S, class PixelOf>
DEVICE void finish_tile(
    const Epilogue& e, const float* constants, int first, const WorkerSums<typename S::Value>& worker,
    const PixelOf& pixel_of) {
  using T = typename S::Value;
  constexpr int packs = S::COLUMNS / kPack, step = kThreads / packs;
  constexpr int together = sizeof(T) == 2 ? 2 : 1;  // reads in flight; more would not fit the registers
  const int column = thread_index() % packs * kPack, channel = first + column;
  const int count = least(kPack, e.channels - channel);
  const auto* results = reinterpret_cast<const float*>(work_memory());
  ThreadSums<T> sums;
  sync_threads();  // the results are complete
  for (int row0 = thread_index() / packs; row0 < S::ROWS; row0 += step * together) {
    Fetched<T> fetched[together];
    int64_t pixel[together];
    UNROLL for (int u = 0; u < together; ++u) {
      pixel[u] = count > 0 ? pixel_of(row0 + u * step) : -1;
      if (pixel[u] >= 0) fetch(fetched[u], e, pixel[u] * e.channels + channel, pixel[u], channel, count);
    }
    UNROLL for (int u = 0; u < together; ++u) {
      if (pixel[u] < 0) continue;
      float v[kPack];
      const float* from = results + (row0 + u * step) * S::PITCH + column;
      UNROLL for (int i = 0; i < kPack; ++i) v[i] = from[i];
      finish(
          v, fetched[u], e, constants, S::COLUMNS, column, pixel[u] * e.channels + channel, pixel[u], channel, count,
          sums);
    }
  }
  sync_threads();  // the results' place is free
  if (e.reduce != Reduce::none) {
    put_thread_sums(worker, sums, e.reduce, S::COLUMNS);
    merge_threads(worker, e.reduce, S::COLUMNS);
  }
}

}  // namespace resnet_fused::cuda
