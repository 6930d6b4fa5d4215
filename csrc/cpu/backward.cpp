// Training, backward: docs/architecture.md lists the passes.
#include "block.h"
#include "engine/memory.h"
#include "engine/weight_gradient.h"
#include "engine/winograd_gradient.h"
#include "residual_block.h"

namespace resnet_fused::cpu {
namespace {

at::Tensor like_parameter(const std::vector<double>& values, const at::Tensor& parameter) {
  return from_vector(values, parameter.sizes(), parameter.scalar_type());
}

// The gradient of a scale or slope from its per-channel gradient: their sum where the scale is a single value.
at::Tensor like_scale(const std::vector<double>& per_channel, const at::Tensor& scale) {
  if (scale.numel() != 1) return like_parameter(per_channel, scale);
  double sum = 0;
  for (double v : per_channel) sum += v;
  return like_parameter({sum}, scale);
}

// The gradient of a convolution's output: a tensor, or what `backward_apply` makes of dz and y wherever it is read.
template <class S>
class OutputGradient {
 public:
  using A = acc_t<S>;
  using T = element_t<S>;

  OutputGradient() = default;
  OutputGradient(at::Tensor made) : dz_(std::move(made)) {}
  OutputGradient(at::Tensor dz, Reads reads, at::Tensor y, const NormVectors<A>& norm, ApplyVectors<A> k)
      : dz_(std::move(dz)), y_(std::move(y)), reads_(reads), norm_(norm), k_(std::move(k)), made_(false) {}

  bool defined() const { return dz_.defined(); }
  // Its memory, or dz's.
  bool is(const at::Tensor& t) const { return dz_.is_same(t); }

  engine::Size size() const { return {dz_.size(2), dz_.size(3)}; }

  // Made now, over dz where that is `owned`.
  const at::Tensor& tensor(bool owned = false) {
    if (!made_) {
      auto result = owned ? dz_ : engine::reused_like(dz_);
      backward_apply<S>(dz_, reads_, y_, norm_, k_, {}, result);
      *this = OutputGradient(result);
    }
    return dz_;
  }

  // Made where the operand is read and kept over dz, if that is `owned`: elsewhere writing it would cost more than
  // making it again. `keep` says that all of it has been made.
  engine::Operand<T> kept_operand(bool owned) {
    auto result = operand();
    keeps_ = owned && !made_;
    if (keeps_) result.keep(reinterpret_cast<T*>(dz_.template mutable_data_ptr<S>()));
    return result;
  }
  void keep() {
    if (keeps_) *this = OutputGradient(dz_);
  }
  bool is_made() const { return made_; }

  engine::Operand<T> operand() const {
    const int64_t channels = dz_.size(1);
    const auto* dz = reinterpret_cast<const T*>(dz_.template const_data_ptr<S>());
    if (made_) return {dz, channels};
    const auto* y = y_.defined() ? reinterpret_cast<const T*>(y_.template const_data_ptr<S>()) : nullptr;
    return {
        {dz, reads_, y, k_.y_term, norm_.affine(), k_.k_dz.data(), k_.k_y.data(), k_.k.data(), nullptr, nullptr,
         nullptr},
        channels};
  }

 private:
  at::Tensor dz_, y_;
  bool keeps_ = false;
  Reads reads_ = Reads::nothing;
  NormVectors<A> norm_;
  ApplyVectors<A> k_{0};
  bool made_ = true;
};

template <class S>
class Backward {
 public:
  using A = acc_t<S>;
  using T = element_t<S>;

  Backward(const BlockTensors& tensors, const BlockSpec& spec, const Needs& needs)
      : block(tensors, spec), tensors(tensors), spec(spec), needs(needs), grads(spec.convs.size()) {}

