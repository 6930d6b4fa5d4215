// Training, backward, on a GPU: which phases it is made of.
#include "residual_block.h"

#include <algorithm>

#include "block.h"

namespace resnet_fused::cuda {
namespace {

class Backward {
 public:
  Backward(const BlockTensors& tensors, const BlockSpec& spec, const Needs& needs)
      : block(tensors, spec),
        tensors(tensors),
        spec(spec),
        needs(needs),
        grads(spec.convs.size()),
        slope_grads(spec.convs.size()) {}

  std::vector<at::Tensor> run(
      const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
      const std::vector<at::Tensor>& batch_stats);

 private:
  BlockPlan block;
  const BlockTensors& tensors;
  const BlockSpec& spec;
  const Needs& needs;
  Gradients grads;
  // float64 [C] each; they become grads.branch_scale, grads.skip_scale and grads.slopes
  at::Tensor branch_scale_grad, skip_scale_grad;
  std::vector<at::Tensor> slope_grads;
  at::Tensor dz;    // the gradient of the join's sum: the skip path's too, times skip_scale
  at::Tensor dp_s;  // what the projection gives back to its input
  at::Tensor dx;

  static OutVector gradient(bool wanted, at::Tensor& grad, const std::optional<at::Tensor>& parameter);
  VectorGradients vector_gradients(
      int64_t conv, int64_t norm, const std::optional<at::Tensor>& scale, at::Tensor* scale_grad, int64_t channels);
  void sum_third(Epilogue& e, Third third, at::Tensor& grad, int64_t channels);
  void restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats);
  std::pair<Input, std::optional<Input>> join(const at::Tensor& dout, const std::optional<at::Tensor>& out);
  Input through_norm(const at::Tensor& dz, const VectorGradients& gradients, const at::Tensor& y);
  Input settle(int64_t conv, const Input& dy);
  void weight_grad(int64_t conv, const Input& dy);
  Input step(int64_t conv, const Input& dy);
};

// A new gradient like its parameter, for a kernel to fill.
OutVector Backward::gradient(bool wanted, at::Tensor& grad, const std::optional<at::Tensor>& parameter) {
  if (!wanted) return {};
  grad = at::empty(parameter->sizes(), parameter->options(), at::MemoryFormat::Contiguous);
  return {grad.mutable_data_ptr(), scalar_of(*parameter)};
}

// What follows from the sums of dz and dz y, for y of `conv` (kNone: x) and the norm that reads it (kNone: none does).
// scale_grad: where the scale's gradient is wanted.
VectorGradients Backward::vector_gradients(
    int64_t conv, int64_t norm, const std::optional<at::Tensor>& scale, at::Tensor* scale_grad, int64_t channels) {
  VectorGradients g;
  const bool normed = norm != kNone;
  g.norm = block.norm(norm);
  g.factor = block.scale(scale);
  g.batch = spec.uses_batch(norm);
  if (scale && scale_grad) {
    *scale_grad = block.filled_later({channels}, at::kDouble);
    g.dfactor = scale_grad->mutable_data_ptr<double>();
  }
  if ((conv == kNone || spec.convs[conv].wants_dy) && (normed || scale)) g.table = block.new_table(channels);
  if (normed) {
    g.dgamma = gradient(needs.norm_weights[norm], grads.norm_weights[norm], tensors.norm_weights[norm]);
    g.dbeta = gradient(needs.norm_biases[norm], grads.norm_biases[norm], tensors.norm_biases[norm]);
  }
  if (conv != kNone) g.dbias = gradient(needs.biases[conv], grads.biases[conv], tensors.biases[conv]);
  return g;
}

bool anything(const VectorGradients& g) {
  return g.table != nullptr || g.dgamma.data != nullptr || g.dbeta.data != nullptr || g.dbias.data != nullptr ||
         g.dfactor != nullptr;
}

// Makes a pass add up `third`, which becomes a gradient.
void Backward::sum_third(Epilogue& e, Third third, at::Tensor& grad, int64_t channels) {
  grad = block.filled_later({channels}, at::kDouble);
  e.third = third;
  e.reduce = Reduce::sums;
  e.reduction.third = grad.mutable_data_ptr<double>();
}

// Whether act(z) = z act'(z), so that sum dout act(z) = sum dz z.
bool is_homogeneous(const Activation& act) {
  return act.is(ActivationKind::identity) || act.is(ActivationKind::relu) || act.is(ActivationKind::leaky_relu) ||
         act.is(ActivationKind::prelu);
}

// The saved tensors in their places, the norms' tables, and the outputs that memory="low" did not keep.
void Backward::restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats) {
  size_t output = 0, stats = 0;
  std::vector<int64_t> missing, read;
  for (int64_t i = 0; i < static_cast<int64_t>(spec.convs.size()); ++i) {
    if (spec.convs[i].saved)
      block.y[i] = conv_outputs[output++];
    else if (spec.convs[i].read)
      missing.push_back(i);
    if (spec.uses_batch(i)) block.stats[i] = batch_stats[stats++].contiguous();
    const int64_t norm = spec.input_norm(i);
    if (norm != kNone && std::find(read.begin(), read.end(), norm) == read.end()) read.push_back(norm);
  }
  block.write_tables(read);
  if (missing.empty()) return;
  block.plan.barrier();
  for (int64_t i : missing) {
    if (!spec.from_x(i) && !spec.convs[i - 1].saved) block.plan.barrier();  // in a chain of two, y_2 is made of y_1
    block.y[i] = block.convolve(i, {}, kNone);
  }
  block.plan.barrier();
}

