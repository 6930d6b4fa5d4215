// The operators torch.ops.resnet_fused.*: schemas, checks that keep a bad call from reading out of bounds, CPU kernels.
// resnet_fused/operators.py documents the arguments and calls them; user-facing errors come from validation.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "block_spec.h"
#include "cpu/max_pool.h"
#include "cpu/residual_block.h"

namespace resnet_fused {
namespace {

using cpu::BlockTensors;
using cpu::OptionalTensors;
using OptionalList = c10::List<std::optional<at::Tensor>>;

OptionalTensors to_vector(const OptionalList& list) { return {list.begin(), list.end()}; }

void check_vector(const char* name, const std::optional<at::Tensor>& t, int64_t channels, int64_t conv) {
  TORCH_CHECK_VALUE(
      !t || (t->dim() == 1 && t->size(0) == channels), name, " of convolution ", conv, " must be [", channels,
      "], got ", t->sizes());
}

void check_scale(const char* name, const std::optional<at::Tensor>& t, int64_t channels) {
  TORCH_CHECK_VALUE(
      !t || t->numel() == 1 || t->numel() == channels, name, " must hold 1 value or ", channels, ", got ", t->sizes());
}

// The shape of each convolution's output; throws where tensors and spec do not fit together.
std::vector<std::vector<int64_t>> check_convolutions(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const BlockSpec& spec) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must be a non-empty [N, C, H, W], got ", x.sizes());
  TORCH_CHECK_VALUE(
      weights.size() == spec.convs.size() && biases.size() == spec.convs.size(), "the spec has ", spec.convs.size(),
      " convolutions, got ", weights.size(), " weights and ", biases.size(), " biases");
  std::vector<std::vector<int64_t>> shapes;
  auto source = x.sizes().vec();
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto& stage = spec.convs[i];
    const auto& w = weights[i];
    const auto in = static_cast<int64_t>(i) == spec.stages ? x.sizes().vec() : source;
    TORCH_CHECK_TYPE(
        w.scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), ", weight ", i, " is ", w.scalar_type());
    TORCH_CHECK_VALUE(
        w.dim() == 4 && w.size(1) * stage.groups == in[1] && w.size(0) % stage.groups == 0, "convolution ", i,
        " receives ", in[1], " channels in ", stage.groups, " groups, its weight is ", w.sizes());
    check_vector("bias", biases[i], w.size(0), static_cast<int64_t>(i));
    std::vector<int64_t> shape{x.size(0), w.size(0)};
    for (int64_t d = 0; d < 2; ++d) {
      const int64_t extent = stage.dilation[d] * (w.size(2 + d) - 1) + 1, padded = in[2 + d] + 2 * stage.padding[d];
      TORCH_CHECK_VALUE(
          padded >= extent, "the kernel of convolution ", i, " does not fit its input ", at::IntArrayRef(in));
      shape.push_back((padded - extent) / stage.stride[d] + 1);
    }
    shapes.push_back(shape);
    source = shape;
  }
  const auto& branch = shapes[spec.stages - 1];
  const auto skip = spec.skip == Skip::none ? branch : spec.has_projection() ? shapes.back() : x.sizes().vec();
  TORCH_CHECK_VALUE(
      skip == branch, "the skip path gives ", at::IntArrayRef(skip), ", the branch ", at::IntArrayRef(branch));
  return shapes;
}

std::vector<std::vector<int64_t>> check(const BlockTensors& block, const BlockSpec& spec, at::ArrayRef<double> eps) {
  TORCH_CHECK_VALUE(
      eps.size() == spec.convs.size(), "the spec has ", spec.convs.size(), " convolutions, got ", eps.size(), " eps");
  const auto shapes = check_convolutions(block.x, block.weights, block.biases, spec);
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto conv = static_cast<int64_t>(i);
    const int64_t channels = spec.pre_activation ? block.weights[i].size(1) * spec.convs[i].groups : shapes[i][1];
    check_vector("norm_weight", block.norm_weights[i], channels, conv);
    check_vector("norm_bias", block.norm_biases[i], channels, conv);
    check_vector("running_mean", block.running_means[i], channels, conv);
    check_vector("running_var", block.running_vars[i], channels, conv);
    TORCH_CHECK_VALUE(
        spec.convs[i].norm != Norm::running || (block.running_means[i] && block.running_vars[i]), "convolution ", i,
        " normalises with running statistics and has none");
  }
  const int64_t width = shapes[spec.stages - 1][1];
  check_scale("branch_scale", block.branch_scale, width);
  check_scale("skip_scale", block.skip_scale, width);
  return shapes;
}

