// What forward and backward of a block on the CPU share: its tensors as the passes take them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cmath>
#include <type_traits>

#include "../block/kernel_layout.h"
#include "../block/spec.h"
#include "../block/tensors.h"
#include "convolution.h"
#include "engine/training.h"
#include "passes.h"

namespace resnet_fused::cpu {

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "residual_block", __VA_ARGS__)

// Whether the engine has products of this type.
template <class S>
constexpr bool kEngine = std::is_same_v<S, float> || std::is_same_v<S, c10::BFloat16>;

// A scale as one value for each channel; absent: 1.
template <class A>
std::vector<A> scale_vector(const std::optional<at::Tensor>& scale, int64_t channels) {
  if (!scale) return std::vector<A>(channels, A(1));
  auto values = to_vector<A>(*scale);
  return values.size() == 1 ? std::vector<A>(channels, values[0]) : values;
}

// The views of one block for scalar type S.
template <class S>
class Block {
 public:
  using A = acc_t<S>;

  Block(const BlockTensors& tensors, const BlockSpec& spec)
      : tensors(tensors),
        spec(spec),
        x(tensors.x.contiguous(kLayout)),
        norms(spec.convs.size()),
        y(spec.convs.size()) {}

  const BlockTensors& tensors;
  const BlockSpec& spec;
  at::Tensor x;
  std::vector<NormVectors<A>> norms;  // by the stage that owns them
  std::vector<at::Tensor> y;          // of each convolution

  int64_t width(int64_t conv) const { return tensors.weights[conv].size(0); }
  // What a convolution's input is made of: x, or the output of the convolution before it.
  const at::Tensor& input(int64_t conv) const { return spec.from_x(conv) ? x : y[conv - 1]; }
  int64_t norm_channels(int64_t stage) const {
    return spec.order == Order::pre ? tensors.weights[stage].size(1) * spec.convs[stage].groups : width(stage);
  }

  at::Tensor conv(int64_t i, const at::Tensor& p) const {
    return convolution(p, tensors.weights[i], tensors.biases[i], spec.convs[i]);
  }

  // y_i, and its statistics where they are asked for and whoever convolves gathers them. made: P_i, where it is needed,
  // kept for another convolution that reads it.
  at::Tensor convolved(int64_t i, at::Tensor* statistics, at::Tensor* made) const {
    if constexpr (kEngine<S>) {
      const auto& from = input(i);
      if (from.numel() > 0 && engine::convolves(tensors.weights[i], spec.convs[i], from.scalar_type())) {
        const auto act = input_act(i);
        auto found = engine::convolve<element_t<S>>(
            operand(i, act), engine::batch_of(from), tensors.weights[i], tensors.biases[i], spec.convs[i],
            statistics != nullptr);
        if (statistics) *statistics = found.statistics;
        if (found.y.defined()) return found.y;
      }
    }
    at::Tensor p = made ? *made : at::Tensor();
    if (!p.defined()) p = conv_input(i);
    if (made) *made = p;
    return conv(i, p);
  }

  ActVectors<A> act(int64_t stage) const {
    return act_vectors<A>(spec.convs[stage].act, tensors.slopes[stage], norm_channels(stage));
  }

  // P_i, recomputed wherever it is needed and never saved.
  at::Tensor conv_input(int64_t i) const {
    const int64_t stage = spec.convs[i].input_stage;
    if (stage == kNone || !spec.convs[stage].processes()) return input(i);
    return normalize<S>(input(i), norms[stage], act(stage));
  }

  // The same where it is read; `act` is that of the input stage, and outlives it.
  engine::Operand<element_t<S>> operand(int64_t i, const ActVectors<A>& act) const {
    const auto* pixels = reinterpret_cast<const element_t<S>*>(input(i).template const_data_ptr<S>());
    const int64_t stage = spec.convs[i].input_stage, channels = input(i).size(1);
    if (stage == kNone || !spec.convs[stage].processes()) return {pixels, channels};
    return {{pixels, norms[stage].affine(), nullptr, {}, act.pointers(), nullptr}, channels};
  }
  ActVectors<A> input_act(int64_t i) const {
    const int64_t stage = spec.convs[i].input_stage;
    return stage == kNone ? ActVectors<A>() : act(stage);
  }

  // Fills norms[stage] from batch statistics [2, C] or the running ones.
  void set_norm(int64_t stage, const at::Tensor& batch_stats) {
    auto& norm = norms[stage];
    const int64_t channels = norm_channels(stage);
    norm = NormVectors<A>(channels);
    if (!spec.convs[stage].normalizes()) return;
    std::vector<A> var;
    if (spec.uses_batch(stage)) {
      const auto both = to_vector<A>(batch_stats);
      norm.center.assign(both.begin(), both.begin() + channels);
      var.assign(both.begin() + channels, both.end());
    } else {
      norm.center = to_vector<A>(*tensors.running_means[stage]);
      var = to_vector<A>(*tensors.running_vars[stage]);
    }
    const auto gamma = scale_vector<A>(tensors.norm_weights[stage], channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double inverse_std = 1.0 / std::sqrt(static_cast<double>(var[c]) + spec.convs[stage].eps);
      norm.inverse_std[c] = static_cast<A>(inverse_std);
      norm.scale[c] = static_cast<A>(inverse_std * gamma[c]);
    }
    if (tensors.norm_biases[stage]) norm.shift = to_vector<A>(*tensors.norm_biases[stage]);
  }

  // The norm that reads the output of the last convolution or the projection at the join, if there is one.
  NormVectors<A> join_norm(int64_t conv) const {
    const int64_t norm = spec.output_norm(conv);
    return norm == kNone ? NormVectors<A>(width(conv)) : norms[norm];
  }
};

// (y - center) scale + shift, times factor
template <class A>
NormVectors<A> scaled(NormVectors<A> norm, const std::vector<A>& factor) {
  for (size_t c = 0; c < factor.size(); ++c) {
    norm.scale[c] *= factor[c];
    norm.shift[c] *= factor[c];
  }
  return norm;
}

// act(branch_scale norm_n(y_n) + skip_scale S), or branch_scale act(norm_n(y_n)) + skip_scale S: what `normalize` and
// the derivative of its activation are given.
template <class S>
struct Join {
  using A = acc_t<S>;

  explicit Join(const Block<S>& block)
      : alpha(scale_vector<A>(block.tensors.branch_scale, block.width(block.spec.last()))),
        sigma(scale_vector<A>(block.tensors.skip_scale, block.width(block.spec.last()))),
        norm(block.join_norm(block.spec.last())),
        act(block.spec.order == Order::pre ? ActVectors<A>() : block.act(block.spec.last())) {
    const BlockSpec& spec = block.spec;
    if (spec.join == JoinReads::branch) {
      act.branch_scale = alpha;
      if (act.slope.empty()) act.slope.assign(alpha.size(), A(0));
    } else {
      norm = scaled(std::move(norm), alpha);
    }
    if (spec.has_projection()) {
      skip_norm = scaled(block.join_norm(spec.projection()), sigma);
      residual = {block.y[spec.projection()], &skip_norm};
    } else if (spec.skip == Skip::identity) {
      residual = {block.x, nullptr, sigma};
    }
  }
  Join(const Join&) = delete;

  std::vector<A> alpha, sigma;
  NormVectors<A> norm, skip_norm;
  ActVectors<A> act;
  ResidualInput<A> residual;
};

}  // namespace resnet_fused::cpu
