#include "convolution.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/strides.h>

#include "../block/kernel_layout.h"
#include "depthwise.h"
#include "isa.h"

namespace resnet_fused::cpu {
namespace {

using Bias = std::optional<at::Tensor>;
using ScalarList = c10::List<std::optional<at::Scalar>>;

// The operators that torch.compile uses on the CPU; they have no C++ declaration, only a schema.
template <class Signature>
auto mkldnn_op(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

bool supported(const char* query) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(query, "").typed<bool()>().call();
}

// A pointwise convolution is a matrix product over pixels, and channels_last activations are its matrices already.
bool is_matrix_product(const at::Tensor& weight, const Stage& stage) {
  return weight.size(2) == 1 && weight.size(3) == 1 && stage.groups == 1 && stage.stride[0] == 1 &&
         stage.stride[1] == 1 && stage.padding[0] == 0 && stage.padding[1] == 0;
}

// [N, C, H, W] in channels_last as [N * H * W, C], the same memory.
at::Tensor as_rows(const at::Tensor& t) {
  const int64_t channels = t.size(1);
  return t.as_strided({t.numel() / channels, channels}, {channels, 1});
}

// A convolution that computes the same as another one.
struct Given {
  at::Tensor p;
  Stage stage;
};

Stage without_padding(Stage stage) {
  stage.padding = {0, 0};
  stage.padding_mode = PaddingMode::zeros;
  return stage;
}

// p, channels_last, with its border written out where that holds values of p, as F.pad does for nn.Conv2d.
Given padded(const at::Tensor& p, const Stage& stage) {
  if (!stage.pads_values()) return {p, stage};
  const auto [h, w] = stage.padding;
  at::Tensor out;
  if (stage.padding_mode == PaddingMode::circular)  // which makes NCHW of anything: as a picture of N x H x W voxels
    out = at::_pad_circular(p.permute({0, 2, 3, 1}).unsqueeze(0), {0, 0, w, w, h, h}).squeeze(0).permute({0, 3, 1, 2});
  else if (stage.padding_mode == PaddingMode::reflect)
    out = at::reflection_pad2d(p, {w, w, h, h});
  else
    out = at::replication_pad2d(p, {w, w, h, h});
  return {out.contiguous(kLayout), without_padding(stage)};
}

// The adjoint of `padded`: the gradient of every value of the border is added to that of the pixel it was copied from.
// dp is overwritten; p gives the shape and is not read.
at::Tensor unpadded(const at::Tensor& dp, const at::Tensor& p, const Stage& stage) {
  const auto [h, w] = stage.padding;
  if (stage.padding_mode == PaddingMode::reflect)
    return at::reflection_pad2d_backward(dp, p, {w, w, h, h}).contiguous(kLayout);
  if (stage.padding_mode == PaddingMode::replicate)
    return at::replication_pad2d_backward(dp, p, {w, w, h, h}).contiguous(kLayout);
  at::Tensor inner = dp;
  for (int64_t d = 0; d < 2; ++d) {
    const int64_t size = p.size(2 + d), pad = stage.padding[d];
    const auto lower = inner.narrow(2 + d, 0, pad), upper = inner.narrow(2 + d, pad + size, pad);
    inner = inner.narrow(2 + d, pad, size);
    inner.narrow(2 + d, size - pad, pad).add_(lower);
    inner.narrow(2 + d, 0, pad).add_(upper);
  }
  return inner.contiguous(kLayout);
}

// A convolution that computes the same, avoids oneDNN 3.12's faults, which plain PyTorch has as well, and has padding
// that holds values of p written out.
Given sound(const at::Tensor& given_p, const at::Tensor& weight, const Stage& given) {
  auto [p, stage] = padded(given_p, given);
  // The dilation of a single tap means nothing, but it makes bfloat16 read out of bounds.
  for (int64_t d = 0; d < 2; ++d)
    if (weight.size(2 + d) == 1) stage.dilation[d] = 1;
  // Where the stride reaches beyond a row, or a row gives one value, oneDNN reads uninitialised memory: in the forward
  // convolution with one channel per group and in bfloat16's weight gradient. With its padding written out, and cut to
  // its only window, a row holds everything that is read.
  const int64_t width = p.size(3), pad = stage.padding[1], step = stage.stride[1];
  const int64_t extent = stage.dilation[1] * (weight.size(3) - 1) + 1, padded = width + 2 * pad;
  const bool single = padded - extent < step;
  if (step == 1 || (width >= step && !single)) return {p, stage};
  stage.padding[1] = 0;
  if (single) stage.stride[1] = 1;
  const int64_t right = (single ? extent : padded) - width - pad;
  if (pad == 0 && right == 0) return {p, stage};
  return {at::constant_pad_nd(p, {pad, right}).contiguous(kLayout), stage};
}

// oneDNN 3.12's weight gradient of a strided 1x1 convolution writes out of bounds (float and bfloat16, two threads,
// channels_last; plain PyTorch crashes with it too), unless strides are equal and channels are multiples of 16.
// Dropping the pixels that the stride skips leaves stride 1.
Given without_stride(const Given& given, const at::Tensor& weight) {
  const auto& [p, stage] = given;
  const bool unit_stride = stage.stride[0] == 1 && stage.stride[1] == 1;
  const bool blocked = weight.size(1) % 16 == 0 && weight.size(0) / stage.groups % 16 == 0;
  if (weight.size(2) != 1 || weight.size(3) != 1 || unit_stride || (blocked && stage.stride[0] == stage.stride[1]))
    return given;
  Stage unit = stage;
  const auto padded = at::constant_pad_nd(p, {stage.padding[1], stage.padding[1], stage.padding[0], stage.padding[0]});
  unit.stride = {1, 1};
  unit.padding = {0, 0};
  return {
      padded.slice(2, 0, std::nullopt, stage.stride[0]).slice(3, 0, std::nullopt, stage.stride[1]).contiguous(kLayout),
      unit};
}

// Without oneDNN, which has no float64, PyTorch convolves few channels 2 to 3 times faster in NCHW (1 x 258 x 258
// pixels, 1 and 2 channels, torch 2.13). Of one channel that is the same memory, and only its strides have to say so.
at::Tensor in_faster_layout(const at::Tensor& p) {
  constexpr int64_t few = 4;
  if (p.scalar_type() != at::kDouble || p.size(1) > few) return p;
  const auto planes = p.contiguous();
  return planes.as_strided(planes.sizes(), c10::contiguous_strides(planes.sizes()));
}

bool is_small_product(const at::Tensor& p, const at::Tensor& weight, const Stage& stage) {
  return !weight.is_mkldnn() && is_matrix_product(weight, stage) && p.numel() <= kFewPixels * p.size(1);
}

// With few pixels, float's weight gradient is slower as a matrix product once the weight outgrows the cache.
bool is_small_weight_product(const at::Tensor& p, const at::Tensor& weight, const Stage& stage) {
  return is_small_product(p, weight, stage) && (p.element_size() == 2 || weight.numel() <= 1 << 16);
}

at::Tensor wide(const at::Tensor& t) { return t.to(at::kFloat); }

at::Tensor as_matrix(const at::Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1)}); }