BlockTensors block_tensors(
    const at::Tensor& x, const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    at::TensorList weights, const OptionalList& biases, const OptionalList& norm_weights,
    const OptionalList& norm_biases, const OptionalList& running_means, const OptionalList& running_vars) {
  BlockTensors block{
      x,
      branch_scale,
      skip_scale,
      weights.vec(),
      to_vector(biases),
      to_vector(norm_weights),
      to_vector(norm_biases),
      to_vector(running_means),
      to_vector(running_vars)};
  for (const auto* list : {&block.norm_weights, &block.norm_biases, &block.running_means, &block.running_vars})
    TORCH_CHECK_VALUE(list->size() == block.weights.size(), "every list of tensors needs one entry a convolution");
  return block;
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> residual_block_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    at::TensorList weights, const OptionalList& biases, const OptionalList& norm_weights,
    const OptionalList& norm_biases, const OptionalList& running_means, const OptionalList& running_vars,
    at::IntArrayRef ints, at::ArrayRef<double> eps) {
  const auto spec = BlockSpec::decode(ints, eps);
  const auto block = block_tensors(
      x, branch_scale, skip_scale, weights, biases, norm_weights, norm_biases, running_means, running_vars);
  check(block, spec, eps);
  auto result = cpu::residual_block_forward(block, spec);
  return {result.out, result.conv_outputs, result.batch_stats};
}

std::vector<at::Tensor> residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, at::TensorList conv_outputs,
    at::TensorList batch_stats, const at::Tensor& x, const std::optional<at::Tensor>& branch_scale,
    const std::optional<at::Tensor>& skip_scale, at::TensorList weights, const OptionalList& biases,
    const OptionalList& norm_weights, const OptionalList& norm_biases, const OptionalList& running_means,
    const OptionalList& running_vars, const c10::List<bool>& needs, at::IntArrayRef ints, at::ArrayRef<double> eps) {
  const auto spec = BlockSpec::decode(ints, eps);
  const auto block = block_tensors(
      x, branch_scale, skip_scale, weights, biases, norm_weights, norm_biases, running_means, running_vars);
  const auto shapes = check(block, spec, eps);
  const at::IntArrayRef shape = shapes[spec.stages - 1];
  TORCH_CHECK_VALUE(dout.sizes() == shape, "dout must be ", shape, ", got ", dout.sizes());
  TORCH_CHECK_TYPE(dout.scalar_type() == x.scalar_type(), "dout is ", dout.scalar_type(), ", x is ", x.scalar_type());
  const bool masked = spec.last().relu && !spec.pre_activation && spec.skip != Skip::none;
  TORCH_CHECK_VALUE(
      !masked || (out && out->sizes() == shape && out->scalar_type() == x.scalar_type()),
      "backward needs the block's output ", shape);
  TORCH_CHECK_VALUE(
      needs.size() == 3 + 6 * spec.convs.size(), "needs must have ", 3 + 6 * spec.convs.size(), " flags, got ",
      needs.size());
  size_t saved = 0, stats = 0;
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    if (spec.saves(static_cast<int64_t>(i), branch_scale.has_value(), skip_scale.has_value())) {
      TORCH_CHECK_VALUE(
          saved < conv_outputs.size() && conv_outputs[saved].sizes() == at::IntArrayRef(shapes[i]) &&
              conv_outputs[saved].is_contiguous(at::MemoryFormat::ChannelsLast),
          "the output of convolution ", i, " must be saved as forward returned it");
      ++saved;
    }
    if (spec.convs[i].norm == Norm::batch) {
      const int64_t channels = spec.pre_activation ? weights[i].size(1) * spec.convs[i].groups : shapes[i][1];
      TORCH_CHECK_VALUE(
          stats < batch_stats.size() && batch_stats[stats].sizes() == at::IntArrayRef({2, channels}),
          "the batch statistics of convolution ", i, " must be [2, ", channels, "]");
      ++stats;
    }
  }
  return cpu::residual_block_backward(
      dout, out, conv_outputs.vec(), batch_stats.vec(), block, cpu::Needs({needs.begin(), needs.end()}), spec);
}

