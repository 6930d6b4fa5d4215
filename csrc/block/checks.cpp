#include "checks.h"

#include <ATen/ATen.h>

namespace resnet_fused {
namespace {

void check_vector(const char* name, const std::optional<at::Tensor>& t, int64_t channels, int64_t conv) {
  TORCH_CHECK_VALUE(
      !t || (t->dim() == 1 && t->size(0) == channels), name, " of convolution ", conv, " must be [", channels,
      "], got ", t->sizes());
}

void check_device(const char* name, const std::optional<at::Tensor>& t, const at::Tensor& x, int64_t conv) {
  TORCH_CHECK_VALUE(
      !t || t->device() == x.device(), "x is on ", x.device(), ", ", name, " of convolution ", conv, " on ",
      t->device());
}

void check_slope(
    const std::optional<at::Tensor>& slope, const at::Tensor& x, const Stage& stage, int64_t channels, int64_t conv) {
  TORCH_CHECK_VALUE(
      slope.has_value() == stage.act.is(ActivationKind::prelu), "convolution ", conv,
      " needs a slope exactly where its activation is prelu");
  check_device("slope", slope, x, conv);
  TORCH_CHECK_VALUE(
      !slope || (slope->dim() == 1 && (slope->numel() == 1 || slope->numel() == channels)), "the slope of convolution ",
      conv, " must be [1] or [", channels, "], got ", slope->sizes());
}

void check_scale(const char* name, const std::optional<at::Tensor>& t, int64_t channels) {
  TORCH_CHECK_VALUE(
      !t || t->numel() == 1 || t->numel() == channels, name, " must hold 1 value or ", channels, ", got ", t->sizes());
}

}  // namespace

std::vector<Shape> check_convolutions(
    const at::Tensor& x, at::TensorList weights, const OptionalTensors& biases, const BlockSpec& spec) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x must be a non-empty [N, C, H, W], got ", x.sizes());
  TORCH_CHECK_VALUE(
      weights.size() == spec.convs.size() && biases.size() == spec.convs.size(), "the spec has ", spec.convs.size(),
      " convolutions, got ", weights.size(), " weights and ", biases.size(), " biases");
  std::vector<Shape> shapes;
  auto source = x.sizes().vec();
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto& stage = spec.convs[i];
    const auto& w = weights[i];
    const auto in = static_cast<int64_t>(i) == spec.projection() ? x.sizes().vec() : source;
    TORCH_CHECK_TYPE(
        w.scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), ", weight ", i, " is ", w.scalar_type());
    TORCH_CHECK_VALUE(
        w.dim() == 4 && w.size(1) * stage.groups == in[1] && w.size(0) % stage.groups == 0, "convolution ", i,
        " receives ", in[1], " channels in ", stage.groups, " groups, its weight is ", w.sizes());
    const auto conv = static_cast<int64_t>(i);
    check_device("weight", w, x, conv);
    check_device("bias", biases[i], x, conv);
    check_vector("bias", biases[i], w.size(0), conv);
    std::vector<int64_t> shape{x.size(0), w.size(0)};
    for (int64_t d = 0; d < 2; ++d) {
      const int64_t extent = stage.dilation[d] * (w.size(2 + d) - 1) + 1, padded = in[2 + d] + 2 * stage.padding[d];
      TORCH_CHECK_VALUE(
          padded >= extent, "the kernel of convolution ", i, " does not fit its input ", at::IntArrayRef(in));
      const int64_t most = in[2 + d] - (stage.padding_mode == PaddingMode::reflect);
      TORCH_CHECK_VALUE(
          stage.padding_mode == PaddingMode::zeros || stage.padding_mode == PaddingMode::replicate ||
              stage.padding[d] <= most,
          "convolution ", i, " pads an input ", at::IntArrayRef(in), " by ", stage.padding[d],
          " of its own values; at most ", most);
      shape.push_back((padded - extent) / stage.stride[d] + 1);
    }
    shapes.push_back(shape);
    source = shape;
  }
  const auto& branch = shapes[spec.last()];
  const auto skip = spec.skip == Skip::none ? branch : spec.has_projection() ? shapes.back() : x.sizes().vec();
  TORCH_CHECK_VALUE(
      skip == branch, "the skip path gives ", at::IntArrayRef(skip), ", the branch ", at::IntArrayRef(branch));
  return shapes;
}

std::vector<Shape> check_block(const BlockTensors& block, const BlockSpec& spec) {
  const auto shapes = check_convolutions(block.x, block.weights, block.biases, spec);
  const auto check_stage = [&](int64_t stage, int64_t channels) {
    if (stage == kNone) return;
    for (const auto& vector :
         {block.norm_weights[stage], block.norm_biases[stage], block.running_means[stage], block.running_vars[stage]})
      check_device("a norm tensor", vector, block.x, stage);
    check_vector("norm_weight", block.norm_weights[stage], channels, stage);
    check_vector("norm_bias", block.norm_biases[stage], channels, stage);
    check_vector("running_mean", block.running_means[stage], channels, stage);
    check_vector("running_var", block.running_vars[stage], channels, stage);
    check_slope(block.slopes[stage], block.x, spec.convs[stage], channels, stage);
    TORCH_CHECK_VALUE(
        spec.convs[stage].statistics != Statistics::running ||
            (block.running_means[stage] && block.running_vars[stage]),
        "convolution ", stage, " normalises with running statistics and has none");
  };
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    check_stage(spec.convs[i].input_stage, block.weights[i].size(1) * spec.convs[i].groups);
    check_stage(spec.convs[i].output_stage, shapes[i][1]);
  }
  const int64_t width = shapes[spec.last()][1];
  for (const auto& scale : {block.branch_scale, block.skip_scale})
    TORCH_CHECK_VALUE(
        !scale || scale->device() == block.x.device(), "x is on ", block.x.device(), ", a scale on ", scale->device());
  check_scale("branch_scale", block.branch_scale, width);
  check_scale("skip_scale", block.skip_scale, width);
  return shapes;
}

