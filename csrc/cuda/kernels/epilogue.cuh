// What happens to results before they are stored: norm or bias, residual, activation or mask, sums. Every phase that
// produces activations ends here, a pack of 8 channels of a pixel at a time; `Epilogue` (phase.h) has the formula.
#pragma once

#include "activations.cuh"
#include "operand.cuh"
#include "reductions.cuh"
#include "tile.cuh"

namespace resnet_fused::cuda {

// Coefficients of a block of channels in shared memory, float [kConstants, columns].
enum Constant {
  kScale,
  kShift,
  kCenter,  // of acc, factor and bias included
  kResidualScale,
  kResidualShift,
  kResidualCenter,  // residual_scale included
  kYScale,
  kYShift,
  kYCenter,  // factor included where the mask reads them
  kSCenter,
  kDz,
  kDy,
  kD,       // of dx: k_dz, k_y, k
  kSlope,   // of the activation
  kFactor,  // of what it gives, where it comes first
  kNear,    // of statistics, see WorkerSums
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
    const double factor = load(e.factor, c, 1.0);
    const bool elsewhere = e.act_first || e.mask == Mask::by_norm || e.mask == Mask::by_sum;
    const double acc_factor = elsewhere ? 1.0 : factor;
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
    put(kSlope, load(e.slopes, c, e.act.parameter));
    put(kFactor, factor);
    if (e.dx != nullptr) {
      put(kDz, e.dx_table[kRowScale * e.channels + c]);
      put(kDy, e.dx_table[kRowYScale * e.channels + c]);
      put(kD, e.dx_table[kRowShift * e.channels + c]);
    }
  }
  sync_threads();
}

// What the epilogue reads for one pack.
template <class T>
struct Fetched {
  Pack<T> other;  // the residual or what masks: never both
  Pack<T> y, s;
  uint32_t bits = 0;

  // What is not read is set to zero: the compiler would carry undefined values from one pack to the next.
  DEVICE Fetched() {
    other.clear();
    y.clear();
    s.clear();
  }
};

// index: of the pack's first value. pixel, channel: its place. count: channels of the pack that exist. WIDE: all do,
// and everything is aligned.
template <class T, bool WIDE, bool JOIN>
DEVICE void fetch(Fetched<T>& f, const Epilogue& e, int64_t index, int64_t pixel, int channel, int count) {
  if (e.residual != nullptr) load_pack<T>(f.other, e.residual, index, count, WIDE);
  if (e.mask == Mask::by_out) load_pack<T>(f.other, e.mask_by, index, count, WIDE);
  if (e.mask == Mask::by_bits)
    f.bits = static_cast<const uint8_t*>(e.mask_by)[pixel * ceil_div(e.channels, kPack) + channel / kPack];
  if (e.y != nullptr) load_pack<T>(f.y, e.y, index, count, WIDE);
  if (JOIN && e.s != nullptr) load_pack<T>(f.s, e.s, index, count, WIDE);
}

// A row of the constants, for the pack whose first is `at`.
DEVICE void constant_row(float (&to)[kPack], const float* at, int columns, Constant row) {
  UNROLL for (int i = 0; i < kPack / 4; ++i) {
    const Bits128 bits = reinterpret_cast<const Bits128*>(at + row * columns)[i];
    UNROLL for (int w = 0; w < 4; ++w) to[4 * i + w] = float_of(bits.word[w]);
  }
}

