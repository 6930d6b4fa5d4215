// Vectors of the instruction set as the kernels need them; included once per file, after the target pragma.
// VECTOR_BYTES is 64, 32 or 16; with HAS_BF16 the 64-byte ones multiply and round bfloat16 in hardware.
//
// multiply_pairs(sum, a, b) adds a[2i] b[2i] + a[2i+1] b[2i+1] of bfloat16 to sum[i]; a is one pair, broadcast.

#include "../kernels/elementwise_impl.h"

#if VECTOR_BYTES == 64
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics leave on purpose what they mask
#endif

namespace resnet_fused::cpu::KERNELS_ISA {

#if VECTOR_BYTES == 64

struct Vector {
  using Type = __m512;
  static constexpr int lanes = 16;
  static inline Type zero() { return _mm512_setzero_ps(); }
  static inline Type fill(float value) { return _mm512_set1_ps(value); }
  static inline Type broadcast(const float* p) { return fill(*p); }
  static inline Type broadcast_pair(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static inline Type load(const float* p) { return _mm512_loadu_ps(p); }
  static inline Type load(const bf16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static inline Type load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Type load_pairs(const bf16* p) { return _mm512_loadu_ps(p); }
  static inline Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static inline Type subtract(Type a, Type b) { return _mm512_sub_ps(a, b); }
  static inline Type multiply_add(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  // *a, which the product itself loads; by itself GCC would load it once for two products
  static inline Type multiply_add(const float* a, Type b, Type c) {
    asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(c) : "m"(*a), "v"(b));
    return c;
  }
  // v, zero where z <= 0
  static inline Type where_positive(Type z, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
  }
  static inline Type at_least(Type least, Type z) { return _mm512_max_ps(least, z); }  // z if it is NaN
  static inline Type low(Type v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); }
  static inline Type high(Type v) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xffff0000)));
  }
  static inline Type multiply_pairs(Type sum, Type a, Type b) {
#ifdef HAS_BF16
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
#endif
  }
  static inline bool all_finite(Type z) {
    return _mm512_fpclass_ps_mask(z, 0x99) == 0;  // quiet NaN, both infinities, signalling NaN
  }
  static inline void store(float* p, Type z) { _mm512_storeu_ps(p, z); }
  static inline void store_panel(float* p, const Type* z) {
    store(p, z[0]);
    store(p + 16, z[1]);
  }
  static inline void store_panel(bf16* p, const Type* z) {
#ifdef HAS_BF16
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(z[1], z[0])));
#else
    for (int v = 0; v < 2; ++v) {
      const __m512i u = _mm512_castps_si512(z[v]);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
      const __m512i bits =
          _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(z[v], z[v], _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * v), _mm512_cvtepi32_epi16(bits));
    }
#endif
  }
  static inline void store_panel(f16* p, const Type* z) {
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(p + 16 * v), _mm512_cvtps_ph(z[v], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

#else

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef float UnalignedFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

struct Vector {
  using Type = Floats;
  static constexpr int lanes = VECTOR_BYTES / 4;
  static inline Type zero() { return Type{}; }
  static inline Type fill(float value) { return value - Type{}; }
  static inline Type broadcast(const float* p) { return fill(*p); }
  static inline Type broadcast_pair(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return reinterpret_cast<Type>(pair - Ints{});
  }
  static inline Type load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
  static inline Type load(const bf16* p) {
    Type z;
    for (int i = 0; i < lanes; ++i) z[i] = KERNELS_ISA::load(p[i]);
    return z;
  }
  static inline Type load(const f16* p) {
#if VECTOR_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Type z;
    for (int i = 0; i < lanes; ++i) z[i] = KERNELS_ISA::load(p[i]);
    return z;
#endif
  }
  static inline Type load_pairs(const bf16* p) {
    return reinterpret_cast<Type>(static_cast<Ints>(*reinterpret_cast<const UnalignedInts*>(p)));
  }
  static inline Type add(Type a, Type b) { return a + b; }
  static inline Type subtract(Type a, Type b) { return a - b; }
  static inline Type where_positive(Type z, Type v) { return z <= Type{} ? Type{} : v; }
  static inline Type multiply_add(Type a, Type b, Type c) {
#if VECTOR_BYTES == 32
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
  }
  static inline Type at_least(Type least, Type z) { return z < least ? least : z; }
  static inline Type low(Type v) { return reinterpret_cast<Type>(reinterpret_cast<Ints>(v) << 16); }
  static inline Type high(Type v) {
    return reinterpret_cast<Type>(reinterpret_cast<Ints>(v) & static_cast<int32_t>(0xffff0000));
  }
  static inline Type multiply_pairs(Type sum, Type a, Type b) {
    return multiply_add(high(a), high(b), multiply_add(low(a), low(b), sum));
  }
  static inline bool all_finite(Type z) {
    const Ints wild = (reinterpret_cast<Ints>(z) & 0x7f800000) == 0x7f800000;
    int32_t any = 0;
    for (int i = 0; i < lanes; ++i) any |= wild[i];
    return any == 0;
  }
  static inline void store(float* p, Type z) { *reinterpret_cast<UnalignedFloats*>(p) = z; }
  static inline void store_panel(float* p, const Type* z) {
    for (int v = 0; v < 32 / lanes; ++v) store(p + v * lanes, z[v]);
  }
  static inline void store_panel(bf16* p, const Type* z) {
    for (int v = 0; v < 32 / lanes; ++v)
      for (int i = 0; i < lanes; ++i) p[v * lanes + i] = Store<bf16>::from(z[v][i]);
  }
  static inline void store_panel(f16* p, const Type* z) {
    for (int v = 0; v < 32 / lanes; ++v)
#if VECTOR_BYTES == 32
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + v * lanes), _mm256_cvtps_ph(z[v], _MM_FROUND_TO_NEAREST_INT));
#else
      for (int i = 0; i < lanes; ++i) p[v * lanes + i] = Store<f16>::from(z[v][i]);
#endif
  }
};

#endif

}  // namespace resnet_fused::cpu::KERNELS_ISA
