// Values in groups: chunks of 16 bytes, which the products load, and packs of 8 values, which the passes walk.
#pragma once

#include <math.h>

#include "phase.h"
#include "ptx.cuh"

namespace resnet_fused::cuda {

// The current phase lies at the start of shared memory. Read from there, its fields take a register only while they are
// used. The phase's working memory follows.
constexpr int kPhaseBytes = (sizeof(Phase) + 127) / 128 * 128;
DEVICE Phase& current_phase() { return *reinterpret_cast<Phase*>(shared_memory()); }
DEVICE char* work_memory() { return shared_memory() + kPhaseBytes; }

DEVICE int divide(int n, const Divisor& d) {
  return static_cast<int>(multiply_wide(static_cast<uint32_t>(n), d.multiplier) >> d.shift);
}
DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

DEVICE float to_float(float v) { return v; }
template <class T>
DEVICE T from_float(float v);
template <>
DEVICE float from_float<float>(float v) {
  return v;
}
template <>
DEVICE bf16 from_float<bf16>(float v) {
  return to_bf16(v);
}
template <>
DEVICE f16 from_float<f16>(float v) {
  return to_f16(v);
}

// The type of sums over many rows. Of float32, double as PyTorch keeps them, where the chip has doubles at half rate.
template <class T>
struct Summation {
  using type = float;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
template <>
struct Summation<float> {
  using type = double;
};
#endif
template <class T>
using sum_t = typename Summation<T>::type;

constexpr int kPack = 8;

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // values of 16 bytes

// Values side by side in 32-bit words, which stay in registers where an array of 16-bit values would not.
template <class T, int COUNT>
struct alignas(16) Values {
  static constexpr int WORDS = COUNT * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[WORDS];

  DEVICE void clear() { UNROLL for (int i = 0; i < WORDS; ++i) word[i] = 0; }
  DEVICE float get(int i) const {
    if constexpr (sizeof(T) == 4)
      return float_of(word[i]);
    else
      return to_float(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
  }
  DEVICE void set(const float (&v)[COUNT]) {
    UNROLL for (int i = 0; i < WORDS; ++i) {
      if constexpr (sizeof(T) == 4)
        word[i] = bits_of(v[i]);
      else
        word[i] = pair_of(v[2 * i], v[2 * i + 1], T{});
    }
  }
  // All values, from or to addresses aligned to 16 bytes: of shared memory, and of global.
  DEVICE void load_shared(const T* from) {
    UNROLL for (int i = 0; i < WORDS / 4; ++i) take(i, reinterpret_cast<const Bits128*>(from)[i]);
  }
  DEVICE void store_shared(T* to) const {
    UNROLL for (int i = 0; i < WORDS / 4; ++i) reinterpret_cast<Bits128*>(to)[i] = four(i);
  }
  DEVICE void load_global(const T* from) {
    UNROLL for (int i = 0; i < WORDS / 4; ++i) take(i, load_128(from + i * (16 / static_cast<int>(sizeof(T)))));
  }
  DEVICE void store_global(T* to) const {
    UNROLL for (int i = 0; i < WORDS / 4; ++i) store_128(to + i * (16 / static_cast<int>(sizeof(T))), four(i));
  }
  // The first `count` values, one by one, and zeros beyond them; and the reverse. The loop is not unrolled: it is rare,
  // and shifting the words needs no index.
  DEVICE void load_first(const T* from, int count) {
    clear();
    ROLLED for (int i = 0; i < COUNT; ++i) {
      uint32_t last = 0;
      if (i < count) last = bits(from[i]);
      if constexpr (sizeof(T) == 4) {
        UNROLL for (int w = 0; w + 1 < WORDS; ++w) word[w] = word[w + 1];
        word[WORDS - 1] = last;
      } else {
        UNROLL for (int w = 0; w + 1 < WORDS; ++w) word[w] = word[w] >> 16 | word[w + 1] << 16;
        word[WORDS - 1] = word[WORDS - 1] >> 16 | last << 16;
      }
    }
  }
  DEVICE void store_first(T* to, int count) const {
    Values rest = *this;
    ROLLED for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 4) {
        to[i] = float_of(rest.word[0]);
        UNROLL for (int w = 0; w + 1 < WORDS; ++w) rest.word[w] = rest.word[w + 1];
      } else {
        to[i] = T{static_cast<uint16_t>(rest.word[0])};
        UNROLL for (int w = 0; w + 1 < WORDS; ++w) rest.word[w] = rest.word[w] >> 16 | rest.word[w + 1] << 16;
        rest.word[WORDS - 1] >>= 16;
      }
    }
  }

 private:
  DEVICE void take(int i, const Bits128& bits) { UNROLL for (int w = 0; w < 4; ++w) word[4 * i + w] = bits.word[w]; }
  DEVICE Bits128 four(int i) const { return {{word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]}}; }
  DEVICE static uint32_t bits(float v) { return bits_of(v); }
  template <class N>
  DEVICE static uint32_t bits(N v) {
    return v.bits;
  }
};
template <class T>
using Pack = Values<T, kPack>;
template <class T>
using Chunk = Values<T, kChunk<T>>;

// `count` values from element `index`, all of a pack at once where rows are wide; zero beyond.
template <class T>
DEVICE void load_pack(Pack<T>& pack, const void* base, int64_t index, int count, bool wide) {
  const T* from = static_cast<const T*>(base) + index;
  if (wide)
    pack.load_global(from);
  else
    pack.load_first(from, count);
}
template <class T>
DEVICE void store_pack(void* base, int64_t index, int count, bool wide, const Pack<T>& pack) {
  T* to = static_cast<T*>(base) + index;
  if (wide)
    pack.store_global(to);
  else
    pack.store_first(to, count);
}

// --- vectors ---------------------------------------------------------------------------------------------------------

NOINLINE_DEVICE double load(const Vector& v, int channel, double absent) {
  if (v.data == nullptr) return absent;
  const int64_t i = static_cast<int64_t>(channel) * v.stride;
  switch (v.type) {
    case Scalar::f32:
      return static_cast<const float*>(v.data)[i];
    case Scalar::bf16:
      return to_float(static_cast<const bf16*>(v.data)[i]);
    case Scalar::f16:
      return to_float(static_cast<const f16*>(v.data)[i]);
    default:
      return static_cast<const double*>(v.data)[i];
  }
}
NOINLINE_DEVICE void store(const OutVector& v, int channel, double value) {
  if (v.data == nullptr) return;
  switch (v.type) {
    case Scalar::f32:
      static_cast<float*>(v.data)[channel] = static_cast<float>(value);
      break;
    case Scalar::bf16:
      static_cast<bf16*>(v.data)[channel] = to_bf16(static_cast<float>(value));
      break;
    case Scalar::f16:
      static_cast<f16*>(v.data)[channel] = to_f16(static_cast<float>(value));
      break;
    default:
      static_cast<double*>(v.data)[channel] = value;
  }
}

// The norm's own coefficients: (y - center) scale + shift. Vectors are few: computed in double, rounded once.
struct Affine {
  double scale, shift, center, inverse_std;
};
NOINLINE_DEVICE Affine affine(const Norm& norm, int channel) {
  if (norm.mean.data == nullptr) return {1.0, 0.0, 0.0, 1.0};
  const double inverse_std = 1.0 / sqrt(load(norm.var, channel, 1.0) + norm.eps);
  return {
      load(norm.gamma, channel, 1.0) * inverse_std, load(norm.beta, channel, 0.0), load(norm.mean, channel, 0.0),
      inverse_std};
}

}  // namespace resnet_fused::cuda
