// The bodies of the depthwise kernels; included once per instruction set, see elementwise_impl.h. VECTOR_BYTES is the
// width of its vectors.

#include "elementwise_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

constexpr int64_t kLanes = VECTOR_BYTES / 4;
typedef float Lanes __attribute__((vector_size(VECTOR_BYTES)));
typedef float UnalignedLanes __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

static inline Lanes lanes_at(const float* p) { return *reinterpret_cast<const UnalignedLanes*>(p); }
static inline Lanes lanes_at(const bf16* p) {
  return reinterpret_cast<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
static inline void put_lanes(Lanes value, float* p) { *reinterpret_cast<UnalignedLanes*>(p) = value; }
static inline void put_lanes(Lanes value, bf16* p) {  // as Store<bf16>
  const Words u = reinterpret_cast<Words>(value), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words bits = value != value ? Words{} + 0x7fc0u : rounded;
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(bits, Halves);
}

template <class T>
static void unpack(const T* from, int64_t pitch, int64_t pixels, int64_t channels, int64_t plane, float* planes) {
  const int64_t whole = channels / kLanes, rest = channels % kLanes;
  for (int64_t q = 0; q < pixels; ++q) {
    const T* pixel = from + q * pitch;
    for (int64_t i = 0; i < whole; ++i) put_lanes(lanes_at(pixel + i * kLanes), planes + i * plane + q * kLanes);
    if (rest == 0) continue;
    float* to = planes + whole * plane + q * kLanes;
    for (int64_t c = 0; c < kLanes; ++c) to[c] = c < rest ? load(pixel[whole * kLanes + c]) : 0.0f;
  }
}

template <class T>
static inline void store_lanes(Lanes sums, int64_t channels, T* out) {
  if (channels >= kLanes) return put_lanes(sums, out);
  T values[kLanes];
  put_lanes(sums, values);
  for (int64_t c = 0; c < channels; ++c) out[c] = values[c];
}

// `count` neighbouring outputs, whose sums stay in registers for all taps. stride: between outputs, in pixels, where it
// is known; else 0.
template <int count, int stride, class T>
static inline void outputs(const DepthwiseRow<T>& row, int64_t first) {
  const int64_t step = stride ? stride * kLanes : row.step;
  Lanes sums[count];
  const float* in = row.in + first * step;
  for (int i = 0; i < count; ++i) sums[i] = lanes_at(row.start);
  for (int64_t t = 0; t < row.taps; ++t) {
    const Lanes weight = lanes_at(row.weights + t * kLanes);
    const float* at = in + row.offsets[t];
    for (int i = 0; i < count; ++i) sums[i] += weight * lanes_at(at + i * step);
  }
  for (int i = 0; i < count; ++i) store_lanes(sums[i], row.channels, row.out + (first + i) * row.pitch);
}

template <int stride, class T>
static void convolve_strided(const DepthwiseRow<T>& row) {
  int64_t q = 0;
  for (; q + 8 <= row.count; q += 8) outputs<8, stride>(row, q);
  switch (row.count - q) {
#define CASE(n) \
  case n:       \
    return outputs<n, stride>(row, q);
    CASE(7) CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
#undef CASE
  }
}

template <class T>
static void convolve(const DepthwiseRow<T>& row) {
  if (row.step == kLanes) return convolve_strided<1>(row);
  if (row.step == 2 * kLanes) return convolve_strided<2>(row);
  convolve_strided<0>(row);
}

// Of `taps` taps, whose sums stay in registers for the whole band.
template <int taps>
static inline void add_some(const DepthwiseProducts& band, int64_t first) {
  Lanes sums[taps];
  const float* at[taps];
  for (int t = 0; t < taps; ++t) sums[t] = Lanes{};
  const float* dy = band.dy;
  for (int64_t r = 0; r < band.rows; ++r) {
    for (int t = 0; t < taps; ++t) at[t] = band.in + r * band.row_step + band.offsets[first + t];
    for (int64_t q = 0; q < band.count; ++q, dy += kLanes) {
      const Lanes gradient = lanes_at(dy);
      for (int t = 0; t < taps; ++t) sums[t] += gradient * lanes_at(at[t] + q * band.step);
    }
  }
  for (int t = 0; t < taps; ++t)
    for (int64_t c = 0; c < kLanes; ++c) band.sums[(first + t) * kLanes + c] += sums[t][c];
}

static void add_products(const DepthwiseProducts& band) {
  int64_t t = 0;
  for (; t + 9 <= band.taps; t += 9) add_some<9>(band, t);
  switch (band.taps - t) {
#define CASE(n) \
  case n:       \
    return add_some<n>(band, t);
    CASE(8) CASE(7) CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
#undef CASE
  }
}

template <class T>
static constexpr DepthwiseKernels<T> depthwise_table = {kLanes, unpack<T>, convolve<T>, add_products};

const DepthwiseKernels<float>& depthwise(float) { return depthwise_table<float>; }
const DepthwiseKernels<bf16>& depthwise(bf16) { return depthwise_table<bf16>; }

}  // namespace resnet_fused::cpu::KERNELS_ISA

#undef CHANNEL_LOOP