Needs check_needs(const std::vector<bool>& flags, std::optional<at::ScalarType> master, const BlockSpec& spec) {
  TORCH_CHECK_TYPE(
      !master || at::isFloatingType(*master), "gradients of weights are asked for in ", *master,
      "; accepted: a floating-point dtype");
  Needs needs(spec.convs.size());
  needs.master = master;
  const auto places = needs.flat();
  TORCH_CHECK_VALUE(
      flags.size() == places.size(), "needs must have ", places.size(), " flags for ", spec.convs.size(),
      " convolutions, got ", flags.size());
  for (size_t i = 0; i < flags.size(); ++i) *places[i] = flags[i];
  return needs;
}

void check_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const BlockSpec& spec,
    const std::vector<Shape>& shapes) {
  const auto& x = block.x;
  const at::IntArrayRef shape = shapes[spec.last()];
  TORCH_CHECK_VALUE(dout.sizes() == shape, "dout must be ", shape, ", got ", dout.sizes());
  TORCH_CHECK_VALUE(
      dout.device() == x.device() && (!out || out->device() == x.device()), "x is on ", x.device(), ", dout on ",
      dout.device(), "; dout and out must be there, too");
  TORCH_CHECK_TYPE(dout.scalar_type() == x.scalar_type(), "dout is ", dout.scalar_type(), ", x is ", x.scalar_type());
  TORCH_CHECK_VALUE(
      spec.join != JoinReads::output || (out && out->sizes() == shape && out->scalar_type() == x.scalar_type()),
      "backward needs the block's output ", shape);
  size_t saved = 0, stats = 0;
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    if (spec.convs[i].saved) {
      TORCH_CHECK_VALUE(
          saved < conv_outputs.size() && conv_outputs[saved].sizes() == at::IntArrayRef(shapes[i]) &&
              conv_outputs[saved].scalar_type() == x.scalar_type() && conv_outputs[saved].device() == x.device(),
          "the output of convolution ", i, " must be saved as forward, given the same needs, returned it");
      ++saved;
    }
    if (spec.uses_batch(static_cast<int64_t>(i))) {
      const int64_t channels =
          spec.order == Order::pre ? block.weights[i].size(1) * spec.convs[i].groups : shapes[i][1];
      TORCH_CHECK_VALUE(
          stats < batch_stats.size() && batch_stats[stats].sizes() == at::IntArrayRef({2, channels}) &&
              batch_stats[stats].scalar_type() == (x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) &&
              batch_stats[stats].device() == x.device(),
          "the batch statistics of convolution ", i, " must be [2, ", channels, "] as forward returned them");
      ++stats;
    }
  }
  TORCH_CHECK_VALUE(
      saved == conv_outputs.size() && stats == batch_stats.size(), "backward takes ", saved,
      " convolution outputs and ", stats, " batch statistics, as forward, given the same needs, returned them; got ",
      conv_outputs.size(), " and ", batch_stats.size());
}

void check_residual(
    const std::optional<at::Tensor>& residual, const at::Tensor& x, const BlockSpec& spec,
    const std::vector<Shape>& shapes) {
  if (!residual) return;
  const at::IntArrayRef shape = shapes[spec.last()];
  TORCH_CHECK_VALUE(spec.skip == Skip::none, "a residual takes the place of a skip path, and the block has one");
  TORCH_CHECK_VALUE(
      residual->sizes() == shape && residual->device() == x.device(), "residual must be ", shape, " on ", x.device(),
      ", got ", residual->sizes(), " on ", residual->device());
  TORCH_CHECK_TYPE(
      residual->scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), ", residual is ", residual->scalar_type());
}

void check_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    const OptionalTensors& slopes, const BlockSpec& spec, const std::vector<Shape>& shapes) {
  for (const auto& t : {pre_scale, pre_shift, branch_scale, skip_scale})
    TORCH_CHECK_VALUE(!t || t->device() == x.device(), "x is on ", x.device(), ", a scale or shift on ", t->device());
  check_vector("pre_scale", pre_scale, x.size(1), 0);
  check_vector("pre_shift", pre_shift, x.size(1), 0);
  TORCH_CHECK_VALUE(pre_scale.has_value() == pre_shift.has_value(), "pre_scale and pre_shift come together");
  check_scale("branch_scale", branch_scale, shapes[spec.last()][1]);
  check_scale("skip_scale", skip_scale, shapes[spec.last()][1]);
  TORCH_CHECK_VALUE(
      slopes.size() == spec.convs.size(), "the spec has ", spec.convs.size(), " convolutions, got ", slopes.size(),
      " slopes");
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto conv = static_cast<int64_t>(i);
    const int64_t channels = spec.order != Order::pre ? shapes[i][1] : conv == 0 ? x.size(1) : shapes[i - 1][1];
    check_slope(slopes[i], x, spec.convs[i], channels, conv);
  }
}

}  // namespace resnet_fused