at::Tensor product(const at::Tensor& p, const at::Tensor& weight, const Bias& bias) {
  auto y = at::empty({p.size(0), weight.size(0), p.size(2), p.size(3)}, p.options().memory_format(kLayout));
  auto rows = as_rows(y);
  const auto transposed = as_matrix(weight).t();
  if (bias)
    at::addmm_out(rows, *bias, as_rows(p), transposed);
  else
    at::mm_out(rows, as_rows(p), transposed);
  return y;
}

// An activation as mkldnn::_convolution_pointwise takes it.
struct PostOp {
  std::string_view name;
  ScalarList scalars = ScalarList();
  std::optional<std::string_view> algorithm = std::nullopt;
};

std::optional<PostOp> post_op(const Activation& act) {
  switch (act.kind) {
    case ActivationKind::identity:
      return PostOp{"none"};
    case ActivationKind::relu:
      return PostOp{"relu"};
    case ActivationKind::relu6:
      return PostOp{"hardtanh", ScalarList({at::Scalar(0.0), at::Scalar(6.0)})};
    case ActivationKind::silu:
      return PostOp{"swish"};
    case ActivationKind::hardswish:
      return PostOp{"hardswish"};
    default:
      return std::nullopt;
  }
}

}  // namespace

at::Tensor convolution(const at::Tensor& given_p, const at::Tensor& weight, const Bias& bias, const Stage& given) {
  if (widens(given_p.scalar_type())) {
    const Bias wide_bias = bias ? Bias(wide(*bias)) : Bias();
    return convolution(wide(given_p), wide(weight), wide_bias, given).to(given_p.scalar_type());
  }
  const auto [p, stage] = sound(given_p, weight, given);
  // wider types gain nothing: PyTorch does not give their few pixels to oneDNN
  if (p.element_size() == 2 && is_small_product(p, weight, stage)) return product(p, weight, bias);
  return at::convolution(
             in_faster_layout(p), weight, bias, stage.stride, stage.padding, stage.dilation, false, {0, 0},
             stage.groups)
      .contiguous(kLayout);
}