// v := act(v) for any activation; with a mask v := v act'(z), and the third sum, which needs both v and z.
//
// Values take turns in the first register, so that each function is called in one place: around a call the compiler has
// to save what the passes keep in registers.
template <class T, bool JOIN, class Sums>
DEVICE void activate_pack(
    float (&v)[kPack], const Fetched<T>& f, const Epilogue& e, const float* at, int columns, Sums& sums) {
  const auto row = [&](Constant row, int i) { return at[row * columns + i]; };
  float z[kPack];
  UNROLL for (int i = 0; i < kPack; ++i) {
    z[i] = e.mask == Mask::none ? v[i] : f.other.get(i);
    if (e.mask == Mask::by_norm || e.mask == Mask::by_sum)
      z[i] = (f.y.get(i) - row(kYCenter, i)) * row(kYScale, i) + row(kYShift, i);
    if (JOIN && e.mask == Mask::by_sum)
      z[i] += (f.s.get(i) - row(kResidualCenter, i)) * row(kResidualScale, i) + row(kResidualShift, i);
  }
  float thirds[JOIN ? kPack : 1] = {};
  ROLLED for (int i = 0; i < kPack; ++i) {
    const float slope = row(kSlope, i), now = v[0], here = z[0];
    float result = 0.0f, third = 0.0f;
    if (e.mask == Mask::none || (JOIN && e.third == Third::activation))
      third = result = activate(e.act.kind, here, slope);
    if (JOIN && e.third == Third::slope) third = here > 0.0f ? 0.0f : here;
    if (e.mask != Mask::none) result = gradient_through(e.act.kind, now, here, slope);
    UNROLL for (int k = 0; k + 1 < kPack; ++k) {
      v[k] = v[k + 1];
      z[k] = z[k + 1];
      if (JOIN) thirds[JOIN ? k : 0] = thirds[JOIN ? k + 1 : 0];
    }
    v[kPack - 1] = result;
    if (JOIN) thirds[JOIN ? kPack - 1 : 0] = now * third;
  }
  if (JOIN && e.third != Third::skip) {
    UNROLL for (int i = 0; i < kPack; ++i) sums.third[JOIN ? i : 0] += thirds[JOIN ? i : 0];
  }
}

// Finishes one pack of results v. at: of its first channel among the constants of `columns`.
// ANY: whether the activation may be another than relu.
template <class T, bool WIDE, bool JOIN, bool ANY, class Sums>
DEVICE void finish(
    float (&v)[kPack], const Fetched<T>& f, const Epilogue& e, const float* at, int columns, int64_t index,
    int64_t pixel, int channel, int count, Sums& sums) {
  float scale[kPack], shift[kPack], center[kPack];
  const auto rows = [&](Constant first) {
    constant_row(scale, at, columns, first);
    constant_row(shift, at, columns, static_cast<Constant>(first + 1));
    constant_row(center, at, columns, static_cast<Constant>(first + 2));
  };
  rows(kScale);
  UNROLL for (int i = 0; i < kPack; ++i) v[i] = (v[i] - center[i]) * scale[i] + shift[i];
  const auto add_residual = [&] {
    rows(kResidualScale);
    UNROLL for (int i = 0; i < kPack; ++i) v[i] += (f.other.get(i) - center[i]) * scale[i] + shift[i];
  };
  if (e.residual != nullptr && !e.act_first) add_residual();
  if (e.mask == Mask::by_bits) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = (f.bits >> i & 1u) != 0 ? v[i] : 0.0f;
  } else if (!is_simple(e.act) || e.mask == Mask::by_sum) {
    if constexpr (ANY) activate_pack<T, JOIN>(v, f, e, at, columns, sums);
  } else if (e.act.kind == ActivationKind::identity) {
    // nothing
  } else if (e.mask == Mask::none) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = relu(v[i]);
  } else if (e.mask == Mask::by_out) {
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = f.other.get(i) <= 0.0f ? 0.0f : v[i];
  } else if (e.mask == Mask::by_norm) {
    rows(kYScale);
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = (f.y.get(i) - center[i]) * scale[i] + shift[i] <= 0.0f ? 0.0f : v[i];
  }
  if (e.act_first) {
    constant_row(scale, at, columns, kFactor);
    UNROLL for (int i = 0; i < kPack; ++i) v[i] *= scale[i];
    if (e.residual != nullptr) add_residual();
  }
  if (e.out != nullptr) {
    Pack<T> out;
    out.set(v);
    store_pack<T>(e.out, index, count, WIDE, out);
    UNROLL for (int i = 0; i < kPack; ++i) v[i] = out.get(i);  // what later phases read is what is counted
  }
  if (e.bits != nullptr) {
    uint32_t bits = 0;
    UNROLL for (int i = 0; i < kPack; ++i) bits |= (i < count && !(v[i] <= 0.0f) ? 1u : 0u) << i;
    e.bits[pixel * ceil_div(e.channels, kPack) + channel / kPack] = static_cast<uint8_t>(bits);
  }
  if (e.dx != nullptr) {
    float d[kPack];
    constant_row(scale, at, columns, kDz);
    constant_row(shift, at, columns, kD);
    UNROLL for (int i = 0; i < kPack; ++i) d[i] = v[i] * scale[i] + shift[i];
    if (e.y != nullptr) {
      constant_row(scale, at, columns, kDy);
      constant_row(center, at, columns, kYCenter);
      UNROLL for (int i = 0; i < kPack; ++i) d[i] += (f.y.get(i) - center[i]) * scale[i];
    }
    Pack<T> dx;
    dx.set(d);
    store_pack<T>(e.dx, index, count, WIDE, dx);
  }
  if (e.reduce == Reduce::statistics) {
    constant_row(center, at, columns, kNear);
    ++sums.rows;
    UNROLL for (int i = 0; i < kPack; ++i) {
      const sum_t<T> d = v[i] - center[i];
      sums.first[i] += d;
      sums.second[i] += d * d;
    }
  } else if (e.reduce == Reduce::sums) {
    UNROLL for (int i = 0; i < kPack; ++i) sums.first[i] += v[i];
    if (e.y != nullptr) {
      constant_row(center, at, columns, kYCenter);
      UNROLL for (int i = 0; i < kPack; ++i) sums.second[i] += static_cast<sum_t<T>>(v[i]) * (f.y.get(i) - center[i]);
    }
    if (JOIN && e.s != nullptr && e.third == Third::skip) {
      constant_row(center, at, columns, kSCenter);
      UNROLL for (int i = 0; i < kPack; ++i) sums.third[JOIN ? i : 0] +=
          static_cast<sum_t<T>>(v[i]) * (f.s.get(i) - center[i]);
    }
  }
}