at::Tensor residual_block_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    at::TensorList weights, const OptionalList& biases, const std::optional<at::Tensor>& skip_scale,
    at::IntArrayRef ints) {
  const auto spec = BlockSpec::decode(ints, {});
  const auto shapes = check_convolutions(x, weights, to_vector(biases), spec);
  check_vector("pre_scale", pre_scale, x.size(1), 0);
  check_vector("pre_shift", pre_shift, x.size(1), 0);
  TORCH_CHECK_VALUE(pre_scale.has_value() == pre_shift.has_value(), "pre_scale and pre_shift come together");
  check_scale("skip_scale", skip_scale, shapes[spec.stages - 1][1]);
  return cpu::residual_block_infer(x, pre_scale, pre_shift, weights.vec(), to_vector(biases), skip_scale, spec);
}

cpu::Window window(int64_t kernel, int64_t stride, int64_t padding) {
  TORCH_CHECK_VALUE(
      kernel >= 1 && kernel <= 15 && stride >= 1 && padding >= 0 && 2 * padding <= kernel,
      "unsupported pooling window: kernel ", kernel, ", stride ", stride, ", padding ", padding);
  return {kernel, stride, padding};
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  const auto win = window(kernel, stride, padding);
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.numel() > 0 && std::min(x.size(2), x.size(3)) + 2 * padding >= kernel,
      "x must be [N, C, H, W] and hold a window, got ", x.sizes());
  return cpu::max_pool2d(x, win);
}

at::Tensor max_pool2d_backward(
    const at::Tensor& dout, const at::Tensor& positions, int64_t height, int64_t width, int64_t kernel, int64_t stride,
    int64_t padding) {
  const auto win = window(kernel, stride, padding);
  TORCH_CHECK_VALUE(
      dout.dim() == 4 && positions.sizes() == dout.sizes() && positions.scalar_type() == at::kByte &&
          positions.is_contiguous(at::MemoryFormat::ChannelsLast),
      "positions must be as max_pool2d returned them for dout ", dout.sizes());
  for (int64_t d = 0; d < 2; ++d)
    TORCH_CHECK_VALUE(
        ((d ? width : height) + 2 * padding - kernel) / stride + 1 == dout.size(2 + d), "dout ", dout.sizes(),
        " is not the pooling of ", height, "x", width);
  return cpu::max_pool2d_backward(dout, positions, height, width, win);
}

}  // namespace

constexpr auto kForward =
    "(Tensor x, Tensor? branch_scale, Tensor? skip_scale, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, "
    "Tensor?[] norm_biases, Tensor?[] running_means, Tensor?[] running_vars, int[] spec, float[] eps) "
    "-> (Tensor out, Tensor[] conv_outputs, Tensor[] batch_stats)";
constexpr auto kBackward =
    "(Tensor dout, Tensor? out, Tensor[] conv_outputs, Tensor[] batch_stats, Tensor x, Tensor? branch_scale, "
    "Tensor? skip_scale, Tensor[] weights, Tensor?[] biases, Tensor?[] norm_weights, Tensor?[] norm_biases, "
    "Tensor?[] running_means, Tensor?[] running_vars, bool[] needs, int[] spec, float[] eps) -> Tensor[] grads";
constexpr auto kInfer =
    "(Tensor x, Tensor? pre_scale, Tensor? pre_shift, Tensor[] weights, Tensor?[] biases, Tensor? skip_scale, "
    "int[] spec) -> Tensor out";

TORCH_LIBRARY(resnet_fused, m) {
  // The overload names the kernels: csrc's, or those that resnet_fused/backends/triton.py registers.
  for (const std::string overload : {"", ".triton"}) {
    m.def(("residual_block_forward" + overload + kForward).c_str());
    m.def(("residual_block_backward" + overload + kBackward).c_str());
    m.def(("residual_block_infer" + overload + kInfer).c_str());
  }
  m.def("max_pool2d(Tensor x, int kernel_size, int stride, int padding) -> (Tensor out, Tensor positions)");
  m.def(
      "max_pool2d_backward(Tensor dout, Tensor positions, int height, int width, int kernel_size, int stride, int "
      "padding) "
      "-> Tensor dx");
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("residual_block_forward", &residual_block_forward);
  m.impl("residual_block_backward", &residual_block_backward);
  m.impl("residual_block_infer", &residual_block_infer);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
}

// Packed weights (resnet_fused/backends/folding.py) carry this key.
TORCH_LIBRARY_IMPL(resnet_fused, MkldnnCPU, m) { m.impl("residual_block_infer", &residual_block_infer); }

}  // namespace resnet_fused
