// Which phases a residual block is made of on a GPU. The formula and its symbols are those of docs/architecture.md.
#include "residual_block.h"

#include <algorithm>

#include "../../block/result_format.h"
#include "block.h"

namespace resnet_fused::cuda {
namespace {

// --- training, forward -----------------------------------------------------------------------------------------------

// out = act(branch_scale norm_n(y_n) + skip_scale S)
at::Tensor join(Block& block) {
  const BlockSpec& spec = block.spec;
  const int64_t last = block.last(), s = block.projection();
  const at::Tensor& y = block.y[last];
  if (spec.pre_activation && spec.skip == Skip::none && !block.tensors.branch_scale) return y;  // then it is not saved
  Epilogue e;
  const at::Tensor out = block.activation(block.width(last), block.sizes[last]);
  e.out = out.mutable_data_ptr();
  e.norm = block.norm(block.join_norm(last));
  e.factor = block.scale(block.tensors.branch_scale);
  e.relu = !spec.pre_activation && spec.last().relu;
  if (spec.skip != Skip::none) {
    const at::Tensor& skip = spec.has_projection() ? block.y[s] : block.x;
    e.residual = skip.const_data_ptr();
    e.residual_scale = block.scale(block.tensors.skip_scale);
    if (spec.has_projection()) e.residual_norm = block.norm(block.join_norm(s));
  }
  block.pass(block.input_of(y), e);
  return out;
}

}  // namespace

BlockForward Kernels::residual_block_forward(const BlockTensors& tensors, const Needs& needs, const BlockSpec& spec) {
  Block block(tensors, spec);
  std::vector<int64_t> known;
  for (size_t i = 0; i < spec.convs.size(); ++i)
    if (spec.convs[i].norm == resnet_fused::Norm::running) known.push_back(static_cast<int64_t>(i));
  block.write_tables(known);
  if (spec.pre_activation && block.uses_batch(0)) {
    block.stats[0] = block.filled_later({2, block.x.size(1)}, at::kFloat);
    Epilogue e;
    e.reduce = Reduce::statistics;
    e.reduction.norm = block.norm(0);
    e.reduction.stats = block.stats[0].mutable_data_ptr<float>();
    e.reduction.table = block.table(0);
    block.pass(block.input_of(block.x), e);
  }
  block.plan.barrier();
  for (int64_t i = 0; i < spec.stages; ++i) {
    const auto statistics = [&](int64_t conv) {
      const int64_t norm = block.output_norm(conv);
      return block.uses_batch(norm) ? norm : -1;
    };
    if (i > 0) block.plan.barrier();
    block.y[i] = block.convolve(i, {}, statistics(i));
    // beside the first convolution: no barrier between them
    if (i == 0 && spec.has_projection())
      block.y[block.projection()] = block.convolve(block.projection(), {}, statistics(block.projection()));
  }
  block.plan.barrier();
  const at::Tensor out = join(block);
  block.plan.launch();
  BlockForward result;
  result.out = out.contiguous(result_format(tensors.x, tensors.weights, spec));
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    if (spec.saves(static_cast<int64_t>(i), needs)) result.conv_outputs.push_back(block.y[i]);
    if (spec.convs[i].norm == resnet_fused::Norm::batch) result.batch_stats.push_back(block.stats[i]);
  }
  return result;
}

// --- training, backward ----------------------------------------------------------------------------------------------

namespace {

class Backward {
 public:
  Backward(const BlockTensors& tensors, const BlockSpec& spec, const Needs& needs)
      : block(tensors, spec), tensors(tensors), spec(spec), needs(needs), grads(needs.flags().size()) {}

  std::vector<at::Tensor> run(
      const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
      const std::vector<at::Tensor>& batch_stats);

 private:
  Block block;
  const BlockTensors& tensors;
  const BlockSpec& spec;
  const Needs& needs;
  std::vector<at::Tensor> grads;
  std::vector<std::pair<size_t, at::Tensor>> scale_grads;  // index, float64 [C]
  at::Tensor dz;                                           // of the join: the skip path's too, times skip_scale
  at::Tensor dp_s;                                         // what the projection gives back to its input
  at::Tensor dx;

