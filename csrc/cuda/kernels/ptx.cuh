// Everything that only a GPU has: indices, barriers, tensor cores, asynchronous copies, atomics. sm_80 and newer.
//
// The tests compile the kernels for a CPU, where `emulator.h` of tests/emulator gives the same functions.
#pragma once

#include "scalars.cuh"

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define NOINLINE_DEVICE inline __device__ __noinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define ROLLED _Pragma("unroll 1")

namespace resnet_fused::cuda {

// A worker is a thread block; the workers of a launch walk its phases together.
DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int worker_index() { return static_cast<int>(blockIdx.x); }
DEVICE int worker_count() { return static_cast<int>(gridDim.x); }

// The worker's dynamic shared memory; 128-byte aligned.
DEVICE char* shared_memory() {
  extern __shared__ char __align__(128) memory[];
  return memory;
}

DEVICE void sync_threads() { __syncthreads(); }

// --- reading and writing ---------------------------------------------------------------------------------------------

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 bytes of global memory. The address alone does not tell the compiler which memory it is.
DEVICE Bits128 load_128(const void* global) {
  Bits128 bits;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.word[0]), "=r"(bits.word[1]), "=r"(bits.word[2]), "=r"(bits.word[3])
               : "l"(__cvta_generic_to_global(global)));
  return bits;
}
DEVICE void store_128(void* global, const Bits128& bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(bits.word[0]),
               "r"(bits.word[1]), "r"(bits.word[2]), "r"(bits.word[3])
               : "memory");
}

// 16 bytes from global to shared memory, in flight until `cp_async_wait`; zeros where not `inside`.
DEVICE void cp_async_16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Closes a group of copies; `cp_async_wait<N>` waits until at most the N latest groups are in flight.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i. Register i of lane
// 4 g + t gets elements (g, 2 t) and (g, 2 t + 1) of matrix i; transposed: (2 t, g) and (2 t + 1, g).
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// c [16, 8] += a [16, k] b [k, 8], k = 16 for 16-bit elements and 8 for tf32. With g = lane / 4, t = lane % 4:
//   c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
//   16-bit a: pairs from (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8);  b: pairs from (2 t, g), (2 t + 8, g)
//   tf32   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);                      b: (t, g), (t + 4, g)
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest tf32 (10 bits of mantissa, ties away from zero), as the bits of a float.
DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// --- conversions -----------------------------------------------------------------------------------------------------

DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
// max(v, 0), and NaN for NaN as in PyTorch.
DEVICE float relu(float v) {
  float positive;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(v));
  return positive;
}
// e^v and erf(v), as activation_functions.h calls them.
DEVICE float exponential(float v) { return expf(v); }
DEVICE float error_function(float v) { return erff(v); }
DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }

DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
DEVICE float to_float(f16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}
// Rounded to the nearest, ties to even.
DEVICE bf16 to_bf16(float v) {
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}
DEVICE f16 to_f16(float v) {
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}
// Two at once: `low` in the lower half.
DEVICE uint32_t pair_of(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t pair_of(float low, float high, f16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// --- between workers -------------------------------------------------------------------------------------------------

// Adds, and returns the value before. What other workers wrote before their additions is visible afterwards.
DEVICE int atomic_add(int* counter, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
DEVICE int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// Orders this thread's writes before its later actions, as seen by the whole GPU.
DEVICE void fence() { __threadfence(); }

}  // namespace resnet_fused::cuda

#else
#include <emulator.h>
#include <math.h>
#define UNROLL_4
#define ROLLED

namespace resnet_fused::cuda {
DEVICE Bits128 load_128(const void* global) { return *static_cast<const Bits128*>(global); }
DEVICE void store_128(void* global, const Bits128& bits) { *static_cast<Bits128*>(global) = bits; }
DEVICE float relu(float v) { return v <= 0.0f ? 0.0f : v; }
DEVICE float exponential(float v) { return expf(v); }
DEVICE float error_function(float v) { return erff(v); }
DEVICE uint32_t pair_of(float low, float high, bf16) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}
DEVICE uint32_t pair_of(float low, float high, f16) {
  return to_f16(low).bits | static_cast<uint32_t>(to_f16(high).bits) << 16;
}
}  // namespace resnet_fused::cuda
#endif
