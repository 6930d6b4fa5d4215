// Evaluation: convolutions whose norms are folded into them, with ReLU and sum as oneDNN post-operations.
#include "../block/result_format.h"
#include "block.h"
#include "residual_block.h"

namespace resnet_fused::cpu {
namespace {

template <class S>
at::Tensor infer(const FoldedBlock& block, const BlockSpec& spec) {
  using A = acc_t<S>;
  const auto x = block.x.contiguous(kLayout);
  // oneDNN's ReLU turns NaN into 0, PyTorch's does not. Where there may be a NaN, our own pass applies the activation.
  const bool post_ops = has_post_ops(x), fuses_act = post_ops && all_finite<S>(x);
  const int64_t last = spec.last();
  const auto act_of = [&](int64_t stage, int64_t channels) {
    return stage == kNone ? ActVectors<A>() : act_vectors<A>(spec.convs[stage].act, block.slopes[stage], channels);
  };
  const auto run = [&](int64_t i, const at::Tensor& p, const ActVectors<A>& act) {
    const bool plain = act.act.is(ActivationKind::identity);
    const auto with = [&](const Activation& act) {
      return convolution_act(p, block.weights[i], block.biases[i], spec.convs[i], act);
    };
    if (post_ops && (plain || (fuses_act && is_post_op(act.act)))) return with(act.act);
    const auto y = post_ops ? with({}) : convolution(p, block.weights[i], block.biases[i], spec.convs[i]);
    return plain ? y : normalize<S>(y, NormVectors<A>(y.size(1)), act);
  };
  const auto act_after = [&](int64_t i) { return act_of(spec.convs[i].output_stage, block.weights[i].size(0)); };

  at::Tensor first = x;
  const int64_t leading = spec.convs[0].input_stage;
  if (leading != kNone && (block.pre_scale || !spec.convs[leading].act.is(ActivationKind::identity))) {
    NormVectors<A> norm(x.size(1));
    if (block.pre_scale) {
      norm.scale = to_vector<A>(*block.pre_scale);
      norm.shift = to_vector<A>(*block.pre_shift);
    }
    first = normalize<S>(x, norm, act_of(leading, x.size(1)));
  }
  at::Tensor u = first;
  for (int64_t i = 0; i < last; ++i) u = run(i, u, act_after(i));

  auto act = act_after(last);
  at::Tensor out;
  if (spec.skip == Skip::none && !block.branch_scale && !block.residual) {
    out = run(last, u, act);
  } else {
    const int64_t s = spec.projection();
    at::Tensor skip;
    if (spec.skip == Skip::identity) skip = x;
    if (block.residual) skip = block.residual->contiguous(kLayout);
    const bool relu = act.pointers().is_relu();
    const bool clean = fuses_act && (!block.residual || !relu || all_finite<S>(skip));
    if (spec.has_projection()) skip = run(s, spec.convs[s].input_stage == kNone ? x : first, {});
    // PyTorch has no fused sum of a grouped convolution with a tensor that it must keep; its fallback fails in 16 bits
    const bool fuses_sum = spec.has_projection() || spec.convs[last].groups == 1;
    if (clean && fuses_sum && !block.skip_scale && spec.join != JoinReads::branch && act.pointers().is_plain() &&
        skip.defined()) {
      out = convolution_add_act(
          u, block.weights[last], block.biases[last], spec.convs[last], skip, spec.has_projection(), relu);
    } else {
      const auto y = run(last, u, {});
      // A mere sum is ATen's, which sees rows of pixels where ours sees pixels of few channels: of one channel 8 times
      // faster in float64 (256 x 256 pixels).
      const bool mere_sum = act.act.is(ActivationKind::identity) && !block.branch_scale && !block.skip_scale;
      if (mere_sum && skip.defined()) return y.add_(skip).contiguous(result_format(block.x, block.weights, spec));
      if (spec.join == JoinReads::branch) {
        act.branch_scale = scale_vector<A>(block.branch_scale, y.size(1));
        if (act.slope.empty()) act.slope.assign(y.size(1), A(0));
      }
      ResidualInput<A> residual;
      if (skip.defined()) residual = {skip, nullptr, scale_vector<A>(block.skip_scale, y.size(1))};
      out = normalize<S>(y, NormVectors<A>(y.size(1)), act, residual);
    }
  }
  return out.contiguous(result_format(block.x, block.weights, spec));
}

}  // namespace

at::Tensor residual_block_infer(const FoldedBlock& block, const BlockSpec& spec) {
  return DISPATCH(block.x, [&] { return infer<scalar_t>(block, spec); });
}

}  // namespace resnet_fused::cpu