// Finishes the tile of results in shared memory (store_results), float32 [ROWS, PITCH], whose columns begin at channel
// `first`; writes [pixels, channels]. pixel_of(row): the pixel of a row, -1 where it has none.
template <class S, class PixelOf>
DEVICE void finish_tile(
    const Epilogue& e, float* constants, int first, const WorkerSums<typename S::Value>& worker,
    const PixelOf& pixel_of) {
  using T = typename S::Value;
  constexpr int packs = S::COLUMNS / kPack;
  const int column = thread_index() % packs * kPack, channel = first + column;
  const auto* results = reinterpret_cast<const float*>(work_memory());
  ThreadSums<T, false> sums;
  sync_threads();  // the results are complete
  if (e.reduce == Reduce::statistics && worker.running[0] == 0.0) {
    if (thread_index() < S::COLUMNS)
      worker.near[thread_index()] = results[thread_index()] + constants[kShift * S::COLUMNS + thread_index()];
    sync_threads();
  }
  ROLLED for (int row = thread_index() / packs; row < S::ROWS && channel < e.channels; row += kThreads / packs) {
    const int64_t pixel = pixel_of(row), index = pixel * e.channels + channel;
    if (pixel < 0) continue;
    Fetched<T> fetched;
    fetch<T, true, false>(fetched, e, index, pixel, channel, kPack);
    float v[kPack];
    constant_row(v, results + row * S::PITCH + column, 0, kScale);
    finish<T, true, false, true>(v, fetched, e, constants + column, S::COLUMNS, index, pixel, channel, kPack, sums);
  }
  sync_threads();  // the results' place is free
  if (e.reduce != Reduce::none) {
    put_thread_sums(worker, sums, e.reduce, S::COLUMNS);
    merge_threads(worker, e.reduce, S::COLUMNS);
  }
}

}  // namespace resnet_fused::cuda