// dy behind a norm, from dz.
Input Backward::through_norm(const at::Tensor& dz, const VectorGradients& gradients, const at::Tensor& y) {
  Input dy = block.input_of(dz);
  if (gradients.table == nullptr) return dy;
  dy.operand.source = Source::gradient;
  dy.operand.table = gradients.table;
  if (gradients.batch) {
    const Operand other = operand_of(y);
    dy.y = y;
    dy.operand.y = other.x;
    dy.operand.wide = dy.operand.wide && other.wide;
  }
  return dy;
}

// out = act(branch_scale norm_n(y_n) + skip_scale S), or branch_scale act(norm_n(y_n)) + skip_scale S: dz, the sums,
// and dy of the last convolution and the projection.
std::pair<Input, std::optional<Input>> Backward::join(const at::Tensor& dout, const std::optional<at::Tensor>& out) {
  const int64_t last = block.last(), s = block.projection(), channels = block.width(last);
  // An activation before the addition belongs to the branch alone. branch_scale follows it and enters where the sums
  // are evaluated, as behind a norm.
  const bool of_branch = spec.join == JoinReads::branch, masks = spec.join != JoinReads::nothing;
  const Act act = spec.order == Order::pre ? Act() : block.act(last);
  const int64_t norm = spec.output_norm(last);
  Epilogue e;
  const bool third_is_scale = of_branch && needs.branch_scale && !is_homogeneous(act.kind);
  const bool third_is_slope = spec.order != Order::pre && needs.slopes[last];
  at::Tensor* const of_branch_scale = needs.branch_scale && !third_is_scale ? &branch_scale_grad : nullptr;
  at::Tensor* const of_skip_scale = needs.skip_scale ? &skip_scale_grad : nullptr;
  VectorGradients first = vector_gradients(last, norm, tensors.branch_scale, of_branch_scale, channels), second;
  at::Tensor skip;
  Norm norm_s;
  if (spec.has_projection()) {
    second = vector_gradients(s, spec.output_norm(s), tensors.skip_scale, of_skip_scale, channels);
    skip = block.y[s];
    norm_s = block.norm(spec.output_norm(s));
  } else if (spec.skip == Skip::identity) {
    if (needs.skip_scale) second = vector_gradients(kNone, kNone, tensors.skip_scale, of_skip_scale, channels);
    skip = block.x;
  } else if (needs.skip_scale) {  // a skip scale without a skip path
    skip_scale_grad = at::zeros({channels}, block.x.options().dtype(at::kDouble));
  }
  const bool sums_skip = skip.defined() && (second.norm.mean.data != nullptr || second.dfactor != nullptr);
  // A pass has three sums, all of one gradient; what it has no room for is summed by a pass of its own.
  const bool apart = anything(second) && (of_branch || third_is_slope);

  const at::Tensor dz_n = masks ? at::empty(dout.sizes(), dout.options(), kLayout) : dout;
  dz = of_branch ? dout : dz_n;
  if (third_is_scale) sum_third(e, Third::activation, branch_scale_grad, channels);
  if (third_is_slope) sum_third(e, Third::slope, slope_grads[last], channels);
  if (anything(first) || (anything(second) && !apart)) e.reduce = Reduce::sums;
  if (e.reduce != Reduce::none || masks) {
    if (masks) {
      const bool plain = spec.skip == Skip::none || of_branch;
      e.mask = spec.join == JoinReads::output ? Mask::by_out : plain ? Mask::by_norm : Mask::by_sum;
      set_act(e, act);
      e.out = dz_n.mutable_data_ptr();
    }
    const bool by_argument = e.mask == Mask::by_norm || e.mask == Mask::by_sum;
    if (e.mask == Mask::by_out) e.mask_by = block.plan.hold(out->contiguous(kLayout)).const_data_ptr();
    if (by_argument && !of_branch) e.factor = block.scale(tensors.branch_scale);
    const at::Tensor& y = block.y[last];
    if (y.defined() && (by_argument || norm != kNone || first.dfactor != nullptr)) {
      e.y = block.plan.hold(y).const_data_ptr();
      e.y_norm = first.norm;
    }
    if (e.mask == Mask::by_sum) {
      e.residual_scale = block.scale(tensors.skip_scale);
      e.residual_norm = norm_s;
    }
    if (e.mask == Mask::by_sum || (sums_skip && !apart)) {
      e.s = block.plan.hold(skip).const_data_ptr();
      e.s_norm = second.norm;
    }
    e.reduction.first = first;
    if (!apart) e.reduction.second = second;
    block.plan.hold(dz_n);
    block.pass(block.input_of(dout), e);
  }
  if (apart) {
    if (!of_branch) block.plan.barrier();
    Epilogue sums;
    sums.reduce = Reduce::sums;
    if (sums_skip) {
      sums.y = block.plan.hold(skip).const_data_ptr();
      sums.y_norm = second.norm;
    }
    sums.reduction.first = second;
    block.pass(block.input_of(dz), sums);
  }
  std::optional<Input> dy_s;
  if (spec.has_projection() && spec.convs[s].wants_dy) dy_s = through_norm(dz, second, block.y[s]);
  return {through_norm(dz_n, first, block.y[last]), dy_s};
}

