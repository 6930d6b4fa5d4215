// The loop over the depth of 4 to 6 positions of float times 16 outputs, by AVX2.
//
// Eight instructions load what twelve multiply, so what the loop itself takes must be little: four steps of it need
// four more. Written with intrinsics it takes seven for each step, as unrolled by GCC 12 it moves values between
// registers and the stack; then a core that is shared with another thread multiplies 0.83 to 0.9 times as fast
// (docs/performance.md).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resnet_fused::cpu::avx2 {

struct DepthLoop {
  int64_t pitch;     // bytes between positions
  int64_t count;     // times four channels; at least one
  const char* next;  // to fetch meanwhile
  int64_t stride;    // bytes of it for four channels
};

// Adds the products of the channels from x on to `sum`, and moves x and w behind them. w: 16 of a panel's 32 columns.
template <int rows>
inline void multiply_depth(const float*& x, const float*& w, __m256 (*sum)[2], const DepthLoop& loop);

// r8: the pitch, r9: three of it, r10: five
#define ROW(address, low, high, register) \
  "vbroadcastss " address ", %%" register "\n"      \
  "vfmadd231ps %%ymm12, %%" register ", " low "\n"  \
  "vfmadd231ps %%ymm13, %%" register ", " high "\n"
#define ROWS_4(at)                                     \
  ROW(at "(%[x])", "%[s0]", "%[s1]", "ymm14")          \
  ROW(at "(%[x], %%r8)", "%[s2]", "%[s3]", "ymm15")    \
  ROW(at "(%[x], %%r8, 2)", "%[s4]", "%[s5]", "ymm14") \
  ROW(at "(%[x], %%r9)", "%[s6]", "%[s7]", "ymm15")
#define ROWS_5(at) ROWS_4(at) ROW(at "(%[x], %%r8, 4)", "%[s8]", "%[s9]", "ymm14")
#define ROWS_6(at) ROWS_5(at) ROW(at "(%[x], %%r10)", "%[s10]", "%[s11]", "ymm15")
#define CHANNEL(rows, at, weights) \
  "vmovups " weights               \
  "(%[w]), %%ymm12\n"              \
  "vmovups " weights " + 32(%[w]), %%ymm13\n" rows(at)
#define SUMS_4                                                                                                  \
  [s0] "+x"(sum[0][0]), [s1] "+x"(sum[0][1]), [s2] "+x"(sum[1][0]), [s3] "+x"(sum[1][1]), [s4] "+x"(sum[2][0]), \
      [s5] "+x"(sum[2][1]), [s6] "+x"(sum[3][0]), [s7] "+x"(sum[3][1])
#define SUMS_5 SUMS_4, [s8] "+x"(sum[4][0]), [s9] "+x"(sum[4][1])
#define SUMS_6 SUMS_5, [s10] "+x"(sum[5][0]), [s11] "+x"(sum[5][1])
#define MULTIPLY_DEPTH(rows, ROWS, SUMS)                                                                           \
  template <>                                                                                                      \
  inline void multiply_depth<rows>(const float*& x, const float*& w, __m256(*sum)[2], const DepthLoop& loop) {     \
    asm volatile("mov (%[loop]), %%r8\n"                                                                         \
                 "mov 8(%[loop]), %%r11\n"                                                                       \
                 "mov 16(%[loop]), %%rax\n"                                                                      \
                 "mov 24(%[loop]), %%rcx\n"                                                                      \
                 "lea (%%r8, %%r8, 2), %%r9\n"                                                                   \
                 "lea (%%r8, %%r8, 4), %%r10\n"                                                                  \
                 ".p2align 5\n"                                                                                  \
                 "1:\n"                                                                                          \
                 "prefetcht1 (%%rax)\n"                                                                          \
                 "add %%rcx, %%rax\n"                                                                            \
                 CHANNEL(ROWS, "0", "0")                                                                         \
                 CHANNEL(ROWS, "4", "128")                                                                       \
                 CHANNEL(ROWS, "8", "256")                                                                       \
                 CHANNEL(ROWS, "12", "384")                                                                      \
                 "add $16, %[x]\n"                                                                               \
                 "add $512, %[w]\n"                                                                              \
                 "dec %%r11\n"                                                                                   \
                 "jnz 1b\n"                                                                                      \
                 : [x] "+r"(x), [w] "+r"(w), SUMS                                                                \
                 : [loop] "r"(&loop)                                                                             \
                 : "r8", "r9", "r10", "r11", "rax", "rcx", "ymm12", "ymm13", "ymm14", "ymm15", "memory", "cc"); \
  }
MULTIPLY_DEPTH(4, ROWS_4, SUMS_4)
MULTIPLY_DEPTH(5, ROWS_5, SUMS_5)
MULTIPLY_DEPTH(6, ROWS_6, SUMS_6)
#undef ROW
#undef ROWS_4
#undef ROWS_5
#undef ROWS_6
#undef CHANNEL
#undef SUMS_4
#undef SUMS_5
#undef SUMS_6
#undef MULTIPLY_DEPTH

}  // namespace resnet_fused::cpu::avx2