  std::vector<at::Tensor> run(
      const at::Tensor& dout, const at::Tensor& out, const std::vector<at::Tensor>& conv_outputs,
      const std::vector<at::Tensor>& batch_stats) {
    restore(conv_outputs, batch_stats);
    join(dout.contiguous(kLayout), out);
    for (int64_t i = spec.last(); i >= 0; --i) stage(i);
    finish();
    Needs wanted = needs;
    const auto flags = wanted.flat();
    const auto all = grads.flat();
    std::vector<at::Tensor> result;
    for (size_t i = 0; i < all.size(); ++i)
      if (*flags[i]) {
        TORCH_INTERNAL_ASSERT(all[i]->defined(), "gradient ", i, " was not computed");
        result.push_back(*all[i]);
      }
    return result;
  }

 private:
  Block<S> block;
  const BlockTensors& tensors;
  const BlockSpec& spec;
  const Needs& needs;
  Gradients grads;
  at::Tensor dz;               // gradient of the join; times skip_scale also the skip path's
  OutputGradient<S> dy, dy_s;  // of the current convolution and of the projection
  at::Tensor dx;
  bool behind_join_ = false;  // whether dy is of a convolution before the last
  at::Tensor last_input;      // P_n, where recomputing y_n has made it already

  void restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats) {
    size_t output = 0, stats = 0;
    for (size_t i = 0; i < spec.convs.size(); ++i) {
      if (spec.convs[i].saved) block.y[i] = conv_outputs[output++];
      block.set_norm(i, spec.uses_batch(i) ? batch_stats[stats++] : at::Tensor());
    }
    at::Tensor first_input;  // P_1, which the projection reads as well
    // from the first on: in a chain of two, y_2 is made of y_1
    for (int64_t i = 0; i < static_cast<int64_t>(spec.convs.size()); ++i) {
      if (!spec.convs[i].read || spec.convs[i].saved) continue;
      at::Tensor* const made = i == spec.last() ? &last_input : spec.from_x(i) ? &first_input : nullptr;
      block.y[i] = block.convolved(i, nullptr, made);
    }
  }

  // dz, the gradients of the scales and of both norms, dy_n and dy_s.
  void join(const at::Tensor& dout, const at::Tensor& out) {
    const int64_t last = spec.last(), s = spec.projection();
    const Join<S> join(block);
    const auto norm = block.join_norm(last);
    const auto norm_s = spec.has_projection() ? block.join_norm(s) : NormVectors<A>(block.width(last));
    const bool reads_y = spec.convs[last].read, reads_y_s = spec.has_projection() && spec.convs[s].read;
    const Reads reads = spec.join == JoinReads::nothing  ? Reads::nothing
                        : spec.join == JoinReads::output ? Reads::output
                                                         : Reads::argument;
    // The branch's gradient: dz itself, unless the activation stands before the addition.
    const bool before_addition = spec.join == JoinReads::branch;
    const bool keeps = reads == Reads::output || keeps_dz(join.act);
    at::Tensor dz_n = keeps ? engine::reused_like(dout) : dout;
    dz = before_addition ? dout : dz_n;
    TORCH_INTERNAL_ASSERT(reads_y || reads != Reads::argument);

    Sums sums, sums_s;
    if (reads_y || reads_y_s || keeps) {
      // Without y_n (no norm, or a frozen one) the pass still differentiates; dout stands in for y_n and its sums are
      // not used.
      ReduceInput in{dout, reads, out, reads_y ? block.y[last] : dout};
      if (keeps) in.dz = dz_n;
      if (reads_y_s && !before_addition) in.y2 = block.y[s];
      in.sums_slope = needs.slopes[last] && spec.order != Order::pre;
      in.sums_act = before_addition && needs.branch_scale;
      sums = backward_reduce<S>(
          in, join.norm, join.act, in.y2.defined() ? &norm_s : nullptr,
          spec.join == JoinReads::sum ? join.residual : ResidualInput<A>());
      sums_s = {sums.dz, sums.dz_y2};
    }
    if (before_addition && reads_y_s) sums_s = backward_reduce<S>({dout, Reads::nothing, {}, block.y[s]}, norm_s);

    if (needs.branch_scale)
      grads.branch_scale =
          like_scale(before_addition ? sums.act : scale_grad(norm, sums.dz, sums.dz_y), *tensors.branch_scale);
    if (needs.skip_scale) grads.skip_scale = like_scale(skip_scale_grad(norm_s, sums_s), *tensors.skip_scale);
    if (needs.slopes[last] && spec.order != Order::pre)
      grads.slopes[last] = like_scale(sums.slope, *tensors.slopes[last]);
    const auto factor = before_addition ? std::vector<A>(join.alpha.size(), A(1)) : join.alpha;
    const bool scaled = tensors.branch_scale.has_value() && !before_addition;
    const int64_t n = spec.output_norm(last);
    if (n != kNone) norm_grads(n, norm, sums.dz, sums.dz_y, factor);
    const bool masks = reads == Reads::argument && !keeps;  // a ReLU, whose derivative the next pass computes again
    if (spec.convs[last].wants_dy)
      dy = join_conv_grad(dz_n, last, norm, sums.dz, sums.dz_y, factor, scaled, masks, join.norm);
    if (spec.has_projection()) {
      if (spec.output_norm(s) != kNone) norm_grads(s, norm_s, sums_s.dz, sums_s.dz_y, join.sigma);
      if (spec.convs[s].wants_dy)
        dy_s = join_conv_grad(
            dz, s, norm_s, sums_s.dz, sums_s.dz_y, join.sigma, tensors.skip_scale.has_value(), false, norm_s);
    }
    block.y[last].reset();
    if (spec.has_projection()) block.y[s].reset();
    if (spec.skip != Skip::identity) dz.reset();
  }