  bool wants_below(int64_t conv) const;
  bool wants_output(int64_t conv) const;
  OutVector gradient(bool wanted, size_t index);
  VectorGradients vector_gradients(
      int64_t conv, int64_t norm, const std::optional<at::Tensor>& scale, size_t scale_index, int64_t channels);
  void restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats);
  bool masks_by_norm() const { return !spec.pre_activation && spec.skip == Skip::none && spec.last().relu; }
  std::pair<Input, std::optional<Input>> join(const at::Tensor& dout, const std::optional<at::Tensor>& out);
  Input through_norm(const at::Tensor& dz, const VectorGradients& gradients, const at::Tensor& y);
  Input settle(int64_t conv, const Input& dy);
  void weight_grad(int64_t conv, const Input& dy);
  Input step(int64_t conv, const Input& dy);
};

// Whether anything before a convolution, its input norm included, wants a gradient.
bool Backward::wants_below(int64_t conv) const {
  if (needs.x()) return true;
  for (int64_t k = 0; k < conv; ++k)
    if (needs.any(k)) return true;
  const int64_t norm = block.input_norm(conv);
  return norm >= 0 && needs.norm(norm);
}

bool Backward::wants_output(int64_t conv) const {
  if (needs.weight(conv) || needs.bias(conv)) return true;
  if (conv == block.projection()) return needs.x() || (spec.pre_activation && needs.norm(0));
  return wants_below(conv);
}

OutVector Backward::gradient(bool wanted, size_t index) {
  if (!wanted) return {};
  const size_t conv = (index - 3) / 6, part = (index - 3) % 6;
  const auto& parameter = *(part == 1 ? tensors.biases : part == 2 ? tensors.norm_weights : tensors.norm_biases)[conv];
  grads[index] = at::empty(parameter.sizes(), parameter.options(), at::MemoryFormat::Contiguous);
  return {grads[index].mutable_data_ptr(), scalar_of(parameter)};
}

// What follows from the sums of dz and dz y, for y of `conv` (-1: x) and the norm that reads it.
VectorGradients Backward::vector_gradients(
    int64_t conv, int64_t norm, const std::optional<at::Tensor>& scale, size_t scale_index, int64_t channels) {
  VectorGradients g;
  const bool normed = block.normalizes(norm);
  g.norm = block.norm(norm);
  g.factor = block.scale(scale);
  g.batch = block.uses_batch(norm);
  if (scale && needs.flags()[scale_index]) {
    const at::Tensor each = block.filled_later({channels}, at::kDouble);
    scale_grads.emplace_back(scale_index, each);
    g.dfactor = each.mutable_data_ptr<double>();
  }
  if ((conv < 0 || wants_output(conv)) && (normed || scale)) g.table = block.new_table(channels);
  if (normed) {
    g.dgamma = gradient(needs.norm_weight(norm), 5 + 6 * norm);
    g.dbeta = gradient(needs.norm_bias(norm), 6 + 6 * norm);
  }
  if (conv >= 0) g.dbias = gradient(needs.bias(conv), 4 + 6 * conv);
  return g;
}

bool anything(const VectorGradients& g) {
  return g.table != nullptr || g.dgamma.data != nullptr || g.dbeta.data != nullptr || g.dbias.data != nullptr ||
         g.dfactor != nullptr;
}

