// Convolutions of a training step, forward and the gradient of their input: products of the engine whose operands are
// made while they are read, and which, in bfloat16, gather what the norm around them needs. Of float32 those by
// Winograd (winograd.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../../block/spec.h"
#include "layout.h"
#include "operand.h"

namespace resnet_fused::cpu::engine {

// Why the engine does not convolve inputs of this dtype in training, or nullopt where it does.
std::optional<std::string> reason_against_convolving(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype);
// The same of the gradient of the input.
std::optional<std::string> reason_against_data_gradient(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype);

inline bool convolves(const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  return !reason_against_convolving(weight, stage, dtype);
}
inline bool convolves_backward(const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  return !reason_against_data_gradient(weight, stage, dtype);
}

// A batch of inputs of a convolution.
struct Batch {
  int64_t images;
  Size size;
};
Batch batch_of(const at::Tensor& p);

// Whether float32 of this size is left to PyTorch: no picture, pictures smaller than a patch, or a small one alone,
// which it convolves as one matrix product, whose sums are more exact than those by Winograd (error against fp64 of 256
// to 256 channels, 8×8, 1.9e-7 and 4.4e-7; oneDNN's with four pictures 5.7e-7).
bool is_small(const Batch& batch, int64_t channels);

struct Convolved {
  at::Tensor y;           // channels_last
  at::Tensor statistics;  // [2, C]: mean and biased variance; undefined where not asked for, or of float32
};
// y = conv(p) + bias. Undefined where the weights are not finite, since padding is multiplied with them, where a sum by
// Winograd is not, or where float32 is_small.
template <class T>
Convolved convolve(
    const Operand<T>& p, const Batch& batch, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const Stage& stage, bool statistics);

// The gradient of p from dy, that of y; written over `accumulated`, where that is defined, and added to it. Undefined
// as above; of float32 also if it has been written.
template <class T>
at::Tensor convolve_backward(
    const Operand<T>& dy, const Batch& batch, const at::Tensor& weight, const Stage& stage,
    const at::Tensor& accumulated = {});

// The same behind p = act(norm(u)), for ReLU or no activation: dz, the gradient of norm(u), and for each channel the
// sums of dz and of dz (u - center).
struct NormGradient {
  at::Tensor dz;
  std::vector<double> sum, sum_y;
  bool handed = false;  // whether all of dy was given to `made`
};
// `take` is given pixels [first, first + count) of dy, whole rows, while they are in the cache of this thread; those of
// a slot by one thread, in order. Where dy is made more than once or by several threads together it is not called.
template <class T>
struct Made {
  int64_t slots = 0;
  std::function<void(int64_t thread, int64_t slot, int64_t first, int64_t count, const T* pixels)> take;
};
template <class T>
NormGradient convolve_backward_norm(
    const Operand<T>& dy, const Batch& batch, const at::Tensor& weight, const Stage& stage,
    const Differentiated<T>& behind, const Made<T>& made = {});

}  // namespace resnet_fused::cpu::engine
