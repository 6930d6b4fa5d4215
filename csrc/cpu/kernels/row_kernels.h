// The memory-bound passes of a block over a chunk of rows: single-threaded, torch-free, one table per instruction set.
//
// A row is one pixel's C channels; y is [rows, C], dense. Every per-channel vector is [C] in arithmetic type
// A (float; double for double). A normalisation is z = (y - center) * scale + shift: subtracting first keeps the
// digits that scale * y + (shift - center * scale) loses when |mean| >> std.
#pragma once

#include "scalar_types.h"

namespace resnet_fused::cpu {

template <class A>
struct Affine {
  const A* center;
  const A* scale;
  const A* shift;
};

// Where the derivative of the activation comes from.
enum class Mask {
  none,    // no activation
  output,  // the block's output: 0 where out <= 0
  affine,  // recomputed: 0 where (y - center) * scale + shift <= 0
};

template <class T>
struct NormalizeArgs {
  using A = arith_t<T>;
  const T* y;
  Affine<A> norm;
  const T* skip;        // nullptr: no residual
  Affine<A> skip_norm;  // of the projection; center == nullptr: the identity skip times skip_norm.scale
  bool relu;
  T* out;  // act(norm(y) [+ skip])
};

template <class T>
struct BackwardReduceArgs {
  using A = arith_t<T>;
  const T* dout;
  Mask mask;
  const T* out;  // for Mask::output
  const T* y;
  Affine<A> norm;  // center for the sums, the rest for Mask::affine and p
  bool relu;       // of p
  const T* y2;     // the projection's, or nullptr
  const A* center2;
  T* dz;                // Mask::output only: dout * act', kept for the passes that follow
  T* p;                 // act(norm(y)), the next convolution's input, or nullptr
  sum_t<T>* sum_dz;     // sum of dz over the rows
  sum_t<T>* sum_dz_y;   // sum of dz * (y - center)
  sum_t<T>* sum_dz_y2;  // sum of dz * (y2 - center2)
};

template <class T>
struct BackwardApplyArgs {
  using A = arith_t<T>;
  const T* dz;
  Mask mask;    // none, or affine where dz is still dout
  const T* y;   // for Mask::affine and the y term, else nullptr
  bool y_term;  // without it k_y and k do not count: a NaN in y must not reach a frozen norm's gradient
  Affine<A> norm;
  const A* k_dz;  // dx = k_dz * dz + k_y * (y - center) + k [+ k_add * add]
  const A* k_y;
  const A* k;
  const T* add;  // nullptr: without
  const A* k_add;
  T* dx;  // may be dz itself
};

template <class T>
struct RowKernels {
  using A = arith_t<T>;
  // mean and sum of squared deviations of each channel over the rows
  void (*statistics)(const T* y, int64_t rows, int64_t channels, sum_t<T>* mean, sum_t<T>* m2);
  void (*normalize)(const NormalizeArgs<T>&, int64_t rows, int64_t channels);
  void (*backward_reduce)(const BackwardReduceArgs<T>&, int64_t rows, int64_t channels);
  void (*backward_apply)(const BackwardApplyArgs<T>&, int64_t rows, int64_t channels);
  // A bit a value: bit c % 8 of byte c / 8 in rows of ceil(C / 8) bytes, zero beyond C.
  // bits := out is not <= 0, which is where ReLU passes the gradient
  void (*passing_bits)(const T* out, int64_t rows, int64_t channels, uint8_t* bits);
  // dz := dout where the bit is set, else 0
  void (*where_bits)(const T* dout, const uint8_t* bits, int64_t rows, int64_t channels, T* dz);
  // whether no element is infinite or NaN
  bool (*all_finite)(const T* x, int64_t count);
  // best and position := x and `at` wherever x is greater than best, or NaN, or everywhere if `first`
  void (*running_max)(const T* x, A at, bool first, int64_t channels, A* best, A* position);
  // sum += dout wherever position == at
  void (*add_where)(const T* dout, const uint8_t* position, uint8_t at, int64_t channels, A* sum);
  void (*store)(const A* values, int64_t channels, T* out);
  void (*store_bytes)(const A* values, int64_t channels, uint8_t* out);
};

// The table for the best instruction set that this processor has.
template <class T>
const RowKernels<T>& row_kernels();

// "avx512", "avx2" or "baseline". RESNET_FUSED_ISA chooses a lower one.
const char* row_kernel_isa();

}  // namespace resnet_fused::cpu
