// The products of bfloat16 compiled for AMX.
#include "products.h"

#if defined(RESNET_FUSED_X86)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prfchw,prefer-vector-width=512")
#define KERNELS_ISA amx
#define VECTOR_BYTES 64
#define HAS_BF16
#include "epilogue_impl.h"

namespace resnet_fused::cpu::amx {

// In assembly, because GCC 12's intrinsics tell the compiler too little of what they read. What a load reads was
// written before `multiply` was called; only stores write memory that the same function reads.
struct Tiles {
  static inline void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } all_full;
    asm volatile("ldtilecfg %0" ::"m"(all_full) : "memory");
  }
  static inline void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int t>
  static inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static inline void load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(row_bytes));
  }
  template <int t>  // not to be kept in the first cache
  static inline void load_once(const void* p, int64_t row_bytes) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(row_bytes));
  }
  template <int sum, int a, int b>
  static inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
  template <int t>
  static inline void store(void* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(row_bytes) : "memory");
  }
};

}  // namespace resnet_fused::cpu::amx

#include "tile_products_impl.h"
#endif
