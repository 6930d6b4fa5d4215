// Prologues: a chunk of an operand on its way from memory to a product, as stored or computed.
#pragma once

#include "packs.cuh"

namespace resnet_fused::cuda {

DEVICE bool computed(const Operand& operand) { return operand.source != Source::raw || operand.relu; }

// Rows of coefficients for COUNT channels, in registers.
template <int COUNT>
DEVICE void load_row(float (&to)[COUNT], const Operand& operand, TableRow row, int channel, int count = COUNT) {
  const float* const from = operand.table + row * operand.channels + channel;
  if (count == COUNT && operand.wide) {
    UNROLL for (int i = 0; i < COUNT / 4; ++i) {
      const Bits128 bits = load_128(from + 4 * i);
      UNROLL for (int w = 0; w < 4; ++w) to[4 * i + w] = float_of(bits.word[w]);
    }
  } else {
    UNROLL for (int i = 0; i < COUNT; ++i) to[i] = i < count ? from[i] : 0.0f;
  }
}

// norm(x) for COUNT channels. 16-bit values take the constant with the center folded in.
template <class T, int COUNT>
struct Normalize {
  static constexpr bool NARROW = sizeof(T) == 2;
  float scale[COUNT], shift[COUNT], center[NARROW ? 1 : COUNT];

  DEVICE Normalize(const Operand& operand, int channel, int count = COUNT) {
    load_row(scale, operand, kRowScale, channel, count);
    load_row(shift, operand, NARROW ? kRowFolded : kRowShift, channel, count);
    if constexpr (!NARROW) load_row(center, operand, kRowCenter, channel, count);
  }
  DEVICE float operator()(int i, float x) const {
    if constexpr (NARROW)
      return x * scale[i] + shift[i];
    else
      return (x - center[i]) * scale[i] + shift[i];
  }
};

// dy = k_dz dz + (k_y (y - center) + k).
template <class T, int COUNT>
struct Gradient {
  static constexpr bool NARROW = sizeof(T) == 2;
  float k_dz[COUNT], k[COUNT], k_y[COUNT], center[NARROW ? 1 : COUNT];

  DEVICE Gradient(const Operand& operand, int channel, int count = COUNT) {
    load_row(k_dz, operand, kRowScale, channel, count);
    load_row(k, operand, NARROW ? kRowFolded : kRowShift, channel, count);
    load_row(k_y, operand, kRowYScale, channel, count);
    if constexpr (!NARROW) load_row(center, operand, kRowCenter, channel, count);
  }
  DEVICE float operator()(int i, float dz, float y) const {
    if constexpr (NARROW)
      return k_dz[i] * dz + (k_y[i] * y + k[i]);
    else
      return k_dz[i] * dz + (k_y[i] * (y - center[i]) + k[i]);
  }
};

// Computes chunks of a buffer in place, once they have arrived: for each i < EACH the chunk at(i) where inside(i). y
// stands `apart` bytes from x. All chunks are of the same channels.
template <class T, int EACH, class At, class Inside>
DEVICE void compute_chunks(const Operand& operand, int channel, int apart, const At& at, const Inside& inside) {
  constexpr int count = kChunk<T>;
  const auto each = [&](const auto& compute) {
    UNROLL for (int i = 0; i < EACH; ++i) {
      if (!inside(i)) continue;
      T* const shared = reinterpret_cast<T*>(at(i));
      Chunk<T> x;
      x.load_shared(shared);
      float v[count];
      compute(v, x, reinterpret_cast<const T*>(at(i) + apart));
      if (operand.relu) {
        UNROLL for (int e = 0; e < count; ++e) v[e] = relu(v[e]);
      }
      x.set(v);
      x.store_shared(shared);
    }
  };
  if (operand.source == Source::normalize) {
    const Normalize<T, count> normalize(operand, channel);
    each([&](float (&v)[count], const Chunk<T>& x, const T*) {
      UNROLL for (int e = 0; e < count; ++e) v[e] = normalize(e, x.get(e));
    });
  } else if (operand.source == Source::gradient) {
    const Gradient<T, count> gradient(operand, channel);
    each([&](float (&v)[count], const Chunk<T>& x, const T* with) {
      Chunk<T> y;
      y.clear();
      if (operand.y != nullptr) y.load_shared(with);
      UNROLL for (int e = 0; e < count; ++e) v[e] = gradient(e, x.get(e), y.get(e));
    });
  } else {
    each([&](float (&v)[count], const Chunk<T>& x, const T*) {
      UNROLL for (int e = 0; e < count; ++e) v[e] = x.get(e);
    });
  }
}

}  // namespace resnet_fused::cuda
