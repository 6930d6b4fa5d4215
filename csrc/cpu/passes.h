// The memory-bound passes over whole tensors: the row kernels spread over threads, their partials merged in fixed
// order.
//
// Activations are channels_last tensors of scalar type S, seen as [rows, C]. Work is cut into chunks whose size depends
// on the shape alone and partials are merged chunk by chunk, so results do not depend on scheduling.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "kernels/row_kernels.h"

namespace resnet_fused::cpu {

// The row kernels' element type and arithmetic type for a torch scalar type.
template <class S>
struct Element {
  using type = S;
};
template <>
struct Element<c10::BFloat16> {
  using type = bf16;
};
template <>
struct Element<c10::Half> {
  using type = f16;
};
template <class S>
using element_t = typename Element<S>::type;
template <class S>
using acc_t = arith_t<element_t<S>>;

// z = (y - center) * scale + shift, with its own storage; inverse_std is kept for the gradients. Vectors hold one set
// of channels, or one for each image.
template <class A>
struct NormVectors {
  std::vector<A> center, scale, shift, inverse_std;
  explicit NormVectors(int64_t channels = 0)
      : center(channels, A(0)), scale(channels, A(1)), shift(channels, A(0)), inverse_std(channels, A(1)) {}
  int64_t sets(int64_t channels) const { return static_cast<int64_t>(center.size()) / channels; }
  Affine<A> affine(int64_t first = 0) const {
    return {center.data() + first, scale.data() + first, shift.data() + first};
  }
};

template <class A>
struct ResidualInput {
  at::Tensor skip;                       // undefined: none
  const NormVectors<A>* norm = nullptr;  // of the projection; nullptr: the identity skip
  std::vector<A> scale = {};             // of the identity skip, [C]
};

// The activation of a pass, with its vectors [C]; see Act. They are empty where nothing reads them.
template <class A>
struct ActVectors {
  Activation act = {};
  std::vector<A> slope = {}, branch_scale = {};

  Act<A> pointers() const { return {act, slope.data(), branch_scale.empty() ? nullptr : branch_scale.data()}; }
};

// Of `channels`; slope: what prelu has learned, one value or [C].
template <class A>
ActVectors<A> act_vectors(const Activation& act, const std::optional<at::Tensor>& slope, int64_t channels);

// Per channel, for each set of the norm: sum of dz, of dz * (y - center), of dz * (y2 - center2), and those of
// BackwardReduceArgs.
struct Sums {
  std::vector<double> dz, dz_y, dz_y2, slope, act;
};

// A saved mask: dz = dout where the bit is set, else 0.
struct BitMask {
  at::Tensor bits = {};  // uint8 [rows, ceil(C / 8)], bit c % 8 of byte c / 8; undefined: dz is dout
  at::Tensor dz = {};    // written where defined, for which there must be bits
};

struct ReduceInput {
  at::Tensor dout;
  Reads reads;
  at::Tensor out;  // for Reads::output
  at::Tensor y;
  at::Tensor y2 = {};       // the projection's, or undefined
  at::Tensor dz = {};       // written where defined; may be dout
  at::Tensor p = {};        // written where defined
  BitMask bits = {};        // on top of Reads::nothing
  bool sums_slope = false;  // whether these sums are wanted
  bool sums_act = false;
};

// dx = k_dz * dz + k_y * (y - center) + k [+ k_add * add]; as many sets as the norm has, one of k_add
template <class A>
struct ApplyVectors {
  std::vector<A> k_dz, k_y, k, k_add;
  bool y_term = false;  // whether k_y and k count
  explicit ApplyVectors(int64_t channels) : k_dz(channels, A(1)), k_y(channels, A(0)), k(channels, A(0)) {}
};

// The values of a tensor of any type, in arithmetic type.
template <class A>
std::vector<A> to_vector(const at::Tensor& t);
// A contiguous tensor of these values, rounded once.
at::Tensor from_vector(const std::vector<double>& values, at::IntArrayRef sizes, at::ScalarType type);

// [2, C]: mean and biased variance, in arithmetic type.
template <class S>
at::Tensor batch_statistics(const at::Tensor& y);

// [N, 2, C]: the same for each image.
template <class S>
at::Tensor image_statistics(const at::Tensor& y);

// [N, C], contiguous, in y's type: the mean of each image, rounded once.
template <class S>
at::Tensor image_means(const at::Tensor& y);

// act(norm(y) [+ residual]), written over y.
template <class S>
void normalize_in_place(
    const at::Tensor& y, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const ResidualInput<acc_t<S>>& residual);

// act(norm(y) [+ residual]) as a new tensor. bits, uint8 [rows, ceil(C / 8)], are set where it is not <= 0.
template <class S>
at::Tensor normalize(
    const at::Tensor& y, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const ResidualInput<acc_t<S>>& residual = {}, const at::Tensor& bits = {});

// The sums behind a normalisation's gradients; norm2 is the projection's. residual: of a sum that is the argument.
template <class S>
Sums backward_reduce(
    const ReduceInput& in, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act = {},
    const NormVectors<acc_t<S>>* norm2 = nullptr, const ResidualInput<acc_t<S>>& residual = {});

// Whether `backward_reduce` has to keep dz for this activation, which the passes that follow do not compute again.
template <class A>
bool keeps_dz(const ActVectors<A>& act) {
  return !act.pointers().is_plain();
}

// Writes dx, which may be dz itself. y serves the argument of a ReLU and the y term, and may be undefined without them,
// as may add. With bits, which go with Reads::nothing, the first argument is dout.
template <class S>
void backward_apply(
    const at::Tensor& dz, Reads reads, const at::Tensor& y, const NormVectors<acc_t<S>>& norm,
    const ApplyVectors<acc_t<S>>& k, const at::Tensor& add, const at::Tensor& dx, const BitMask& bits = {});

// Whether no element is infinite or NaN.
template <class S>
bool all_finite(const at::Tensor& x);

}  // namespace resnet_fused::cpu
