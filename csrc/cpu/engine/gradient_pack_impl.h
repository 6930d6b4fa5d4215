// How a weight gradient's operands are packed and its sums written (gradient_products.h); included once per instruction
// set.

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::BlockSums;
using engine::kPanel;
using engine::kPositions;

#if VECTOR_BYTES == 64

// Keeps the largest magnitude of what was packed.
struct Finite {
  __m512i largest;
  Finite() : largest(_mm512_setzero_si512()) {}  // written out, since GCC 12 compiles one of its own for no target
  inline void see(__m512i values) { largest = _mm512_max_epu16(largest, _mm512_add_epi16(values, values)); }
  inline bool all() const {
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<int16_t>(0xff00))) == 0;
  }
};

// Pairs of words from two vectors, first of the lower and then of the upper half of the channels.
struct Pairs {
  __m512i low, high;
  Pairs() {
    alignas(64) uint16_t index[2][32];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i) index[half][i] = static_cast<uint16_t>(half * 16 + i / 2 + (i % 2) * 32);
    low = _mm512_load_si512(index[0]);
    high = _mm512_load_si512(index[1]);
  }
};

static inline __mmask32 of_panel(int64_t channels, int64_t panel) {
  const int64_t left = channels - panel * kPanel;
  return left >= kPanel ? 0xffffffffu : (1u << left) - 1;
}

// A 16 x 16 matrix of words of 32 bits.
static inline void transpose_words(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

static bool transpose(const bf16* const* pixels, int64_t channels, int64_t pitch, bf16* out) {
  const Pairs pairs;
  Finite finite;
  for (int64_t panel = 0; panel * kPanel < channels; ++panel) {
    const __mmask32 used = of_panel(channels, panel);
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m512i a = _mm512_maskz_loadu_epi16(used, pixels[2 * i] + panel * kPanel);
      const __m512i b = _mm512_maskz_loadu_epi16(used, pixels[2 * i + 1] + panel * kPanel);
      finite.see(a);
      finite.see(b);
      low[i] = _mm512_permutex2var_epi16(a, pairs.low, b);
      high[i] = _mm512_permutex2var_epi16(a, pairs.high, b);
    }
    bf16* to = out + panel * kPanel * pitch;
    transpose_words(low);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * pitch, low[i]);
    transpose_words(high);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (16 + i) * pitch, high[i]);
  }
  return finite.all();
}

static bool interleave(const bf16* const* pixels, int64_t channels, int64_t panel_elements, bf16* out) {
  const Pairs pairs;
  Finite finite;
  for (int64_t i = 0; i < kPositions / 2; ++i)
    for (int64_t panel = 0; panel * kPanel < channels; ++panel) {
      const __mmask32 used = of_panel(channels, panel);
      const __m512i a = _mm512_maskz_loadu_epi16(used, pixels[2 * i] + panel * kPanel);
      const __m512i b = _mm512_maskz_loadu_epi16(used, pixels[2 * i + 1] + panel * kPanel);
      finite.see(a);
      finite.see(b);
      bf16* to = out + panel * panel_elements + i * 2 * kPanel;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, pairs.low, b));
      _mm512_storeu_si512(to + kPanel, _mm512_permutex2var_epi16(a, pairs.high, b));
    }
  return finite.all();
}

// Whole lines past the caches: nobody reads them before the step is over, and each would be read to be written.
static inline void store_some(float* to, __mmask16 which, __m512 values) {
  if (which == 0xffff && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    _mm512_stream_ps(to, values);
  else
    _mm512_mask_storeu_ps(to, which, values);
}
static inline void store_some(bf16* to, __mmask16 which, __m512 values) {
  _mm256_mask_storeu_epi16(to, which, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

template <class T>
static void store(const BlockSums& sums, T* out) {
  for (int64_t row = sums.row / 16 * 16; row < sums.row_end; row += 16)
    for (int64_t column = sums.column / 16 * 16; column < sums.column_end; column += 16) {
      const int64_t first = sums.transposed ? column * kPanel + row : row * kPanel + column;
      __m512i values[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        __m512 sum = _mm512_loadu_ps(sums.blocks[0] + first + i * kPanel);
        for (int64_t b = 1; b < sums.count; ++b)
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums.blocks[b] + first + i * kPanel));
        values[i] = _mm512_castps_si512(sum);
      }
      if (sums.transposed) transpose_words(values);
      const int64_t skipped = sums.column > column ? sums.column - column : 0;
      const int64_t left = sums.column_end - column;
      const __mmask16 which = (left >= 16 ? 0xffffu : (1u << left) - 1) & (0xffffu << skipped);
      T* to = out + (row - sums.row) * sums.pitch + column - sums.column;
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        if (row + i >= sums.row && row + i < sums.row_end)
          store_some(to + i * sums.pitch, which, _mm512_castsi512_ps(values[i]));
    }
  _mm_sfence();
}

#else

static bool is_finite(bf16 value) { return (value.bits & 0x7f80) != 0x7f80; }

static bool transpose(const bf16* const* pixels, int64_t channels, int64_t pitch, bf16* out) {
  bool finite = true;
  for (int64_t i = 0; i < kPositions; ++i)
    for (int64_t c = 0; c % kPanel != 0 || c < channels; ++c) {
      const bf16 value = c < channels ? pixels[i][c] : bf16{0};
      finite &= is_finite(value);
      out[c * pitch + i] = value;
    }
  return finite;
}

static bool interleave(const bf16* const* pixels, int64_t channels, int64_t panel_elements, bf16* out) {
  bool finite = true;
  for (int64_t i = 0; i < kPositions; ++i)
    for (int64_t c = 0; c % kPanel != 0 || c < channels; ++c) {
      const bf16 value = c < channels ? pixels[i][c] : bf16{0};
      finite &= is_finite(value);
      out[c / kPanel * panel_elements + i / 2 * 2 * kPanel + c % kPanel * 2 + i % 2] = value;
    }
  return finite;
}

template <class T>
static void store(const BlockSums& sums, T* out) {
  for (int64_t row = sums.row; row < sums.row_end; ++row)
    for (int64_t column = sums.column; column < sums.column_end; ++column) {
      const int64_t at = sums.transposed ? column * kPanel + row : row * kPanel + column;
      float sum = sums.blocks[0][at];
      for (int64_t b = 1; b < sums.count; ++b) sum += sums.blocks[b][at];
      out[(row - sums.row) * sums.pitch + column - sums.column] = Store<T>::from(sum);
    }
}

#endif

}  // namespace resnet_fused::cpu::KERNELS_ISA