at::Tensor convolution_backward_data(
    const at::Tensor& dy, const at::Tensor& like_p, const at::Tensor& weight, const Stage& stage) {
  if (has_faster_backward_data(weight, stage))
    if (auto dp = depthwise_backward_data(dy, like_p, weight, stage); dp.defined()) return dp;
  if (widens(dy.scalar_type())) {
    const auto like = at::empty(like_p.sizes(), like_p.options().dtype(at::kFloat).memory_format(kLayout));
    return convolution_backward_data(wide(dy), like, wide(weight), stage).to(dy.scalar_type());
  }
  if (is_small_product(like_p, weight, stage)) {
    auto dp = at::empty(like_p.sizes(), like_p.options().memory_format(kLayout));
    auto rows = as_rows(dp);
    at::mm_out(rows, as_rows(dy), as_matrix(weight));
    return dp;
  }
  if (stage.pads_values()) {
    const auto inner = like_p.sizes();
    const auto like = at::empty(
        {inner[0], inner[1], inner[2] + 2 * stage.padding[0], inner[3] + 2 * stage.padding[1]},
        like_p.options().memory_format(kLayout));
    return unpadded(convolution_backward_data(dy, like, weight, without_padding(stage)), like_p, stage);
  }
  auto [dp, dw, db] = at::convolution_backward(
      dy, like_p, weight, std::nullopt, stage.stride, stage.padding, stage.dilation, false, {0, 0}, stage.groups,
      {true, false, false});
  return dp.contiguous(kLayout);
}

bool accumulates_backward_data(const at::Tensor& weight, const Stage& stage) {
  return is_matrix_product(weight, stage);
}

void accumulate_backward_data(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& accumulated) {
  if (!widens(dy.scalar_type())) {
    as_rows(accumulated).addmm_(as_rows(dy), as_matrix(weight));
    return;
  }
  auto product = at::empty(accumulated.sizes(), accumulated.options().dtype(at::kFloat).memory_format(kLayout));
  auto rows = as_rows(product);
  at::mm_out(rows, as_rows(wide(dy)), as_matrix(wide(weight)));  // at::mm is autocast's to narrow
  as_rows(accumulated).add_(rows);
}

WeightGradients convolution_backward_weight(
    const at::Tensor& dy, const at::Tensor& p_in, const at::Tensor& weight, const Stage& stage_in, bool needs_weight,
    bool needs_bias) {
  WeightGradients grads;
  if (needs_weight && has_faster_backward_weight(weight, stage_in))
    grads.weight = depthwise_backward_weight(dy, p_in, weight, stage_in);
  if (needs_weight && !grads.weight.defined() && widens(p_in.scalar_type())) {
    const auto of_wide = convolution_backward_weight(wide(dy), wide(p_in), wide(weight), stage_in, true, false);
    grads.weight = of_wide.weight.to(weight.scalar_type());
  } else if (needs_weight && is_small_weight_product(p_in, weight, stage_in)) {
    auto dw = at::empty_like(weight, weight.suggest_memory_format());
    auto matrix = dw.as_strided({weight.size(0), weight.size(1)}, {weight.size(1), 1});
    at::mm_out(matrix, as_rows(dy).t(), as_rows(p_in));
    grads.weight = dw;
  }
  if (needs_weight && !grads.weight.defined()) {
    const auto [p, stage] = without_stride(sound(p_in, weight, stage_in), weight);
    auto result = at::convolution_backward(
        dy, p, weight, std::nullopt, stage.stride, stage.padding, stage.dilation, false, {0, 0}, stage.groups,
        {false, true, false});
    grads.weight = std::get<1>(result).contiguous(weight.suggest_memory_format());
  }
  if (needs_bias) grads.bias = dy.sum(at::IntArrayRef({0, 2, 3}));
  return grads;
}