// The saved tensors in their places, the norms' tables, and the outputs that memory="low" did not keep.
void Backward::restore(const std::vector<at::Tensor>& conv_outputs, const std::vector<at::Tensor>& batch_stats) {
  size_t output = 0, stats = 0;
  std::vector<int64_t> missing, read;
  for (int64_t i = 0; i < static_cast<int64_t>(spec.convs.size()); ++i) {
    if (spec.saves(i, needs))
      block.y[i] = conv_outputs[output++];
    else if (spec.needs_output(i, needs))
      missing.push_back(i);
    if (spec.convs[i].norm == resnet_fused::Norm::batch) block.stats[i] = batch_stats[stats++].contiguous();
    const int64_t norm = block.input_norm(i);
    if (block.normalizes(norm) && std::find(read.begin(), read.end(), norm) == read.end()) read.push_back(norm);
  }
  block.write_tables(read);
  if (missing.empty()) return;
  block.plan.barrier();
  for (int64_t i : missing) block.y[i] = block.convolve(i, {}, -1);
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

// out = act(branch_scale norm_n(y_n) + skip_scale S): dz, the sums, and dy of the last convolution and the projection.
std::pair<Input, std::optional<Input>> Backward::join(const at::Tensor& dout, const std::optional<at::Tensor>& out) {
  const int64_t last = block.last(), s = block.projection(), channels = block.width(last);
  const bool relu = !spec.pre_activation && spec.last().relu;
  Epilogue e;
  e.mask = !relu ? Mask::none : masks_by_norm() ? Mask::by_norm : Mask::by_out;
  const int64_t norm = block.join_norm(last);
  VectorGradients first = vector_gradients(last, norm, tensors.branch_scale, 1, channels), second;
  at::Tensor skip;
  int64_t norm_s = -1;
  if (spec.has_projection()) {
    norm_s = block.join_norm(s);
    second = vector_gradients(s, norm_s, tensors.skip_scale, 2, channels);
    skip = block.y[s];
  } else if (spec.skip == Skip::identity && needs.skip_scale()) {
    second = vector_gradients(-1, -1, tensors.skip_scale, 2, channels);
    skip = block.x;
  } else if (needs.skip_scale()) {  // a skip scale without a skip path
    scale_grads.emplace_back(2, at::zeros({channels}, block.x.options().dtype(at::kDouble)));
  }
  dz = relu ? at::empty(dout.sizes(), dout.options(), kLast) : dout;
  const bool reduces = anything(first) || anything(second);
  if (reduces || relu) {
    e.reduce = reduces ? Reduce::sums : Reduce::none;
    if (relu) e.out = dz.mutable_data_ptr();
    if (e.mask == Mask::by_out) e.mask_by = block.plan.hold(out->contiguous(kLast)).const_data_ptr();
    if (e.mask == Mask::by_norm) e.factor = block.scale(tensors.branch_scale);
    const at::Tensor& y = block.y[last];
    if (y.defined() && (e.mask == Mask::by_norm || norm >= 0 || first.dfactor != nullptr)) {
      e.y = block.plan.hold(y).const_data_ptr();
      e.y_norm = first.norm;
    }
    if (skip.defined() && (norm_s >= 0 || second.dfactor != nullptr)) {
      e.s = block.plan.hold(skip).const_data_ptr();
      e.s_norm = second.norm;
    }
    e.reduction.first = first;
    e.reduction.second = second;
    block.plan.hold(dz);
    block.pass(block.input_of(dout), e);
  }
  std::optional<Input> dy_s;
  if (spec.has_projection() && wants_output(s)) dy_s = through_norm(dz, second, block.y[s]);
  return {through_norm(dz, first, block.y[last]), dy_s};
}

// dy as the convolution's two gradients read it: made in their prologues for a single tap, else written out. With R x S
// taps each element would be made R x S times in both, and two tensors read for it instead of one.
Input Backward::settle(int64_t conv, const Input& dy) {
  const auto& w = block.weights[conv];
  if (dy.operand.source == Source::raw || (w.size(2) * w.size(3) == 1 && !block.in_library(conv))) return dy;
  return block.materialize(dy);
}

void Backward::weight_grad(int64_t conv, const Input& dy) {
  if (!needs.weight(conv)) return;
  grads[3 + 6 * conv] = block.weight_gradient(conv, dy);
}

// From dy of a convolution to dy of the one before it, or to dx.
Input Backward::step(int64_t conv, const Input& dy) {
  const int64_t norm = block.input_norm(conv), below = conv - 1;
  const at::Tensor& u = block.input(conv);
  const int64_t channels = u.size(1);
  const bool normed = block.normalizes(norm), identity = spec.skip == Skip::identity;
  Epilogue e;
  if (conv == 0 && dp_s.defined()) {
    e.residual = dp_s.const_data_ptr();
  } else if (conv == 0 && norm < 0 && identity) {
    e.residual = dz.const_data_ptr();
    e.residual_scale = block.scale(tensors.skip_scale);
  }
  VectorGradients gradients;
  if (normed || (below >= 0 && needs.bias(below))) gradients = vector_gradients(below, norm, std::nullopt, 0, channels);
  e.reduce = anything(gradients) ? Reduce::sums : Reduce::none;
  e.mask = norm >= 0 && spec.convs[norm].relu ? Mask::by_norm : Mask::none;
  if (normed || e.mask == Mask::by_norm) {
    e.y = u.const_data_ptr();  // x or a saved output, which live through the call
    e.y_norm = block.norm(norm);
  }
  e.reduction.first = gradients;
  const at::Tensor dp = block.data_gradient(conv, dy, e);
  if (conv > 0) return through_norm(dp, gradients, u);
  dx = dp;
  if (norm < 0 || !needs.x() || (gradients.table == nullptr && !identity)) return dy;
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
  auto [dy, dy_s] = join(dout.contiguous(kLast), out);
  if (spec.skip != Skip::identity) dz.reset();  // else the last step adds it
  if (dy_s) {
    const int64_t s = block.projection(), norm = block.input_norm(s);
    block.plan.barrier();
    dy_s = settle(s, *dy_s);
    weight_grad(s, *dy_s);
    if (needs.x() || (norm >= 0 && needs.norm(norm))) dp_s = block.data_gradient(s, *dy_s, {});
    dy_s.reset();
    block.y[s].reset();
  }
  for (int64_t conv = block.last(); conv >= 0 && wants_output(conv); --conv) {
    block.plan.barrier();
    dy = settle(conv, dy);
    weight_grad(conv, dy);
    if (!wants_below(conv)) break;
    dy = step(conv, dy);
    if (conv == block.last()) block.y[conv].reset();  // which may have been recomputed
  }
  block.plan.launch();
  if (needs.x()) grads[0] = dx.contiguous(tensors.x.suggest_memory_format());
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    at::Tensor& grad = grads[3 + 6 * i];
    if (grad.defined()) grad = grad.contiguous(tensors.weights[i].suggest_memory_format());
  }
  for (const auto& [index, each] : scale_grads) {
    const at::Tensor& scale = index == 1 ? *tensors.branch_scale : *tensors.skip_scale;
    grads[index] = (scale.numel() == 1 ? each.sum() : each).to(scale.scalar_type()).reshape(scale.sizes());
  }
  std::vector<at::Tensor> wanted;
  for (size_t i = 0; i < grads.size(); ++i)
    if (needs.flags()[i]) {
      TORCH_INTERNAL_ASSERT(grads[i].defined(), "gradient ", i, " was not computed");
      wanted.push_back(grads[i]);
    }
  return wanted;
}

}  // namespace

