// The heaviest passes over bfloat16 for AVX-512 with its conversions; included once, after the target pragma.
//
// 32 channels are two vectors, those at even and those at odd places, which takes one instruction each instead of two.
// A group of 32 channels is taken through kRows rows, so that its coefficients and sums stay in registers. That is not
// the order of memory, and what the processor would fetch ahead by itself is fetched on request, one block of rows
// ahead.
//
// Values are rounded by the processor, which flushes subnormal ones to zero and keeps the sign and payload of a NaN.

#include "elementwise_impl.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics leave on purpose what they mask

namespace resnet_fused::cpu::KERNELS_ISA {

constexpr int64_t kGroup = 32;
constexpr int64_t kRows = 8;

struct Pair {
  __m512 even, odd;
};
static inline Pair operator+(Pair a, Pair b) { return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)}; }
static inline Pair operator-(Pair a, Pair b) { return {_mm512_sub_ps(a.even, b.even), _mm512_sub_ps(a.odd, b.odd)}; }
static inline Pair operator*(Pair a, Pair b) { return {_mm512_mul_ps(a.even, b.even), _mm512_mul_ps(a.odd, b.odd)}; }
static inline Pair multiply_add(Pair a, Pair b, Pair c) {
  return {_mm512_fmadd_ps(a.even, b.even, c.even), _mm512_fmadd_ps(a.odd, b.odd, c.odd)};
}
static inline Pair zeros() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
static inline Pair relu_of(Pair z) {  // the second operand, if it is NaN
  return {_mm512_max_ps(_mm512_setzero_ps(), z.even), _mm512_max_ps(_mm512_setzero_ps(), z.odd)};
}
// value where z is not <= 0
static inline Pair where_positive(Pair z, Pair value) {
  const __m512 zero = _mm512_setzero_ps();
  return {
      _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z.even, zero, _CMP_NLE_UQ), value.even),
      _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z.odd, zero, _CMP_NLE_UQ), value.odd)};
}
static inline Pair unpack(__m512i bits) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
      _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)))};
}
// The lanes where a bfloat16 is not <= 0: those above zero, and NaN with its sign.
static inline __mmask32 not_below(__m512i bits) {
  return _mm512_cmpgt_epi16_mask(bits, _mm512_setzero_si512()) |
         _mm512_cmpgt_epu16_mask(bits, _mm512_set1_epi16(static_cast<int16_t>(0xff80)));
}

