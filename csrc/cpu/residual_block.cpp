#include "residual_block.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cmath>

#include "../block/result_format.h"
#include "convolution.h"
#include "passes.h"

namespace resnet_fused::cpu {
namespace {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

// A scale as one value a channel; absent: 1.
template <class A>
std::vector<A> scale_vector(const std::optional<at::Tensor>& scale, int64_t channels) {
  if (!scale) return std::vector<A>(channels, A(1));
  auto values = to_vector<A>(*scale);
  return values.size() == 1 ? std::vector<A>(channels, values[0]) : values;
}

at::Tensor like_parameter(const std::vector<double>& values, const at::Tensor& parameter) {
  auto t = at::empty(parameter.sizes(), parameter.options().memory_format(at::MemoryFormat::Contiguous));
  TORCH_INTERNAL_ASSERT(t.numel() == static_cast<int64_t>(values.size()));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "like_parameter", [&] {
    std::copy(values.begin(), values.end(), t.mutable_data_ptr<scalar_t>());
  });
  return t;
}

// The gradient of a scale from its gradient per channel: summed where the scale is one value.
at::Tensor like_scale(const std::vector<double>& per_channel, const at::Tensor& scale) {
  if (scale.numel() != 1) return like_parameter(per_channel, scale);
  double sum = 0;
  for (double v : per_channel) sum += v;
  return like_parameter({sum}, scale);
}

// The views of one block that forward and backward share, for scalar type S.
//
// Every convolution but the first of a post-activation block has an input norm: P_i = act(norm(u_i)), with
// u_1 = x, u_{i+1} = y_i. That norm belongs to stage i in pre-activation order and to stage i - 1 otherwise.
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
  std::vector<NormVectors<A>> norms;
  std::vector<at::Tensor> y;

  int64_t last() const { return spec.stages - 1; }
  int64_t projection() const { return spec.stages; }
  int64_t width(int64_t conv) const { return tensors.weights[conv].size(0); }

  int64_t input_norm(int64_t i) const { return spec.pre_activation ? i : i - 1; }  // -1: none
  const at::Tensor& input(int64_t i) const { return i == 0 ? x : y[i - 1]; }
  bool normalizes(int64_t conv) const { return spec.convs[conv].norm != Norm::none; }
  // Whether conv's own output goes through its norm at the join (post-activation) or not (pre-activation).
  bool norm_at_join(int64_t conv) const { return !spec.pre_activation && normalizes(conv); }

  at::Tensor conv(int64_t i, const at::Tensor& p) const {
    return convolution(p, tensors.weights[i], tensors.biases[i], spec.convs[i]);
  }

  // P_i, recomputed wherever it is needed and never saved.
  at::Tensor conv_input(int64_t i) const {
    const int64_t n = input_norm(i);
    if (n < 0 || (!normalizes(n) && !spec.convs[n].relu)) return input(i);
    return normalize<S>(input(i), norms[n], spec.convs[n].relu);
  }

  // Fills norms[conv] from batch statistics [2, C] or the running ones.
  void set_norm(int64_t conv, const at::Tensor& batch_stats, int64_t channels) {
    auto& norm = norms[conv];
    norm = NormVectors<A>(channels);
    if (!normalizes(conv)) return;
    const bool batch = spec.convs[conv].norm == Norm::batch;
    std::vector<A> var;
    if (batch) {
      const auto both = to_vector<A>(batch_stats);
      norm.center.assign(both.begin(), both.begin() + channels);
      var.assign(both.begin() + channels, both.end());
    } else {
      norm.center = to_vector<A>(*tensors.running_means[conv]);
      var = to_vector<A>(*tensors.running_vars[conv]);
    }
    const auto gamma = scale_vector<A>(tensors.norm_weights[conv], channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double inverse_std = 1.0 / std::sqrt(static_cast<double>(var[c]) + spec.convs[conv].eps);
      norm.inverse_std[c] = static_cast<A>(inverse_std);
      norm.scale[c] = static_cast<A>(inverse_std * gamma[c]);
    }
    if (tensors.norm_biases[conv]) norm.shift = to_vector<A>(*tensors.norm_biases[conv]);
  }
};