std::vector<at::Tensor> Kernels::residual_block_backward(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const std::vector<at::Tensor>& conv_outputs,
    const std::vector<at::Tensor>& batch_stats, const BlockTensors& block, const Needs& needs, const BlockSpec& spec) {
  return Backward(block, spec, needs).run(dout, out, conv_outputs, batch_stats);
}

// --- evaluation ------------------------------------------------------------------------------------------------------

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the whole block runs tile by tile on the chip; then adds the phase and returns its result.
std::optional<at::Tensor> chain(Block& block, const Epilogue& epilogue, const std::vector<bool>& relu) {
  const BlockSpec& spec = block.spec;
  const int64_t last = block.last(), s = block.projection();
  if (spec.stages < 2 || spec.stages > Chain::kMost) return std::nullopt;
  for (size_t i = 0; i < spec.convs.size(); ++i)
    if (block.in_library(static_cast<int64_t>(i))) return std::nullopt;
  if (spec.has_projection() && (block.weights[s].size(2) != 1 || block.weights[s].size(3) != 1)) return std::nullopt;

  Phase phase;
  phase.kind = Kind::chain;
  phase.chain = Chain();
  Chain& c = phase.chain;
  c.count = static_cast<int>(spec.stages);
  c.batch = static_cast<int>(block.x.size(0));
  c.tf32 = spec.how.tf32;
  // tiles of up to 8 x 8 that divide the picture evenly; then each stage's region from the last to the first
  Size region;
  for (int d = 0; d < 2; ++d) {
    c.tiles[d] = static_cast<int>(ceil_div(block.sizes[last][d], 8));
    region[d] = ceil_div(block.sizes[last][d], c.tiles[d]);
  }
  c.tiles_per_image = Divisor(int64_t{c.tiles[0]} * c.tiles[1]);
  c.tiles_per_row = Divisor(c.tiles[1]);
  for (int64_t i = last; i >= 0; --i) {
    ChainStage& stage = c.stage[i];
    Input source;  // what the stage before leaves on the chip
    if (i > 0)
      source.operand.channels = static_cast<int>(block.width(i - 1));
    else
      source = block.source(0);
    stage.product = block.product(i, source, false);
    stage.bias = block.vector(block.tensors.biases[i]);
    stage.relu = relu[i];
    stage.per_row = Divisor(region[1]);
    const Geometry& g = stage.product.geometry;
    for (int d = 0; d < 2; ++d) {
      stage.rows[d] = static_cast<int>(region[d]);
      stage.size[d] = static_cast<int>(block.sizes[i][d]);
      region[d] = (region[d] - 1) * g.stride[d] + (g.kernel[d] - 1) * g.dilation[d] + 1;
    }
  }
  if (spec.has_projection()) c.projection = block.product(s, block.source(s), false);
  const int64_t items = int64_t{c.batch} * c.tiles[0] * c.tiles[1];
  // with fewer tiles than SMs the phases, which also share channels among workers, keep more of them busy
  if (items < block.plan.device().processors) return std::nullopt;
  for (c.stages = 4; c.stages > 2; --c.stages)
    if (block.plan.shared(phase) <= block.plan.shared_budget()) break;
  if (block.plan.shared(phase) > block.plan.device().shared_worker) return std::nullopt;
  at::Tensor out = block.activation(block.width(last), block.sizes[last]);
  c.epilogue = epilogue;
  c.epilogue.bias = c.stage[last].bias;
  if (spec.has_projection()) {
    c.epilogue.residual = nullptr;
    c.epilogue.second_bias = block.vector(block.tensors.biases[s]);
  }
  c.epilogue.out = out.mutable_data_ptr();
  complete(block.plan, c.epilogue, block.width(last), 0, 1);
  block.plan.add(phase, items);
  return out;
}

