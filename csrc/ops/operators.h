// The residual block's operators over the kernels of one device: decode, check, run. Templates, because the dispatcher
// wants a plain function for each device.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <tuple>

#include "../block/checks.h"
#include "../block/kernel_layout.h"

namespace resnet_fused {

// A block's tensors, and what it computes (resnet_fused/ops/encoding.py).
#define BLOCK_TENSORS                                                                                                \
  "Tensor x, Tensor? branch_scale, Tensor? skip_scale, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, " \
  "Tensor?[] norm_biases, Tensor?[] running_means, Tensor?[] running_vars, Tensor?[] slopes, "
#define BLOCK_SPEC "int[] spec, float[] constants"
inline constexpr auto kForward =
    "(" BLOCK_TENSORS BLOCK_SPEC ") -> (Tensor out, Tensor[] conv_outputs, Tensor[] batch_stats)";
inline constexpr auto kBackward =
    "(Tensor dout, Tensor? out, Tensor[] conv_outputs, Tensor[] batch_stats, " BLOCK_TENSORS "bool[] needs, " BLOCK_SPEC
    ", *, ScalarType? master=None) -> Tensor[] grads";
inline constexpr auto kInfer =
    "(Tensor x, Tensor? pre_scale, Tensor? pre_shift, Tensor[] weights, Tensor?[] biases, Tensor? branch_scale, "
    "Tensor? skip_scale, Tensor?[] slopes, Tensor? residual, " BLOCK_SPEC ") -> Tensor out";
#undef BLOCK_TENSORS
#undef BLOCK_SPEC

using OptionalList = c10::List<std::optional<at::Tensor>>;

inline OptionalTensors to_vector(const OptionalList& list) { return {list.begin(), list.end()}; }

inline BlockTensors block_tensors(
    const at::Tensor& x, const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    at::TensorList weights, const OptionalList& biases, const OptionalList& norm_weights,
    const OptionalList& norm_biases, const OptionalList& running_means, const OptionalList& running_vars,
    const OptionalList& slopes) {
  BlockTensors block{
      x,
      branch_scale,
      skip_scale,
      weights.vec(),
      to_vector(biases),
      to_vector(norm_weights),
      to_vector(norm_biases),
      to_vector(running_means),
      to_vector(running_vars),
      to_vector(slopes)};
  for (const auto* list :
       {&block.biases, &block.norm_weights, &block.norm_biases, &block.running_means, &block.running_vars,
        &block.slopes})
    TORCH_CHECK_VALUE(
        list->size() == block.weights.size(), "every list of tensors needs one entry for each convolution");
  return block;
}

// Gives the wanted gradients of weights and biases needs.master, where the kernels have not.
inline void cast_to_masters(std::vector<at::Tensor>& grads, Needs needs) {
  std::vector<const uint8_t*> of_convs;
  for (const auto* each : {&needs.weights, &needs.biases})
    for (const auto& wanted : *each) of_convs.push_back(&wanted);
  size_t grad = 0;
  for (const auto* wanted : needs.flat()) {
    if (!*wanted) continue;
    if (std::find(of_convs.begin(), of_convs.end(), wanted) != of_convs.end())
      grads[grad] = grads[grad].to(*needs.master);
    ++grad;
  }
}

// Kernels: a type with the static functions residual_block_forward, _backward and _infer of cpu/residual_block.h. They
// run below autograd: the gradient is an operator of ours, so ATen's operations called from here need no autograd.
template <class Kernels>
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> residual_block_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    at::TensorList weights, const OptionalList& biases, const OptionalList& norm_weights,
    const OptionalList& norm_biases, const OptionalList& running_means, const OptionalList& running_vars,
    const OptionalList& slopes, at::IntArrayRef ints, at::ArrayRef<double> floats) {
  const auto spec = BlockSpec::decode(ints, floats);
  const auto block = block_tensors(
      x, branch_scale, skip_scale, weights, biases, norm_weights, norm_biases, running_means, running_vars, slopes);
  check_block(block, spec);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto result = Kernels::residual_block_forward(block, spec);
  return {result.out, result.conv_outputs, result.batch_stats};
}

template <class Kernels>
std::vector<at::Tensor> residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, at::TensorList conv_outputs,
    at::TensorList batch_stats, const at::Tensor& x, const std::optional<at::Tensor>& branch_scale,
    const std::optional<at::Tensor>& skip_scale, at::TensorList weights, const OptionalList& biases,
    const OptionalList& norm_weights, const OptionalList& norm_biases, const OptionalList& running_means,
    const OptionalList& running_vars, const OptionalList& slopes, const c10::List<bool>& flags, at::IntArrayRef ints,
    at::ArrayRef<double> floats, std::optional<at::ScalarType> master) {
  const auto spec = BlockSpec::decode(ints, floats);
  const auto block = block_tensors(
      x, branch_scale, skip_scale, weights, biases, norm_weights, norm_biases, running_means, running_vars, slopes);
  const Needs needs = check_needs({flags.begin(), flags.end()}, master, spec);
  auto ys = conv_outputs.vec();
  const auto stats = batch_stats.vec();
  check_backward(dout, out, ys, stats, block, spec, check_block(block, spec));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (auto& y : ys) y = y.contiguous(kLayout);  // a saved-tensor hook may change the layout
  auto grads = Kernels::residual_block_backward(dout, out, ys, stats, block, needs, spec);
  if (master) cast_to_masters(grads, needs);
  return grads;
}

template <class Kernels>
at::Tensor residual_block_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    at::TensorList weights, const OptionalList& biases, const std::optional<at::Tensor>& branch_scale,
    const std::optional<at::Tensor>& skip_scale, const OptionalList& slopes, const std::optional<at::Tensor>& residual,
    at::IntArrayRef ints, at::ArrayRef<double> floats) {
  const auto spec = BlockSpec::decode(ints, floats);
  const FoldedBlock block{x,          pre_scale,         pre_shift, weights.vec(), to_vector(biases), branch_scale,
                          skip_scale, to_vector(slopes), residual};
  const auto shapes = check_convolutions(x, weights, block.biases, spec);
  check_infer(x, pre_scale, pre_shift, branch_scale, skip_scale, block.slopes, spec, shapes);
  check_residual(residual, x, spec, shapes);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Kernels::residual_block_infer(block, spec);
}

}  // namespace resnet_fused