  // Per channel: sum dz * norm(y) = gamma * inverse_std * sum dz (y - center) + beta * sum dz; without a norm sum dz *
  // y.
  std::vector<double> scale_grad(
      const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y) const {
    std::vector<double> grad(sum.size());
    for (size_t c = 0; c < grad.size(); ++c) grad[c] = norm.scale[c] * sum_y[c] + norm.shift[c] * sum[c];
    return grad;
  }

  std::vector<double> skip_scale_grad(const NormVectors<A>& norm_s, const Sums& sums) const {
    if (spec.skip == Skip::none) return std::vector<double>(block.width(spec.last()), 0.0);
    if (spec.has_projection()) return scale_grad(norm_s, sums.dz, sums.dz_y);
    return backward_reduce<S>({dz, Reads::nothing, {}, block.x}, NormVectors<A>(block.x.size(1))).dz_y;
  }

  // dgamma = factor * sum dz * y_hat, dbeta = factor * sum dz
  void norm_grads(
      int64_t stage, const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y,
      const std::vector<A>& factor) {
    if (!needs.norm(stage)) return;
    std::vector<double> dgamma(sum.size()), dbeta(sum.size());
    for (size_t c = 0; c < sum.size(); ++c) {
      dgamma[c] = factor[c] * norm.inverse_std[c] * sum_y[c];
      dbeta[c] = factor[c] * sum[c];
    }
    if (needs.norm_weights[stage]) grads.norm_weights[stage] = like_parameter(dgamma, *tensors.norm_weights[stage]);
    if (needs.norm_biases[stage]) grads.norm_biases[stage] = like_parameter(dbeta, *tensors.norm_biases[stage]);
  }

  // Coefficients of dy = scale * (dz - mean(dz) - y_hat * mean(dz * y_hat)), times factor; the means only for batch
  // statistics, through which the gradient flows (Ioffe & Szegedy 2015). stage: kNone without a norm.
  ApplyVectors<A> apply_vectors(
      int64_t stage, const NormVectors<A>& norm, const std::vector<double>& sum, const std::vector<double>& sum_y,
      int64_t rows, const std::vector<A>& factor) const {
    const int64_t channels = norm.scale.size();
    ApplyVectors<A> k(channels);
    k.y_term = spec.uses_batch(stage);
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = static_cast<double>(factor[c]) * norm.scale[c];
      k.k_dz[c] = static_cast<A>(scale);
      if (!k.y_term) continue;
      const double inverse_std = norm.inverse_std[c];
      k.k_y[c] = static_cast<A>(-scale * inverse_std * inverse_std * sum_y[c] / rows);
      k.k[c] = static_cast<A>(-scale * sum[c] / rows);
    }
    return k;
  }

