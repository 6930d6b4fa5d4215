// Element types, activations and their arithmetic, for every file of kernels: included once per file, after the target
// pragma, so that each instruction set has functions of its own in namespace KERNELS_ISA. Loops over channels are
// written for the compiler's vectoriser: no branch, no aliasing, no call. No standard header may be included from here:
// its inline functions would be compiled for the instruction set.

#define CHANNEL_LOOP _Pragma("GCC ivdep") for (int64_t c = 0; c < channels; ++c)

namespace resnet_fused::cpu::KERNELS_ISA {

static inline float load(float v) { return v; }
static inline double load(double v) { return v; }
static inline float load(bf16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16); }

// A half's exponent and mantissa in the place of a float's are the value times 2^-112, subnormals included. One exact
// product corrects that; an all-ones exponent has to be restored.
static inline float load(f16 v) {
  const uint32_t rest = v.bits & 0x7fffu;
  const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest << 13) * 0x1p112f);
  const uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0u;
  return __builtin_bit_cast(float, finite | special | (static_cast<uint32_t>(v.bits & 0x8000u) << 16));
}

template <class T>
struct Store;
template <>
struct Store<float> {
  static inline float from(float v) { return v; }
};
template <>
struct Store<double> {
  static inline double from(double v) { return v; }
};

template <>
struct Store<bf16> {  // round to nearest, ties to even
  static inline bf16 from(float v) {
    const uint32_t u = __builtin_bit_cast(uint32_t, v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
  }
};

// Round to nearest, ties to even: adding 2^13 times the value's power of two (at least 2^-14, where halves become
// subnormal) leaves ten bits of mantissa, rounded by the addition itself.
template <>
struct Store<f16> {
  static inline f16 from(float v) {
    const uint32_t u = __builtin_bit_cast(uint32_t, v), rest = u & 0x7fffffffu;
    const uint32_t power = rest & 0x7f800000u, least = power > 0x38800000u ? power : 0x38800000u;
    const uint32_t in_range = least < 0x47800000u ? least : 0x47800000u;
    const float magic = __builtin_bit_cast(float, in_range + (13u << 23));
    const uint32_t sum =
        __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, rest) + magic) - __builtin_bit_cast(uint32_t, magic);
    // `sum` counts steps of 2^-10 times the power; fewer than the power's own 2^10 steps are subnormals
    const uint32_t steps = sum + (((in_range - 0x38800000u) >> 23) << 10);
    const uint32_t finite = steps < 0x7c00u ? steps : 0x7c00u;
    const uint32_t overflow = rest >= 0x477ff000u ? 0x7c00u : finite;
    const uint32_t bits = rest > 0x7f800000u ? 0x7e00u : overflow;
    return {static_cast<uint16_t>(bits | ((u >> 16) & 0x8000u))};
  }
};

// --- activations -----------------------------------------------------------------------------------------------------

static inline double exponential(double x) { return __builtin_exp(x); }
static inline double error_function(double x) { return __builtin_erf(x); }

// e^x = 2^n e^r with |r| <= ln(2) / 2. e^r is a Taylor series; 2^n is two factors, so that both ends of the range are
// reached.
static inline float exponential(float x) {
  const float low = x < -104.0f ? -104.0f : x, within = low > 89.0f ? 89.0f : low;
  constexpr float magic = 12582912.0f;  // adding it rounds to an integer, held in the last bits
  const float shifted = within * 1.44269504f + magic, n = shifted - magic;
  const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t whole = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, magic);
  const int32_t half = whole >> 1, rest = whole - half;
  const float result =
      p * __builtin_bit_cast(float, (half + 127) << 23) * __builtin_bit_cast(float, (rest + 127) << 23);
  return x != x ? x : result;
}

// Below 1 an odd polynomial, above 1 - e^-q(|x|); both fitted in double at Chebyshev's points to 2e-8.
static inline float error_function(float x) {
  const float size = x < 0 ? -x : x, square = size * size, capped = size > 4.0f ? 4.0f : size;
  float p = 7.882497117e-05f;
  p = p * square + -8.018854994e-04f;
  p = p * square + 5.189311943e-03f;
  p = p * square + -2.685432880e-02f;
  p = p * square + 1.128359746e-01f;
  p = p * square + -3.761262690e-01f;
  p = p * square + 1.128379166e+00f;
  float q = 5.970318814e-08f;
  q = q * capped + -2.953052013e-06f;
  q = q * capped + 5.863188508e-05f;
  q = q * capped + -6.650460325e-04f;
  q = q * capped + 4.990989605e-03f;
  q = q * capped + -2.692863333e-02f;
  q = q * capped + 1.107988974e-01f;
  q = q * capped + 6.311928063e-01f;
  q = q * capped + 1.130548040e+00f;
  q = q * capped + -3.872819161e-04f;
  const float high = 1.0f - exponential(-q);
  const float result = size < 1.0f ? size * p : high;
  const float with_sign = x < 0 ? -result : result;
  return x != x ? x : with_sign;
}

#define ACTIVATION_FUNCTION static inline
#include "../../block/activation_functions.h"
#undef ACTIVATION_FUNCTION

template <bool relu, class A>
static inline A activate(A z) {
  if constexpr (relu) return activations::relu::forward(z, A(0));
  return z;
}

// values[c] := the activation of values[c].
template <class Kind, class A>
static void activate_each(A* __restrict values, const A* __restrict slope, int64_t channels) {
  CHANNEL_LOOP { values[c] = Kind::forward(values[c], slope[c]); }
}

template <class A>
static void activate(ActivationKind kind, A* values, const A* slope, int64_t channels) {
  switch (kind) {
#define CASE(name)           \
  case ActivationKind::name: \
    return activate_each<activations::name>(values, slope, channels);
    RESNET_FUSED_ACTIVATIONS(CASE)
#undef CASE
  }
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