// dy in the form in which the convolution's two gradients read it. With a single tap their prologues make it. With R x
// S taps they would make each element R x S times each and read two tensors instead of one, so it is written out.
Input Backward::settle(int64_t conv, const Input& dy) {
  const auto& w = block.weights[conv];
  if (dy.operand.source == Source::raw || (w.size(2) * w.size(3) == 1 && !block.in_library(conv))) return dy;
  return block.materialize(dy);
}

void Backward::weight_grad(int64_t conv, const Input& dy) {
  if (!needs.weights[conv]) return;
  grads.weights[conv] = block.weight_gradient(conv, dy);
}

// From dy of a convolution to dy of the one before it, or to dx.
Input Backward::step(int64_t conv, const Input& dy) {
  const int64_t stage = spec.convs[conv].input_stage, norm = spec.input_norm(conv), below = conv > 0 ? conv - 1 : kNone;
  const at::Tensor& u = block.input(conv);
  const int64_t channels = u.size(1);
  const bool normed = norm != kNone, identity = spec.skip == Skip::identity;
  const Act act = block.act(stage);
  // The gradient of prelu's slope is a third sum; only a pass has room for it.
  const bool apart = stage != kNone && needs.slopes[stage];
  Epilogue product, own;
  Epilogue& e = apart ? own : product;
  if (conv == 0 && dp_s.defined()) {
    product.residual = dp_s.const_data_ptr();
  } else if (conv == 0 && stage == kNone && identity) {
    product.residual = dz.const_data_ptr();
    product.residual_scale = block.scale(tensors.skip_scale);
  }
  VectorGradients gradients;
  if (normed || (below != kNone && needs.biases[below]))
    gradients = vector_gradients(below, norm, std::nullopt, nullptr, channels);
  e.reduce = anything(gradients) ? Reduce::sums : Reduce::none;
  if (!act.is_identity()) {
    e.mask = Mask::by_norm;
    set_act(e, act);
  }
  if (normed || e.mask == Mask::by_norm) {
    e.y = u.const_data_ptr();  // x or an output before the last, which live through the call
    e.y_norm = block.norm(norm);
  }
  e.reduction.first = gradients;
  at::Tensor dp = block.data_gradient(conv, dy, product);
  if (apart) {
    block.plan.barrier();
    sum_third(own, Third::slope, slope_grads[stage], channels);
    const Input of = block.input_of(dp);
    dp = at::empty_like(dp);
    own.out = block.plan.hold(dp).mutable_data_ptr();
    block.pass(of, own);
  }
  if (conv > 0) return through_norm(dp, gradients, u);
  dx = dp;
  if (stage == kNone || !needs.x || (gradients.table == nullptr && !identity)) return dy;
  // pre-activation: dx = dy of norm_0 + skip_scale dz
  block.plan.barrier();
  Epilogue sum;
  dx = at::empty_like(dp);
  sum.out = dx.mutable_data_ptr();
  if (identity) {
    sum.residual = dz.const_data_ptr();
    sum.residual_scale = block.scale(tensors.skip_scale);
  }
  block.pass(through_norm(dp, gradients, u), sum);
  return dy;
}