// --- forward -------------------------------------------------------------------------------------------------------

template <class S>
BlockForward forward(const BlockTensors& tensors, const Needs& needs, const BlockSpec& spec) {
  using A = acc_t<S>;
  Block<S> block(tensors, spec);
  BlockForward result;
  const auto normalize_after = [&](int64_t norm, const at::Tensor& u) {
    at::Tensor stats;
    if (spec.convs[norm].norm == Norm::batch) {
      stats = batch_statistics<S>(u);
      result.batch_stats.push_back(stats);
    }
    block.set_norm(norm, stats, u.size(1));
  };

  at::Tensor first_input;
  for (int64_t i = 0; i < spec.stages; ++i) {
    if (spec.pre_activation) normalize_after(i, block.input(i));
    const auto p = block.conv_input(i);
    if (i == 0) first_input = p;
    block.y[i] = block.conv(i, p);
    if (!spec.pre_activation) normalize_after(i, block.y[i]);
  }
  ResidualInput<A> residual;
  if (spec.has_projection()) {
    const int64_t s = block.projection();
    block.y[s] = block.conv(s, first_input);
    if (!spec.pre_activation)
      normalize_after(s, block.y[s]);
    else
      block.set_norm(s, {}, block.width(s));
  }
  first_input.reset();

  const int64_t last = block.last(), channels = block.width(last);
  auto join = block.norm_at_join(last) ? block.norms[last] : NormVectors<A>(channels);
  const auto alpha = scale_vector<A>(tensors.branch_scale, channels),
             sigma = scale_vector<A>(tensors.skip_scale, channels);
  NormVectors<A> skip_norm(channels);
  for (int64_t c = 0; c < channels; ++c) {
    join.scale[c] *= alpha[c];
    join.shift[c] *= alpha[c];
  }
  if (spec.has_projection()) {
    if (block.norm_at_join(block.projection())) skip_norm = block.norms[block.projection()];
    for (int64_t c = 0; c < channels; ++c) {
      skip_norm.scale[c] *= sigma[c];
      skip_norm.shift[c] *= sigma[c];
    }
    residual = {block.y[block.projection()], &skip_norm};
  } else if (spec.skip == Skip::identity) {
    residual = {block.x, nullptr, sigma};
  }
  const bool relu = !spec.pre_activation && spec.last().relu;
  result.out =
      normalize<S>(block.y[last], join, relu, residual).contiguous(result_format(tensors.x, tensors.weights, spec));
  for (size_t i = 0; i < spec.convs.size(); ++i)
    if (spec.saves(i, needs)) result.conv_outputs.push_back(block.y[i]);
  return result;
}

// --- backward ------------------------------------------------------------------------------------------------------

template <class S>
class Backward {
 public:
  using A = acc_t<S>;

  Backward(const BlockTensors& tensors, const BlockSpec& spec, const Needs& needs)
      : block(tensors, spec), tensors(tensors), spec(spec), needs(needs), grads(needs.flags().size()) {}

  std::vector<at::Tensor> run(
      const at::Tensor& dout, const at::Tensor& out, const std::vector<at::Tensor>& conv_outputs,
      const std::vector<at::Tensor>& batch_stats) {
    restore(conv_outputs, batch_stats);
    join(dout.contiguous(kLayout), out);
    for (int64_t i = block.last(); i >= 0; --i) stage(i);
    finish();
    std::vector<at::Tensor> wanted;
    for (size_t i = 0; i < grads.size(); ++i)
      if (needs.flags()[i]) {
        TORCH_INTERNAL_ASSERT(grads[i].defined(), "gradient ", i, " was not computed");
        wanted.push_back(grads[i]);
      }
    return wanted;
  }

 private:
  Block<S> block;
  const BlockTensors& tensors;
  const BlockSpec& spec;
  const Needs& needs;
  std::vector<at::Tensor> grads;
  at::Tensor dz;        // gradient of the join: the skip path's too, times skip_scale
  at::Tensor dy, dy_s;  // gradients of the outputs of the current convolution and of the projection's
  at::Tensor dx;
  at::Tensor last_input;  // P_n, where recomputing y_n has made it already