// Where channels are: all 32 of a group, or the last `count`.
struct Whole {
  static inline __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline void store(bf16* p, __m512i bits) { _mm512_storeu_si512(p, bits); }
  static inline __m512 load(const float* p, int half) { return _mm512_loadu_ps(p + 16 * half); }
  static inline void store(float* p, int half, __m512 v) { _mm512_storeu_ps(p + 16 * half, v); }
  static inline void store(uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
struct Part {
  __mmask32 mask;
  explicit inline Part(int64_t count) : mask((1u << count) - 1) {}
  inline __m512i load(const bf16* p) const { return _mm512_maskz_loadu_epi16(mask, p); }
  inline void store(bf16* p, __m512i bits) const { _mm512_mask_storeu_epi16(p, mask, bits); }
  inline __mmask16 of(int half) const { return static_cast<__mmask16>(mask >> 16 * half); }
  inline __m512 load(const float* p, int half) const { return _mm512_maskz_loadu_ps(of(half), p + 16 * half); }
  inline void store(float* p, int half, __m512 v) const { _mm512_mask_storeu_ps(p + 16 * half, of(half), v); }
  inline void store(uint8_t* p, __m256i v) const { _mm256_mask_storeu_epi8(p, mask, v); }
};

// clang-format off
alignas(64) constexpr int32_t kEven[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
alignas(64) constexpr int32_t kOdd[] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
alignas(64) constexpr int32_t kLow[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
alignas(64) constexpr int32_t kHigh[] = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
alignas(64) constexpr int16_t kInterleaved[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
// clang-format on

template <class Lanes>
static inline Pair channels_of(const Lanes& lanes, const float* p) {
  const __m512 low = lanes.load(p, 0), high = lanes.load(p, 1);
  return {
      _mm512_permutex2var_ps(low, _mm512_load_si512(kEven), high),
      _mm512_permutex2var_ps(low, _mm512_load_si512(kOdd), high)};
}
template <class Lanes>
static inline void store_channels(const Lanes& lanes, float* p, Pair v) {
  lanes.store(p, 0, _mm512_permutex2var_ps(v.even, _mm512_load_si512(kLow), v.odd));
  lanes.store(p, 1, _mm512_permutex2var_ps(v.even, _mm512_load_si512(kHigh), v.odd));
}
template <class Lanes>
static inline Pair values_of(const Lanes& lanes, const bf16* p) {
  return unpack(lanes.load(p));
}
template <class Lanes>
static inline void store_values(const Lanes& lanes, bf16* p, Pair v) {
  const __m512i bits = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.odd, v.even));
  lanes.store(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), bits));
}

static inline void fetch(const bf16* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
static inline void fetch_to_write(bf16* p) { __builtin_prefetch(p, 1, 3); }

// body(lanes, channel) for each group of channels
template <class Body>
static inline void each_group_of_channels(int64_t channels, const Body& body) {
  int64_t channel = 0;
  for (; channel + kGroup <= channels; channel += kGroup) body(Whole(), channel);
  if (channel < channels) body(Part(channels - channel), channel);
}

// Pass(args, lanes, channel): what stays the same over a group's rows, then row(at, ahead) for each of them.
template <class Pass, class Args>
static void each_group(const Args& args, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = rows - row < kRows ? rows - row : kRows;
    each_group_of_channels(channels, [&](const auto& lanes, int64_t channel) __attribute__((always_inline)) {
      Pass pass(args, lanes, channel, row == 0);
      int64_t at = row * channels + channel;
      for (int64_t r = 0; r < count; ++r, at += channels) pass.row(args, lanes, at, at + kRows * channels);
      pass.finish(args, lanes, channel);
    });
  }
}

struct AffinePair {
  Pair center, scale, shift;
  template <class Lanes>
  inline AffinePair(const Affine<float>& norm, const Lanes& lanes, int64_t c)
      : center(channels_of(lanes, norm.center + c)),
        scale(channels_of(lanes, norm.scale + c)),
        shift(channels_of(lanes, norm.shift + c)) {}
  inline Pair operator()(Pair y) const { return multiply_add(y - center, scale, shift); }
};

// --- statistics ------------------------------------------------------------------------------------------------------

struct StatisticsArgs {
  const bf16* y;
  float *sum, *squares;
};

struct Statistics {
  Pair first, sum, squares;
  template <class Lanes>
  inline Statistics(const StatisticsArgs& args, const Lanes& lanes, int64_t c, bool begins)
      : first(values_of(lanes, args.y + c)),
        sum(begins ? zeros() : channels_of(lanes, args.sum + c)),
        squares(begins ? zeros() : channels_of(lanes, args.squares + c)) {}
  template <class Lanes>
  inline void row(const StatisticsArgs& args, const Lanes& lanes, int64_t at, int64_t ahead) {
    fetch(args.y + ahead);
    const Pair d = values_of(lanes, args.y + at) - first;
    sum = sum + d;
    squares = multiply_add(d, d, squares);
  }
  template <class Lanes>
  inline void finish(const StatisticsArgs& args, const Lanes& lanes, int64_t c) {
    store_channels(lanes, args.sum + c, sum);
    store_channels(lanes, args.squares + c, squares);
  }
};

static void statistics(const bf16* y, int64_t rows, int64_t channels, float* mean, float* m2) {
  each_group<Statistics>(StatisticsArgs{y, mean, m2}, rows, channels);
  const float inverse = 1.0f / static_cast<float>(rows);
  CHANNEL_LOOP {
    const float offset = mean[c] * inverse;
    const float rest = m2[c] - mean[c] * offset;
    m2[c] = rest < 0 ? 0.0f : rest;
    mean[c] = load(y[c]) + offset;
  }
}

// --- forward: normalise + residual + activation ----------------------------------------------------------------------

enum class Residual { none, identity, projection };

template <Residual residual, bool relu>
struct Normalize {
  using Args = NormalizeArgs<bf16>;
  AffinePair norm;
  Pair skip_center, skip_scale, skip_shift;
  template <class Lanes>
  inline Normalize(const Args& args, const Lanes& lanes, int64_t c, bool) : norm(args.norm, lanes, c) {
    if constexpr (residual != Residual::none) skip_scale = channels_of(lanes, args.skip_norm.scale + c);
    if constexpr (residual == Residual::projection) {
      skip_center = channels_of(lanes, args.skip_norm.center + c);
      skip_shift = channels_of(lanes, args.skip_norm.shift + c);
    }
  }
  template <class Lanes>
  inline void row(const Args& args, const Lanes& lanes, int64_t at, int64_t ahead) const {
    fetch(args.y + ahead);
    fetch_to_write(args.out + ahead);
    Pair z = norm(values_of(lanes, args.y + at));
    if constexpr (residual != Residual::none) {
      fetch(args.skip + ahead);
      Pair skip = values_of(lanes, args.skip + at);
      if constexpr (residual == Residual::projection) {
        z = z + multiply_add(skip - skip_center, skip_scale, skip_shift);
      } else {
        z = multiply_add(skip, skip_scale, z);
      }
    }
    store_values(lanes, args.out + at, relu ? relu_of(z) : z);
  }
  template <class Lanes>
  inline void finish(const Args&, const Lanes&, int64_t) const {}
};

static void normalize(const NormalizeArgs<bf16>& args, int64_t rows, int64_t channels) {
  if (!args.act.is_plain()) return avx512::kernels(bf16{}).normalize(args, rows, channels);
  const auto with = [&]<Residual residual> {
    args.act.is_relu() ? each_group<Normalize<residual, true>>(args, rows, channels)
                       : each_group<Normalize<residual, false>>(args, rows, channels);
  };
  if (!args.skip) return with.template operator()<Residual::none>();
  args.skip_norm.center ? with.template operator()<Residual::projection>()
                        : with.template operator()<Residual::identity>();
}

// --- backward: reduction ---------------------------------------------------------------------------------------------

template <Reads reads, bool projection, bool writes_p, bool relu>
struct Reduce {
  using Args = BackwardReduceArgs<bf16>;
  static constexpr bool reads_z = reads == Reads::argument || writes_p;
  Pair center, scale, shift, center2, sum, sum_y, sum_y2;
  template <class Lanes>
  inline Reduce(const Args& args, const Lanes& lanes, int64_t c, bool begins)
      : center(channels_of(lanes, args.norm.center + c)), sum(zeros()), sum_y(zeros()), sum_y2(zeros()) {
    if constexpr (reads_z) {
      scale = channels_of(lanes, args.norm.scale + c);
      shift = channels_of(lanes, args.norm.shift + c);
    }
    if constexpr (projection) center2 = channels_of(lanes, args.center2 + c);
    if (begins) return;
    sum = channels_of(lanes, args.sum_dz + c);
    sum_y = channels_of(lanes, args.sum_dz_y + c);
    if constexpr (projection) sum_y2 = channels_of(lanes, args.sum_dz_y2 + c);
  }
  template <class Lanes>
  inline void row(const Args& args, const Lanes& lanes, int64_t at, int64_t ahead) {
    fetch(args.dout + ahead);
    fetch(args.y + ahead);
    __m512i bits = lanes.load(args.dout + at);
    if constexpr (reads == Reads::output) {
      fetch(args.out + ahead);
      fetch_to_write(args.dz + ahead);
      bits = _mm512_maskz_mov_epi16(not_below(lanes.load(args.out + at)), bits);
      lanes.store(args.dz + at, bits);
    }
    Pair dz = unpack(bits);
    const Pair y = values_of(lanes, args.y + at) - center;
    if constexpr (reads_z) {
      const Pair z = multiply_add(y, scale, shift);
      if constexpr (reads == Reads::argument) dz = where_positive(z, dz);
      if constexpr (writes_p) {
        fetch_to_write(args.p + ahead);
        store_values(lanes, args.p + at, relu ? relu_of(z) : z);
      }
    }
    sum = sum + dz;
    sum_y = multiply_add(dz, y, sum_y);
    if constexpr (projection) {
      fetch(args.y2 + ahead);
      sum_y2 = multiply_add(dz, values_of(lanes, args.y2 + at) - center2, sum_y2);
    }
  }
  template <class Lanes>
  inline void finish(const Args& args, const Lanes& lanes, int64_t c) {
    store_channels(lanes, args.sum_dz + c, sum);
    store_channels(lanes, args.sum_dz_y + c, sum_y);
    if constexpr (projection) store_channels(lanes, args.sum_dz_y2 + c, sum_y2);
  }
};

static void backward_reduce(const BackwardReduceArgs<bf16>& args, int64_t rows, int64_t channels) {
  if (!args.act.is_plain() || args.skip) return avx512::kernels(bf16{}).backward_reduce(args, rows, channels);
  switch (args.reads) {
    case Reads::output:  // the block's end: nothing follows that needs p
      return args.y2 ? each_group<Reduce<Reads::output, true, false, false>>(args, rows, channels)
                     : each_group<Reduce<Reads::output, false, false, false>>(args, rows, channels);
    case Reads::argument:
      return args.p ? each_group<Reduce<Reads::argument, false, true, true>>(args, rows, channels)
                    : each_group<Reduce<Reads::argument, false, false, true>>(args, rows, channels);
    case Reads::nothing:
      if (args.y2) return each_group<Reduce<Reads::nothing, true, false, false>>(args, rows, channels);
      return args.p ? each_group<Reduce<Reads::nothing, false, true, false>>(args, rows, channels)
                    : each_group<Reduce<Reads::nothing, false, false, false>>(args, rows, channels);
  }
}

// --- backward: apply -------------------------------------------------------------------------------------------------

template <Reads reads, bool y_term, bool has_add>
struct Apply {
  using Args = BackwardApplyArgs<bf16>;
  static constexpr bool masks = reads == Reads::argument, reads_y = y_term || masks;
  Pair center, scale, shift, k_dz, k_y, k, k_add;
  template <class Lanes>
  inline Apply(const Args& args, const Lanes& lanes, int64_t c, bool) : k_dz(channels_of(lanes, args.k_dz + c)) {
    if constexpr (reads_y) center = channels_of(lanes, args.norm.center + c);
    if constexpr (masks) {
      scale = channels_of(lanes, args.norm.scale + c);
      shift = channels_of(lanes, args.norm.shift + c);
    }
    if constexpr (y_term) {
      k_y = channels_of(lanes, args.k_y + c);
      k = channels_of(lanes, args.k + c);
    }
    if constexpr (has_add) k_add = channels_of(lanes, args.k_add + c);
  }
  template <class Lanes>
  inline void row(const Args& args, const Lanes& lanes, int64_t at, int64_t ahead) const {
    fetch(args.dz + ahead);
    fetch_to_write(args.dx + ahead);
    Pair dz = values_of(lanes, args.dz + at), y;
    if constexpr (reads_y) {
      fetch(args.y + ahead);
      y = values_of(lanes, args.y + at) - center;
    }
    if constexpr (masks) dz = where_positive(multiply_add(y, scale, shift), dz);
    Pair result = y_term ? multiply_add(k_dz, dz, multiply_add(k_y, y, k)) : k_dz * dz;
    if constexpr (has_add) {
      fetch(args.add + ahead);
      result = multiply_add(k_add, values_of(lanes, args.add + at), result);
    }
    store_values(lanes, args.dx + at, result);
  }
  template <class Lanes>
  inline void finish(const Args&, const Lanes&, int64_t) const {}
};

static void backward_apply(const BackwardApplyArgs<bf16>& args, int64_t rows, int64_t channels) {
  const auto with = [&]<Reads reads, bool y_term> {
    args.add ? each_group<Apply<reads, y_term, true>>(args, rows, channels)
             : each_group<Apply<reads, y_term, false>>(args, rows, channels);
  };
  if (args.reads == Reads::argument) {
    args.y_term ? with.template operator()<Reads::argument, true>()
                : with.template operator()<Reads::argument, false>();
  } else {
    args.y_term ? with.template operator()<Reads::nothing, true>() : with.template operator()<Reads::nothing, false>();
  }
}

// --- max pooling -----------------------------------------------------------------------------------------------------

// Compared as integers of the same order, in which both zeros are one and NaN is more than all.
static void max_and_place(
    const bf16* const* rows, const uint8_t* places, int64_t count, int64_t channels, bf16* out, uint8_t* which) {
  each_group_of_channels(channels, [&](const auto& lanes, int64_t c) __attribute__((always_inline)) {
    __m512i largest = _mm512_setzero_si512(), bits = largest, place = largest;
    for (int64_t i = 0; i < count; ++i) {
      const __m512i v = lanes.load(rows[i] + c), size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
      const __m512i key = _mm512_mask_sub_epi16(size, _mm512_movepi16_mask(v), _mm512_setzero_si512(), size);
      const __mmask32 nan = _mm512_cmpgt_epi16_mask(size, _mm512_set1_epi16(0x7f80));
      const __mmask32 first = i == 0 ? ~0u : 0u;
      const __mmask32 take = first | nan | _mm512_cmpgt_epi16_mask(key, largest);
      largest = _mm512_mask_mov_epi16(largest, take, _mm512_mask_mov_epi16(key, nan, _mm512_set1_epi16(0x7fff)));
      bits = _mm512_mask_mov_epi16(bits, take, v);
      place = _mm512_mask_mov_epi16(place, take, _mm512_set1_epi16(places[i]));
    }
    lanes.store(out + c, bits);
    lanes.store(which + c, _mm512_cvtepi16_epi8(place));
  });
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