std::vector<at::Tensor> Backward::run(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats) {
  restore(conv_outputs, batch_stats);
  auto [dy, dy_s] = join(dout.contiguous(kLayout), out);
  if (spec.skip != Skip::identity) dz.reset();  // else the last step adds it
  if (dy_s) {
    const int64_t s = block.projection();
    block.plan.barrier();
    dy_s = settle(s, *dy_s);
    weight_grad(s, *dy_s);
    if (spec.convs[s].wants_dp) dp_s = block.data_gradient(s, *dy_s, {});
    dy_s.reset();
    block.y[s].reset();
  }
  for (int64_t conv = block.last(); conv >= 0 && spec.convs[conv].wants_dy; --conv) {
    block.plan.barrier();
    dy = settle(conv, dy);
    weight_grad(conv, dy);
    if (!spec.convs[conv].wants_dp) break;
    dy = step(conv, dy);
    if (conv == block.last()) block.y[conv].reset();  // which may have been recomputed
  }
  block.plan.launch();
  if (needs.x) grads.x = dx.contiguous(tensors.x.suggest_memory_format());
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    at::Tensor& grad = grads.weights[i];
    if (grad.defined()) grad = grad.contiguous(tensors.weights[i].suggest_memory_format());
  }
  const auto of_scale = [](const at::Tensor& each, const at::Tensor& scale) {
    return (scale.numel() == 1 ? each.sum() : each).to(scale.scalar_type()).reshape(scale.sizes());
  };
  if (needs.branch_scale) grads.branch_scale = of_scale(branch_scale_grad, *tensors.branch_scale);
  if (needs.skip_scale) grads.skip_scale = of_scale(skip_scale_grad, *tensors.skip_scale);
  for (size_t i = 0; i < slope_grads.size(); ++i) {
    at::Tensor& each = slope_grads[i];
    if (!each.defined()) continue;
    // the scale that follows the activation
    const bool scaled =
        spec.join == JoinReads::branch && static_cast<int64_t>(i) == spec.last() && tensors.branch_scale;
    if (scaled) each = each * tensors.branch_scale->to(each.scalar_type()).reshape(-1);
    grads.slopes[i] = of_scale(each, *tensors.slopes[i]);
  }
  Needs flags = needs;
  const auto wanted = flags.flat();
  const auto all = grads.flat();
  std::vector<at::Tensor> result;
  for (size_t i = 0; i < all.size(); ++i)
    if (*wanted[i]) {
      TORCH_INTERNAL_ASSERT(all[i]->defined(), "gradient ", i, " was not computed");
      result.push_back(*all[i]);
    }
  return result;
}

}  // namespace

std::vector<at::Tensor> Kernels::residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec) {
  return Backward(block, spec, needs).run(dout, out, conv_outputs, batch_stats);
}

}  // namespace resnet_fused::cuda