// Every norm is folded into weights and biases, but the one that stands before the first convolution.
BlockSpec folded(const BlockSpec& spec, bool pre) {
  BlockSpec without = spec;
  for (size_t i = 0; i < without.convs.size(); ++i) {
    Stage& stage = without.convs[i];
    const bool leads = spec.pre_activation && i == 0;
    stage.norm = leads && pre ? resnet_fused::Norm::running : resnet_fused::Norm::none;
    stage.relu = leads && stage.relu;
  }
  return without;
}

}  // namespace

at::Tensor Kernels::residual_block_infer(
    const at::Tensor& x, const std::optional<at::Tensor>& pre_scale, const std::optional<at::Tensor>& pre_shift,
    const std::vector<at::Tensor>& weights, const OptionalTensors& biases, const std::optional<at::Tensor>& skip_scale,
    const BlockSpec& given) {
  const BlockSpec spec = folded(given, pre_scale.has_value());
  const OptionalTensors none(weights.size());
  const BlockTensors tensors{x, std::nullopt, skip_scale, weights, biases, none, none, none, none};
  Block block(tensors, spec);
  if (pre_scale) {
    // as a norm of mean 0 and variance 1
    block.write_table(
        0, {{block.plan.zero(), Scalar::f32, 0}, {}, block.vector(pre_scale), block.vector(pre_shift), 0});
    block.plan.barrier();
  }
  const int64_t last = block.last(), s = block.projection();
  std::vector<bool> relu;
  for (int64_t i = 0; i <= last; ++i)
    relu.push_back(given.pre_activation ? i < last && given.convs[i + 1].relu : given.convs[i].relu);

  Epilogue e;
  e.relu = relu[last];
  if (spec.skip == Skip::identity) {
    e.residual = block.x.const_data_ptr();
    e.residual_scale = block.scale(skip_scale);
  }
  std::optional<at::Tensor> out;
  if (given.how.launch != Launch::phased) out = chain(block, e, relu);
  if (!out) {
    if (spec.has_projection()) {
      block.y[s] = block.convolve(s, {}, -1);
      e.residual = block.y[s].const_data_ptr();
    }
    for (int64_t i = 0; i <= last; ++i) {
      if (i > 0 || (i == last && spec.has_projection())) block.plan.barrier();
      Epilogue between;
      between.relu = relu[i];
      block.y[i] = block.convolve(i, i == last ? e : between, -1);
      if (i > 0) block.y[i - 1].reset();
    }
    out = block.y[last];
  }
  block.plan.launch();
  return out->contiguous(result_format(x, weights, given));
}

}  // namespace resnet_fused::cuda