  OutputGradient<S> join_conv_grad(
      const at::Tensor& gradient, int64_t conv, const NormVectors<A>& norm, const std::vector<double>& sum,
      const std::vector<double>& sum_y, const std::vector<A>& factor, bool scaled, bool masked,
      const NormVectors<A>& mask_norm) {
    const int64_t n = spec.output_norm(conv);
    if (n == kNone && !scaled && !masked) return gradient;
    auto k = apply_vectors(n, norm, sum, sum_y, gradient.numel() / gradient.size(1), factor);
    const auto& y = n != kNone || masked ? block.y[conv] : at::Tensor();
    OutputGradient<S> result(
        gradient, masked ? Reads::argument : Reads::nothing, y, masked ? mask_norm : norm, std::move(k));
    if (!reads_operands(conv)) result.tensor();
    return result;
  }

  // Whether nothing else reads what a gradient is made of: it is neither the join's nor the caller's.
  bool owns(const OutputGradient<S>& gradient) const { return &gradient == &dy && behind_join_; }

  // Whether both gradients of a convolution make what they read of its output's.
  bool reads_operands(int64_t conv) const {
    return convolves_backward(conv) && (!needs.weights[conv] || has_weight_gradient(conv)) && !needs.biases[conv];
  }
  bool has_weight_gradient(int64_t conv) const {
    return std::is_same_v<T, bf16> && block.x.numel() > 0 &&
           engine::has_weight_gradient(tensors.weights[conv], spec.convs[conv], block.x.scalar_type());
  }
  bool convolves_backward(int64_t conv) const {
    return kEngine<S> && block.x.numel() > 0 &&
           engine::convolves_backward(tensors.weights[conv], spec.convs[conv], block.x.scalar_type());
  }

  // The gradient of a convolution's input; written over `accumulated`, where that is defined, and added to it.
  at::Tensor input_gradient(int64_t conv, OutputGradient<S>& gradient, const at::Tensor& accumulated = {}) {
    const auto& like = block.input(conv);
    if constexpr (kEngine<S>) {
      if (convolves_backward(conv)) {
        // Where a sum of floats is not finite the result is dropped, so nothing is written over.
        constexpr bool in_place = !std::is_same_v<T, float>;
        auto dp = engine::convolve_backward<T>(
            gradient.kept_operand(in_place && owns(gradient)), engine::batch_of(like), tensors.weights[conv],
            spec.convs[conv], in_place ? accumulated : at::Tensor());
        if (dp.defined()) {
          gradient.keep();
          return in_place || !accumulated.defined() ? dp : accumulated.add_(dp);
        }
      }
    }
    if (accumulated.defined() && accumulates_backward_data(tensors.weights[conv], spec.convs[conv])) {
      accumulate_backward_data(gradient.tensor(), tensors.weights[conv], accumulated);
      return accumulated;
    }
    auto dp = convolution_backward_data(gradient.tensor(), like, tensors.weights[conv], spec.convs[conv]);
    if (!accumulated.defined()) return dp;
    return accumulated.add_(dp);
  }