  at::Tensor& weight_grad(int64_t conv) { return grads[3 + 6 * conv]; }
  at::Tensor& bias_grad(int64_t conv) { return grads[4 + 6 * conv]; }
  at::Tensor& norm_weight_grad(int64_t conv) { return grads[5 + 6 * conv]; }
  at::Tensor& norm_bias_grad(int64_t conv) { return grads[6 + 6 * conv]; }

  // Whether anything before convolution i, its input norm included, wants a gradient.
  bool needs_input_grad(int64_t i) const {
    if (needs.x()) return true;
    const int64_t n = block.input_norm(i);
    for (int64_t k = 0; k < i; ++k)
      if (needs.any(k)) return true;
    return n >= 0 && needs.norm(n);
  }

  void restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats) {
    size_t output = 0, stats = 0;
    for (size_t i = 0; i < spec.convs.size(); ++i) {
      if (spec.saves(i, needs)) block.y[i] = conv_outputs[output++];
      const auto batch = spec.convs[i].norm == Norm::batch ? batch_stats[stats++] : at::Tensor();
      block.set_norm(
          i, batch, spec.pre_activation ? tensors.weights[i].size(1) * spec.convs[i].groups : block.width(i));
    }
    const int64_t last = block.last();
    if (!block.y[last].defined() && spec.needs_output(last, needs)) {
      last_input = block.conv_input(last);
      block.y[last] = block.conv(last, last_input);
    }
    if (spec.has_projection()) {
      const int64_t s = block.projection();
      if (!block.y[s].defined() && spec.needs_output(s, needs)) block.y[s] = block.conv(s, block.conv_input(0));
    }
  }

  // out = act(branch_scale * norm_n(y_n) + skip_scale * S): dz, the scales' and both norms' gradients, dy_n and dy_s.
  void join(const at::Tensor& dout, const at::Tensor& out) {
    const int64_t last = block.last(), s = block.projection(), channels = block.width(last);
    const bool relu = !spec.pre_activation && spec.last().relu;
    const auto alpha = scale_vector<A>(tensors.branch_scale, channels),
               sigma = scale_vector<A>(tensors.skip_scale, channels);
    // Of a plain chain the mask is recomputed from y and `out` need not be saved.
    const Mask mask = !relu ? Mask::none : spec.skip == Skip::none ? Mask::affine : Mask::output;
    auto norm = block.norm_at_join(last) ? block.norms[last] : NormVectors<A>(channels);
    NormVectors<A> norm_s = spec.has_projection() && block.norm_at_join(s) ? block.norms[s] : NormVectors<A>(channels);
    auto mask_norm = norm;
    for (int64_t c = 0; c < channels; ++c) {
      mask_norm.scale[c] *= alpha[c];
      mask_norm.shift[c] *= alpha[c];
    }

    dz = mask == Mask::output ? at::empty_like(dout, kLayout) : dout;
    Sums sums;
    const bool reads_y = block.y[last].defined();
    const bool reads_y_s = spec.has_projection() && block.y[s].defined();
    TORCH_INTERNAL_ASSERT(reads_y || mask != Mask::affine);
    if (reads_y || mask == Mask::output) {
      // Without y_n (no norm, or one of constants) the pass still masks; the sums over a stand-in are not used.
      ReduceInput in{dout, mask, out, reads_y ? block.y[last] : dout};
      if (mask == Mask::output) in.dz = dz;
      if (reads_y_s) in.y2 = block.y[s];
      sums = backward_reduce<S>(in, mask_norm, reads_y_s ? &norm_s : nullptr);
    } else if (reads_y_s) {
      ReduceInput in{dout, mask, out, dout, block.y[s]};
      sums = backward_reduce<S>(in, mask_norm, &norm_s);
    }

    if (needs.branch_scale())
      grads[1] = like_scale(join_scale_grad(last, norm, sums.dz, sums.dz_y), *tensors.branch_scale);
    if (needs.skip_scale()) grads[2] = like_scale(skip_scale_grad(norm_s, sums), *tensors.skip_scale);
    if (block.norm_at_join(last)) norm_grads(last, norm, sums.dz, sums.dz_y, alpha);
    if (needs_input_grad(last) || needs.weight(last) || needs.bias(last))
      dy = join_conv_grad(
          last, norm, sums.dz, sums.dz_y, alpha, tensors.branch_scale.has_value(), mask == Mask::affine, mask_norm);
    if (spec.has_projection()) {
      if (block.norm_at_join(s)) norm_grads(s, norm_s, sums.dz, sums.dz_y2, sigma);
      if (needs.weight(s) || needs.bias(s) || needs.x() || (spec.pre_activation && needs.norm(0)))
        dy_s = join_conv_grad(s, norm_s, sums.dz, sums.dz_y2, sigma, tensors.skip_scale.has_value(), false, norm_s);
    }
    block.y[last].reset();
    if (spec.has_projection()) block.y[s].reset();
    if (spec.skip != Skip::identity) dz.reset();
  }

  // Per channel: sum dz * norm(y) = gamma * inverse_std * sum dz (y - center) + beta * sum dz; without a norm sum dz *
  // y.
  std::vector<double> join_scale_grad(
      int64_t, const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y) const {
    std::vector<double> grad(sum.size());
    for (size_t c = 0; c < grad.size(); ++c) grad[c] = norm.scale[c] * sum_y[c] + norm.shift[c] * sum[c];
    return grad;
  }

  std::vector<double> skip_scale_grad(const NormVectors<A>& norm_s, const Sums& sums) const {
    if (spec.skip == Skip::none) return std::vector<double>(block.width(block.last()), 0.0);
    if (spec.has_projection()) return join_scale_grad(block.projection(), norm_s, sums.dz, sums.dz_y2);
    return backward_reduce<S>({dz, Mask::none, {}, block.x}, NormVectors<A>(block.x.size(1))).dz_y;
  }

  // dgamma = factor * sum dz * y_hat, dbeta = factor * sum dz
  void norm_grads(
      int64_t conv, const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y,
      const std::vector<A>& factor) {
    if (!needs.norm(conv)) return;
    std::vector<double> dgamma(sum.size()), dbeta(sum.size());
    for (size_t c = 0; c < sum.size(); ++c) {
      dgamma[c] = factor[c] * norm.inverse_std[c] * sum_y[c];
      dbeta[c] = factor[c] * sum[c];
    }
    if (needs.norm_weight(conv)) norm_weight_grad(conv) = like_parameter(dgamma, *tensors.norm_weights[conv]);
    if (needs.norm_bias(conv)) norm_bias_grad(conv) = like_parameter(dbeta, *tensors.norm_biases[conv]);
  }

  // Coefficients of dy = scale * (dz - mean(dz) - y_hat * mean(dz * y_hat)), times factor; the means only for batch
  // statistics, through which the gradient flows (Ioffe & Szegedy 2015).
  ApplyVectors<A> apply_vectors(
      int64_t conv, bool normed, const NormVectors<A>& norm, const std::vector<double>& sum,
      const std::vector<double>& sum_y, int64_t rows, const std::vector<A>& factor) const {
    const int64_t channels = norm.scale.size();
    ApplyVectors<A> k(channels);
    const bool batch = normed && spec.convs[conv].norm == Norm::batch;
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = static_cast<double>(factor[c]) * norm.scale[c];
      k.k_dz[c] = static_cast<A>(scale);
      k.y_term = batch;
      if (!batch) continue;
      const double inverse_std = norm.inverse_std[c];
      k.k_y[c] = static_cast<A>(-scale * inverse_std * inverse_std * sum_y[c] / rows);
      k.k[c] = static_cast<A>(-scale * sum[c] / rows);
    }
    return k;
  }

  at::Tensor join_conv_grad(
      int64_t conv, const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y,
      const std::vector<A>& factor, bool scaled, bool masked, const NormVectors<A>& mask_norm) {
    const bool normed = block.norm_at_join(conv);
    if (!normed && !scaled && !masked) return dz;
    auto result = at::empty_like(dz, kLayout);
    const auto k = apply_vectors(conv, normed, norm, sum, sum_y, dz.numel() / dz.size(1), factor);
    const auto& y = normed || masked ? block.y[conv] : at::Tensor();
    backward_apply<S>(dz, masked ? Mask::affine : Mask::none, y, masked ? mask_norm : norm, k, {}, result);
    return result;
  }

  // Convolution i and its input norm: from dy_i to dW_i and dy_{i-1} (or dx).
  void stage(int64_t i) {
    if (!dy.defined() && !(i == 0 && dy_s.defined())) return;
    const bool below = needs_input_grad(i);
    const int64_t n = block.input_norm(i), s = block.projection();
    const bool joins_projection = i == 0 && dy_s.defined();
    // dz is a buffer of ours (not dout) that nothing after this convolution reads
    const bool owns_dz = dz.defined() && !spec.pre_activation && spec.last().relu && !dz.is_same(dy);
    if (i == 0 && n < 0 && below && owns_dz && !tensors.skip_scale &&
        convolution_backward_data_into(dy, tensors.weights[0], spec.convs[0], dz)) {
      weight_grads(0, dy, block.x);
      dx = std::move(dz);
      return;
    }
    at::Tensor dp, p = i == block.last() ? last_input : at::Tensor();
    last_input.reset();
    if (below) {
      if (dy.defined()) dp = convolution_backward_data(dy, block.input(i), tensors.weights[i], spec.convs[i]);
      if (joins_projection) {
        auto dp_s = convolution_backward_data(dy_s, block.input(0), tensors.weights[s], spec.convs[s]);
        dp = dp.defined() ? dp.add_(dp_s) : dp_s;
      }
    }

    const bool activated = n >= 0 && (block.normalizes(n) || spec.convs[n].relu);
    Sums sums;
    const Mask mask = activated && spec.convs[n].relu ? Mask::affine : Mask::none;
    if (activated && below) {
      // One pass gives P_i for the weight gradient and the sums of its norm.
      ReduceInput in{dp, mask, {}, block.input(i)};
      if (!p.defined()) in.p = p = at::empty_like(block.input(i), kLayout);
      sums = backward_reduce<S>(in, block.norms[n]);
    } else if (!p.defined()) {
      p = block.conv_input(i);
    }

    if (dy.defined()) weight_grads(i, dy, p);
    if (joins_projection) weight_grads(s, dy_s, p);
    dy.reset();
    p.reset();
    if (!below) return;
    if (activated) {
      const std::vector<A> one(block.norms[n].scale.size(), A(1));
      norm_grads(n, block.norms[n], sums.dz, sums.dz_y, one);
      const auto& u = block.input(i);
      auto k = apply_vectors(n, block.normalizes(n), block.norms[n], sums.dz, sums.dz_y, u.numel() / u.size(1), one);
      const bool adds_skip = i == 0 && spec.skip == Skip::identity;
      if (adds_skip) k.k_add = scale_vector<A>(tensors.skip_scale, u.size(1));
      backward_apply<S>(dp, mask, u, block.norms[n], k, adds_skip ? dz : at::Tensor(), dp);
      if (adds_skip) dz.reset();
    }
    if (i == 0) {
      dx = dp;
    } else {
      dy = dp;
      block.y[i - 1].reset();
    }
  }

  void weight_grads(int64_t conv, const at::Tensor& dy_conv, const at::Tensor& p) {
    if (!needs.weight(conv) && !needs.bias(conv)) return;
    auto g = convolution_backward_weight(
        dy_conv, p, tensors.weights[conv], spec.convs[conv], needs.weight(conv), needs.bias(conv));
    weight_grad(conv) = g.weight;
    bias_grad(conv) = g.bias;
  }

  // dx of a post-activation block with an identity skip: the branch's plus skip_scale * dz.
  void finish() {
    if (!needs.x()) return;
    if (dz.defined() && spec.skip == Skip::identity) {
      ApplyVectors<A> k(dx.size(1));
      k.k_add = scale_vector<A>(tensors.skip_scale, dx.size(1));
      backward_apply<S>(dx, Mask::none, {}, NormVectors<A>(dx.size(1)), k, dz, dx);
    }
    grads[0] = dx.contiguous(tensors.x.suggest_memory_format());
  }
};