bool widens(at::ScalarType dtype) { return (dtype == at::kBFloat16 || dtype == at::kHalf) && !has_post_ops(dtype); }

bool has_post_ops(const at::Tensor& x) { return x.numel() > 0 && has_post_ops(x.scalar_type()); }

bool has_post_ops(at::ScalarType dtype) {
  if (!at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool bf16 = supported("mkldnn::_is_mkldnn_bf16_supported");
  static const bool fp16 = supported("mkldnn::_is_mkldnn_fp16_supported");
  switch (dtype) {
    case at::kFloat:
      return true;
    case at::kBFloat16:  // both need AVX-512 there
      return bf16 && vector_isa() >= Isa::avx512;
    case at::kHalf:
      return fp16 && vector_isa() >= Isa::avx512;
    default:
      return false;
  }
}

bool is_post_op(const Activation& act) { return post_op(act).has_value(); }

at::Tensor convolution_act(
    const at::Tensor& given_p, const at::Tensor& weight, const Bias& bias, const Stage& given, const Activation& act) {
  const auto [p, stage] = sound(given_p, weight, given);
  const bool plain = act.is(ActivationKind::identity), relu = act.is(ActivationKind::relu);
  if ((plain || relu) && is_small_product(p, weight, stage)) {
    auto y = product(p, weight, bias);
    return relu ? y.relu_() : y;
  }
  static const auto op = mkldnn_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const Bias&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t,
      std::string_view, ScalarList, std::optional<std::string_view>)>("mkldnn::_convolution_pointwise", "");
  const PostOp unary = post_op(act).value();
  return op
      .call(
          p, weight, bias, stage.padding, stage.stride, stage.dilation, stage.groups, unary.name, unary.scalars,
          unary.algorithm)
      .contiguous(kLayout);
}

at::Tensor convolution_add_act(
    const at::Tensor& given_p, const at::Tensor& weight, const Bias& bias, const Stage& given, const at::Tensor& other,
    bool in_place, bool relu) {
  const auto [p, stage] = sound(given_p, weight, given);
  if (is_small_product(p, weight, stage)) {
    auto y = product(p, weight, bias).add_(other);
    return relu ? y.relu_() : y;
  }
  const auto unary = relu ? std::optional<std::string_view>("relu") : std::nullopt;
  const bool pixel = other.size(2) * other.size(3) == 1;  // torch 2.11's out-of-place form makes no bfloat16 of it
  if (in_place || pixel) {
    static const auto op = mkldnn_op<at::Tensor&(
        at::Tensor&, const at::Tensor&, const at::Tensor&, const Bias&, at::IntArrayRef, at::IntArrayRef,
        at::IntArrayRef, int64_t, std::string_view, std::optional<at::Scalar>, std::optional<std::string_view>,
        ScalarList, std::optional<std::string_view>)>("mkldnn::_convolution_pointwise_", "binary");
    at::Tensor sum = in_place ? other : other.clone(kLayout);
    return op.call(
        sum, p, weight, bias, stage.padding, stage.stride, stage.dilation, stage.groups, "add", at::Scalar(1.0), unary,
        ScalarList(), std::nullopt);
  }
  static const auto op = mkldnn_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const Bias&, at::IntArrayRef, at::IntArrayRef,
      at::IntArrayRef, int64_t, std::string_view, std::optional<at::Scalar>, std::optional<std::string_view>,
      ScalarList, std::optional<std::string_view>)>("mkldnn::_convolution_pointwise", "binary");
  return op
      .call(
          p, other, weight, bias, stage.padding, stage.stride, stage.dilation, stage.groups, "add", at::Scalar(1.0),
          unary, ScalarList(), std::nullopt)
      .contiguous(kLayout);
}

}  // namespace resnet_fused::cpu