  // The gradient of a convolution's input behind the ReLU, if there is one, and norm that make it, with the norm's
  // sums; undefined where no kernel computes all of them.
  engine::NormGradient norm_gradient(int64_t conv, OutputGradient<S>& gradient, const ActVectors<A>& act) {
    if constexpr (std::is_same_v<T, bf16>) {
      const int64_t n = spec.convs[conv].input_stage;
      if (!convolves_backward(conv) || keeps_dz(act) || needs.slopes[n]) return {};
      const auto& u = block.input(conv);
      const auto& norm = block.norms[n];
      const engine::Differentiated<T> behind{
          reinterpret_cast<const T*>(u.template const_data_ptr<S>()), norm.center.data(), norm.scale.data(),
          norm.shift.data(), act.pointers().is_relu()};
      std::optional<engine::WeightGradient> of_weight;
      engine::Made<T> made;
      // both gradients while dy is in the cache
      if (needs.weights[conv] && has_weight_gradient(conv) && !gradient.is_made()) {
        const auto batch = engine::batch_of(u);
        of_weight.emplace(
            tensors.weights[conv], spec.convs[conv], batch.images, batch.size, gradient.size(), gradient_dtype(conv));
        if (of_weight->takes_rows())
          made = {of_weight->slots(), [&](int64_t thread, int64_t slot, int64_t first, int64_t count, const T* dy) {
                    const int64_t channels = tensors.weights[conv].size(0), width = u.size(3);
                    of_weight->add_rows(
                        thread, slot, first / width, (first + count) / width,
                        engine::Operand<T>(dy - first * channels, channels), block.operand(conv, act));
                  }};
      }
      auto found = engine::convolve_backward_norm<T>(
          gradient.kept_operand(owns(gradient)), engine::batch_of(u), tensors.weights[conv], spec.convs[conv], behind,
          made);
      if (found.dz.defined()) gradient.keep();
      if (found.dz.defined() && of_weight)
        grads.weights[conv] =
            found.handed ? of_weight->finish() : of_weight->compute(gradient.operand(), block.operand(conv, act));
      return found;
    }
    return {};
  }

  // Convolution i and its input stage: from dy_i to dW_i and dy_{i-1} (or dx).
  void stage(int64_t i) {
    if (!dy.defined() && !(i == 0 && dy_s.defined())) return;
    const int64_t n = spec.convs[i].input_stage, s = spec.projection();
    const bool joins_projection = i == 0 && dy_s.defined();
    const bool below = spec.convs[i].wants_dp || (joins_projection && spec.convs[s].wants_dp);
    // dz is a buffer of ours (not dout) that nothing after this convolution reads
    const bool owns_dz = dz.defined() && spec.order == Order::post && spec.join != JoinReads::nothing && !dy.is(dz);
    if (i == 0 && n == kNone && below && owns_dz && !tensors.skip_scale &&
        (convolves_backward(0) || accumulates_backward_data(tensors.weights[0], spec.convs[0]))) {
      dx = input_gradient(0, dy, std::exchange(dz, {}));
      weight_grads(0, dy, block.x);
      return;
    }
    at::Tensor dp, p = i == spec.last() ? last_input : at::Tensor();
    last_input.reset();
    const bool processed = n != kNone && spec.convs[n].processes();
    const auto act = processed ? block.act(n) : ActVectors<A>();
    Sums sums;
    Reads reads = act.act.is(ActivationKind::identity) ? Reads::nothing : Reads::argument;
    bool differentiated = !below;  // whether dp is dz already
    if (below && processed && !joins_projection) {
      auto found = norm_gradient(i, dy, act);
      if (found.dz.defined()) {
        dp = found.dz;
        sums = {std::move(found.sum), std::move(found.sum_y)};
        reads = Reads::nothing;
        differentiated = true;
      }
    }
    if (!differentiated) {
      if (dy.defined()) dp = input_gradient(i, dy);
      if (joins_projection) dp = input_gradient(s, dy_s, dp);
    }
    if (processed && !differentiated) {
      // One pass gives P_i for the weight gradient and the sums of its norm.
      ReduceInput in{dp, reads, {}, block.input(i)};
      if (!p.defined()) in.p = p = engine::reused_like(block.input(i));
      if (keeps_dz(act)) in.dz = dp;
      in.sums_slope = needs.slopes[n];
      sums = backward_reduce<S>(in, block.norms[n], act);
      if (keeps_dz(act)) reads = Reads::nothing;
    }

    if (dy.defined()) weight_grads(i, dy, p);
    if (joins_projection) weight_grads(s, dy_s, p);
    dy = {};
    p.reset();
    if (!below) return;
    if (processed) {
      const std::vector<A> one(block.norms[n].scale.size(), A(1));
      norm_grads(n, block.norms[n], sums.dz, sums.dz_y, one);
      if (needs.slopes[n]) grads.slopes[n] = like_scale(sums.slope, *tensors.slopes[n]);
      const auto& u = block.input(i);
      auto k = apply_vectors(n, block.norms[n], sums.dz, sums.dz_y, u.numel() / u.size(1), one);
      if (i > 0) {
        dy = OutputGradient<S>(dp, reads, u, block.norms[n], std::move(k));
        behind_join_ = true;
        if (!reads_operands(i - 1)) dy.tensor(true);
      } else {
        const bool adds_skip = spec.skip == Skip::identity;
        if (adds_skip) k.k_add = scale_vector<A>(tensors.skip_scale, u.size(1));
        backward_apply<S>(dp, reads, u, block.norms[n], k, adds_skip ? dz : at::Tensor(), dp);
        if (adds_skip) dz.reset();
      }
    } else if (i > 0) {
      dy = dp;
    }
    if (i == 0)
      dx = dp;
    else
      block.y[i - 1].reset();
  }