// --- evaluation ----------------------------------------------------------------------------------------------------

template <class S>
at::Tensor infer(
    const at::Tensor& x_in, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    const std::vector<at::Tensor>& weights, const OptionalTensors& biases, const std::optional<at::Tensor>& skip_scale,
    const BlockSpec& spec) {
  using A = acc_t<S>;
  const auto x = x_in.contiguous(kLayout);
  // oneDNN's ReLU turns NaN into 0, PyTorch's does not: what may hold one takes the ReLU of our own pass.
  const bool post_ops = has_post_ops(x), fuses_relu = post_ops && all_finite<S>(x);
  const int64_t last = spec.stages - 1;
  const auto relu_after = [&](int64_t i) {  // the activation between convolution i and the next, or the block's own
    if (spec.pre_activation) return i < last && spec.convs[i + 1].relu;
    return spec.convs[i].relu;
  };
  const auto run = [&](int64_t i, const at::Tensor& p, bool relu) {
    if (fuses_relu || (post_ops && !relu)) return convolution_act(p, weights[i], biases[i], spec.convs[i], relu);
    const auto y = post_ops ? convolution_act(p, weights[i], biases[i], spec.convs[i], false)
                            : convolution(p, weights[i], biases[i], spec.convs[i]);
    return relu ? normalize<S>(y, NormVectors<A>(y.size(1)), true) : y;
  };

  at::Tensor first = x;
  if (spec.pre_activation && (pre_scale || spec.convs[0].relu)) {
    NormVectors<A> norm(x.size(1));
    if (pre_scale) {
      norm.scale = to_vector<A>(*pre_scale);
      norm.shift = to_vector<A>(*pre_shift);
    }
    first = normalize<S>(x, norm, spec.convs[0].relu);
  }
  at::Tensor u = first;
  for (int64_t i = 0; i < last; ++i) u = run(i, u, relu_after(i));

  const bool relu = relu_after(last);
  at::Tensor out;
  if (spec.skip == Skip::none) {
    out = run(last, u, relu);
  } else {
    const auto skip = spec.has_projection() ? run(spec.stages, first, false) : x;
    // PyTorch has no fused sum of a grouped convolution with a tensor it must keep; what it runs instead fails in 16
    // bits
    const bool fuses_sum = spec.has_projection() || spec.last().groups == 1;
    if (fuses_relu && fuses_sum && !skip_scale) {
      out = convolution_add_act(u, weights[last], biases[last], spec.convs[last], skip, spec.has_projection(), relu);
    } else {
      const auto y = run(last, u, false);
      const ResidualInput<A> residual{skip, nullptr, scale_vector<A>(skip_scale, y.size(1))};
      out = normalize<S>(y, NormVectors<A>(y.size(1)), relu, residual);
    }
  }
  return out.contiguous(result_format(x_in, weights, spec));
}

}  // namespace

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "residual_block", __VA_ARGS__)

BlockForward residual_block_forward(const BlockTensors& block, const Needs& needs, const BlockSpec& spec) {
  return DISPATCH(block.x, [&] { return forward<scalar_t>(block, needs, spec); });
}

std::vector<at::Tensor> residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec) {
  const auto out_last = out ? out->contiguous(kLayout) : at::Tensor();
  return DISPATCH(
      block.x, [&] { return Backward<scalar_t>(block, spec, needs).run(dout, out_last, conv_outputs, batch_stats); });
}

at::Tensor residual_block_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    const std::vector<at::Tensor>& weights, const OptionalTensors& biases, const std::optional<at::Tensor>& skip_scale,
    const BlockSpec& spec) {
  return DISPATCH(x, [&] { return infer<scalar_t>(x, pre_scale, pre_shift, weights, biases, skip_scale, spec); });
}

}  // namespace resnet_fused::cpu
