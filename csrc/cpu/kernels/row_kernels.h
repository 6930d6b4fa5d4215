// The memory-bound passes of a block over a chunk of rows: single-threaded, torch-free, one table per instruction set.
//
// A row is one pixel's C channels; y is [rows, C], dense. Every per-channel vector is [C] in arithmetic type
// A (float; double for double). A normalisation is z = (y - center) * scale + shift: subtracting first keeps the
// digits that scale * y + (shift - center * scale) loses when |mean| >> std.
#pragma once

#include "../../block/activations.h"
#include "../x86.h"
#include "scalar_types.h"

namespace resnet_fused::cpu {

template <class A>
struct Affine {
  const A* center;
  const A* scale;
  const A* shift;
};

// What gives an activation's derivative: nothing (there is no activation), its output, or its argument. The argument is
// computed again: (y - center) * scale + shift, plus the skip path's part where it is a sum.
enum class Reads { nothing, output, argument };

// The activation of a pass. ReLU and the identity, after an addition, have loops of their own.
template <class A>
struct Act {
  Activation act;
  const A* slope = nullptr;         // [C]: leaky_relu's and prelu's; others may have any
  const A* branch_scale = nullptr;  // [C]: the activation stands before this scale and the addition; nullptr: behind

  bool is_plain() const { return !branch_scale && (act.is(ActivationKind::identity) || act.is(ActivationKind::relu)); }
  bool is_relu() const { return act.is(ActivationKind::relu); }
};

template <class T>
struct NormalizeArgs {
  using A = arith_t<T>;
  const T* y;
  Affine<A> norm;
  const T* skip;        // nullptr: no residual
  Affine<A> skip_norm;  // of the projection; center == nullptr: the identity skip times skip_norm.scale
  Act<A> act;
  T* out;  // act(norm(y) [+ skip]), or act(norm(y)) * branch_scale [+ skip]
};

template <class T>
struct BackwardReduceArgs {
  using A = arith_t<T>;
  const T* dout;
  Reads reads;
  const T* out;  // for Reads::output
  const T* y;
  Affine<A> norm;  // center for the sums, the rest for Reads::argument and p
  Act<A> act;
  const T* skip;  // of the argument of a sum, nullptr: none; as in NormalizeArgs
  Affine<A> skip_norm;
  const T* y2;  // the projection's, or nullptr
  const A* center2;
  T* dz;                // [branch_scale *] dout * act', kept for the passes that follow; nullptr: not kept
  T* p;                 // act(norm(y)), the next convolution's input, or nullptr
  sum_t<T>* sum_dz;     // sum of dz over the rows
  sum_t<T>* sum_dz_y;   // sum of dz * (y - center)
  sum_t<T>* sum_dz_y2;  // sum of dz * (y2 - center2)
  sum_t<T>* sum_slope;  // sum of dout * z where z <= 0: the gradient of prelu's slope; or nullptr
  sum_t<T>* sum_act;    // sum of dout * act(z): the gradient of branch_scale; or nullptr
};

template <class T>
struct BackwardApplyArgs {
  using A = arith_t<T>;
  const T* dz;
  Reads reads;  // nothing, or argument where dz is still the gradient behind a ReLU
  const T* y;   // for Reads::argument and the y term, else nullptr
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
  // sum of each channel over the rows
  void (*sum)(const T* y, int64_t rows, int64_t channels, double* sum);
  void (*normalize)(const NormalizeArgs<T>&, int64_t rows, int64_t channels);
  void (*backward_reduce)(const BackwardReduceArgs<T>&, int64_t rows, int64_t channels);
  void (*backward_apply)(const BackwardApplyArgs<T>&, int64_t rows, int64_t channels);
  // One bit per value: bit c % 8 of byte c / 8 in rows of ceil(C / 8) bytes, zero beyond C.
  // bits := out is not <= 0, which is where ReLU passes the gradient
  void (*passing_bits)(const T* out, int64_t rows, int64_t channels, uint8_t* bits);
  // dz := dout where the bit is set, else 0
  void (*where_bits)(const T* dout, const uint8_t* bits, int64_t rows, int64_t channels, T* dz);
  // whether no element is infinite or NaN
  bool (*all_finite)(const T* x, int64_t count);
  // sum += dout wherever position == at
  void (*add_where)(const T* dout, const uint8_t* position, uint8_t at, int64_t channels, A* sum);
  // out := the largest of `count` rows, NaN where one is
  void (*max_of)(const T* const* rows, int64_t count, int64_t channels, T* out);
  // The same, and which[c] := the place of the row that has it: the first such row, or the last that is NaN
  void (*max_and_place)(
      const T* const* rows, const uint8_t* places, int64_t count, int64_t channels, T* out, uint8_t* which);
  // out[i] := row[i * step ...], `used` values and zeros up to `pitch`; reads whole pitches
  void (*windows)(const T* row, int64_t step, int64_t used, int64_t pitch, int64_t count, T* out);
  void (*store)(const A* values, int64_t channels, T* out);
  void (*widen)(const T* values, int64_t count, A* out);
};

// The table for the instruction set of isa.h.
template <class T>
const RowKernels<T>& row_kernels();

}  // namespace resnet_fused::cpu