  // p: the convolution's input, where it has been made.
  void weight_grads(int64_t conv, OutputGradient<S>& gradient, at::Tensor p) {
    bool needs_weight = needs.weights[conv] && !grads.weights[conv].defined();
    if (!needs_weight && !needs.biases[conv]) return;
    if constexpr (std::is_same_v<T, bf16>) {
      if (needs_weight && has_weight_gradient(conv)) {
        const auto& from = block.input(conv);
        const auto act = block.input_act(conv);
        const auto batch = engine::batch_of(from);
        grads.weights[conv] = engine::weight_gradient(
            gradient.operand(), p.defined() ? pixels(p) : block.operand(conv, act), batch.images, batch.size,
            gradient.size(), tensors.weights[conv], spec.convs[conv], gradient_dtype(conv));
        needs_weight = !grads.weights[conv].defined();
      }
    }
    if (!needs_weight && !needs.biases[conv]) return;
    if (!p.defined()) p = block.conv_input(conv);
    if constexpr (std::is_same_v<T, float>) {
      if (needs_weight && engine::has_weight_gradient(tensors.weights[conv], spec.convs[conv], at::kFloat)) {
        grads.weights[conv] = engine::winograd_weight_gradient(gradient.tensor(), p, tensors.weights[conv]);
        needs_weight = !grads.weights[conv].defined();
      }
    }
    auto g = convolution_backward_weight(
        gradient.tensor(), p, tensors.weights[conv], spec.convs[conv], needs_weight, needs.biases[conv]);
    if (needs_weight) grads.weights[conv] = g.weight;
    grads.biases[conv] = g.bias;
  }

  // In which the engine writes a weight's gradient: float, where that is asked for, from sums that are float.
  at::ScalarType gradient_dtype(int64_t conv) const {
    return needs.master == at::kFloat ? at::kFloat : tensors.weights[conv].scalar_type();
  }

  static engine::Operand<T> pixels(const at::Tensor& t) {
    return {reinterpret_cast<const T*>(t.template const_data_ptr<S>()), t.size(1)};
  }

  // dx of a post-activation block with an identity skip: the branch's plus skip_scale * dz.
  void finish() {
    if (!needs.x) return;
    if (dz.defined() && spec.skip == Skip::identity) {
      ApplyVectors<A> k(dx.size(1));
      k.k_add = scale_vector<A>(tensors.skip_scale, dx.size(1));
      backward_apply<S>(dx, Reads::nothing, {}, NormVectors<A>(dx.size(1)), k, dz, dx);
    }
    grads.x = dx.contiguous(tensors.x.suggest_memory_format());
  }
};

}  // namespace

std::vector<at::Tensor> residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec) {
  const auto out_last = out ? out->contiguous(kLayout) : at::Tensor();
  return DISPATCH(
      block.x, [&] { return Backward<scalar_t>(block, spec, needs).run(dout, out_last, conv_outputs, batch_stats); });
}

}  // namespace resnet_fused::cpu
