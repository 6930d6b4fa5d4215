#include "block.h"

#include <algorithm>

#include "../../block/integer_division.h"
#include "limits.h"

namespace resnet_fused::cuda {
namespace {

// NHWC memory that begins at a multiple of 16 bytes; that of a slice may not.
at::Tensor in_memory(const at::Tensor& t) {
  const at::Tensor last = t.contiguous(kLayout);
  return aligned(last.const_data_ptr()) ? last : last.clone(kLayout);
}

}  // namespace

BlockPlan::BlockPlan(const BlockTensors& tensors, const BlockSpec& spec)
    : tensors(tensors),
      spec(spec),
      x(in_memory(tensors.x)),
      y(spec.convs.size()),
      stats(spec.convs.size()),
      plan(x, spec.how.launch),
      tables_(spec.convs.size()) {
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto& w = tensors.weights[i];
    const Stage& stage = spec.convs[i];
    weights.push_back(in_memory(w));
    library_.push_back(stage.library || !has_kernel(w.size(0), w.size(1), stage.groups));
    TORCH_CHECK_VALUE(!stage.pads_values(), "resnet_fused's CUDA kernels pad with zeros only; use another backend");
    const Size in = spec.from_x(static_cast<int64_t>(i)) ? Size{x.size(2), x.size(3)} : sizes.back();
    Size out;
    for (int d = 0; d < 2; ++d)
      out[d] = (in[d] + 2 * stage.padding[d] - stage.dilation[d] * (w.size(2 + d) - 1) - 1) / stage.stride[d] + 1;
    sizes.push_back(out);
    const auto reason = too_large(
        x.size(0), std::max(w.size(0), w.size(1) * stage.groups), {in[0], in[1]}, {out[0], out[1]},
        {stage.stride[0], stage.stride[1]}, {stage.padding[0], stage.padding[1]});
    TORCH_CHECK_VALUE(
        !reason, "resnet_fused's CUDA kernels ", reason.value_or(""), "; use a smaller input or another backend");
  }
}

int64_t BlockPlan::norm_channels(int64_t norm) const {
  if (spec.order != Order::pre) return width(norm);
  return norm == 0 ? x.size(1) : width(norm - 1);
}

at::Tensor BlockPlan::activation(int64_t channels, Size size) const {
  return at::empty({x.size(0), channels, size[0], size[1]}, x.options(), kLayout);
}
at::Tensor BlockPlan::filled_later(at::IntArrayRef shape, at::ScalarType type) const {
  return at::empty(shape, x.options().dtype(type), at::MemoryFormat::Contiguous);
}

Vector BlockPlan::scale(const std::optional<at::Tensor>& t) {
  Vector v = vector(t);
  v.stride = t && t->numel() > 1 ? 1 : 0;
  return v;
}

Act BlockPlan::act(int64_t stage) {
  if (stage == kNone) return {};
  return {spec.convs[stage].act, scale(tensors.slopes[stage])};
}

Norm BlockPlan::norm(int64_t stage) {
  if (stage == kNone || !spec.convs[stage].normalizes()) return {};
  Norm n;
  if (spec.uses_batch(stage)) {
    if (stats[stage].defined()) {
      const float* values = stats[stage].const_data_ptr<float>();
      n.mean = {values, Scalar::f32, 1};
      n.var = {values + stats[stage].size(1), Scalar::f32, 1};
    }
  } else {
    n.mean = vector(tensors.running_means[stage]);
    n.var = vector(tensors.running_vars[stage]);
  }
  n.gamma = vector(tensors.norm_weights[stage]);
  n.beta = vector(tensors.norm_biases[stage]);
  n.eps = spec.convs[stage].eps;
  return n;
}

float* BlockPlan::table(int64_t norm) {
  if (!tables_[norm].defined()) tables_[norm] = filled_later({kTableRows, norm_channels(norm)}, at::kFloat);
  return tables_[norm].mutable_data_ptr<float>();
}

Input BlockPlan::source(int64_t conv) {
  Input in{operand_of(input(conv)), input(conv), input_size(conv)};
  const int64_t n = spec.convs[conv].input_stage;
  if (n == kNone) return in;
  in.operand.relu = is_relu(spec.convs[n].act);
  if (!in.operand.relu) in.act = act(n);
  if (spec.convs[n].normalizes()) {
    in.operand.source = Source::normalize;
    in.operand.table = table(n);
  }
  return in;
}

// --- phases ----------------------------------------------------------------------------------------------------------

void BlockPlan::hold(const Input& input) {
  plan.hold(input.tensor);
  plan.hold(input.y);
}

void BlockPlan::write_tables(const std::vector<int64_t>& norms) {
  for (const int64_t n : norms) write_table(n, norm(n));
}

void BlockPlan::write_table(int64_t norm, const Norm& of) { add_table(plan, of, table(norm), norm_channels(norm)); }

Geometry BlockPlan::geometry(int64_t conv) const {
  const Stage& stage = spec.convs[conv];
  Geometry g;
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = static_cast<int>(weights[conv].size(2 + d));
    g.stride[d] = static_cast<int>(stage.stride[d]);
    g.padding[d] = static_cast<int>(stage.padding[d]);
    g.dilation[d] = static_cast<int>(stage.dilation[d]);
  }
  return g;
}

namespace {

// As many buffers as leave room for two workers per SM, which hide each other's waits; else as many as one may have.
void choose_buffers(const Plan& plan, Phase& phase, int32_t& buffers) {
  for (const int room : {plan.shared_budget(), plan.device().shared_worker})
    for (buffers = 4; buffers >= 2; --buffers)
      if (plan.shared(phase) <= room) return;
}

// The larger tile where it leaves work for every worker, and room for two workers per SM.
void choose_tile(const Plan& plan, Phase& phase, TileShape& tile, bool enough) {
  tile = enough ? TileShape::large : TileShape::small;
  if (plan.shared(phase) > plan.shared_budget()) tile = TileShape::small;
}

}  // namespace

Product BlockPlan::product(int64_t conv, const Input& source, bool transposed) {
  const at::Tensor& w = weights[conv];
  Product p;
  p.source = source.operand;
  p.weight = w.const_data_ptr();
  p.source_height = static_cast<int>(source.size[0]);
  p.source_width = static_cast<int>(source.size[1]);
  p.result_channels = static_cast<int>(transposed ? w.size(1) : w.size(0));
  p.geometry = geometry(conv);
  return p;
}

void BlockPlan::convolution_phase(
    const Input& source, int64_t conv, bool transposed, at::Tensor& result, Size size, Epilogue epilogue) {
  Phase phase;
  phase.kind = Kind::convolution;
  phase.convolution = Convolution();
  Convolution& c = phase.convolution;
  c.product = product(conv, source, transposed);
  const int64_t channels = c.product.result_channels;
  result = activation(channels, size);
  c.batch = static_cast<int>(x.size(0));
  c.height = static_cast<int>(size[0]);
  c.width = static_cast<int>(size[1]);
  for (int d = 0; d < 2; ++d) c.classes[d] = transposed ? c.product.geometry.stride[d] : 1;
  c.class_height = static_cast<int>(ceil_div(c.height, c.classes[0]));
  c.class_width = static_cast<int>(ceil_div(c.width, c.classes[1]));
  const int64_t rows = int64_t{c.batch} * c.class_height * c.class_width;
  const int64_t tiles = ceil_div(rows, 128) * c.classes[0] * c.classes[1] * ceil_div(channels, 64);
  choose_tile(plan, phase, c.tile, tiles >= plan.most_workers());
  c.class_tiles = static_cast<int>(ceil_div(rows, c.tile == TileShape::large ? 128 : 64));
  c.per_image = Divisor(int64_t{c.class_height} * c.class_width);
  c.per_row = Divisor(c.class_width);
  c.transposed = transposed;
  c.tf32 = spec.how.tf32;
  const int64_t blocks = ceil_div(channels, 64);
  hold(source);
  epilogue.out = plan.hold(result).mutable_data_ptr();
  complete(plan, epilogue, channels, pixels(size), blocks);
  c.epilogue = epilogue;
  choose_buffers(plan, phase, c.buffers);
  plan.add(phase, blocks * c.class_tiles * c.classes[0] * c.classes[1]);
}

at::Tensor BlockPlan::convolve(int64_t conv, Epilogue epilogue, int64_t norm) {
  const Stage& stage = spec.convs[conv];
  if (norm != kNone) {
    const int64_t channels = norm_channels(norm);
    stats[norm] = filled_later({2, channels}, at::kFloat);
    epilogue.reduce = Reduce::statistics;
    Reduction& r = epilogue.reduction;
    r.stats = stats[norm].mutable_data_ptr<float>();
    r.table = table(norm);
    r.norm = this->norm(norm);
  }
  at::Tensor result;
  if (!in_library(conv)) {
    epilogue.bias = vector(tensors.biases[conv]);
    convolution_phase(product_source(conv), conv, false, result, sizes[conv], epilogue);
    return result;
  }
  const Input p = materialize(source(conv));
  plan.launch();
  const at::Tensor computed = at::convolution(
                                  p.tensor, weights[conv], tensors.biases[conv], stage.stride, stage.padding,
                                  stage.dilation, false, {0, 0}, stage.groups)
                                  .contiguous(kLayout);
  if (only_stores(epilogue)) return computed;
  const bool changes = epilogue.act.kind != ActivationKind::identity || epilogue.residual != nullptr;
  result = changes ? activation(width(conv), sizes[conv]) : computed;
  epilogue.out = changes ? result.mutable_data_ptr() : nullptr;
  plan.hold(result);
  pass(input_of(computed), epilogue);
  plan.barrier();
  return result;
}

at::Tensor BlockPlan::data_gradient(int64_t conv, const Input& dy, Epilogue epilogue) {
  at::Tensor result;
  if (!in_library(conv)) {
    convolution_phase(dy, conv, true, result, input_size(conv), epilogue);
    return result;
  }
  const Stage& stage = spec.convs[conv];
  plan.launch();
  const at::Tensor dp =
      std::get<0>(at::convolution_backward(
                      dy.tensor, input(conv), weights[conv], std::nullopt, stage.stride, stage.padding, stage.dilation,
                      false, {0, 0}, stage.groups, {true, false, false}))
          .contiguous(kLayout);
  if (only_stores(epilogue)) return dp;
  const bool changes = epilogue.mask != Mask::none || epilogue.residual != nullptr;
  result = changes ? at::empty_like(dp) : dp;
  epilogue.out = changes ? result.mutable_data_ptr() : nullptr;
  plan.hold(result);
  pass(input_of(dp), epilogue);
  return result;
}

at::Tensor BlockPlan::weight_gradient(int64_t conv, const Input& dy) {
  const Stage& stage = spec.convs[conv];
  const at::Tensor& w = weights[conv];
  if (in_library(conv)) {
    const Input p = materialize(source(conv));
    plan.launch();
    return std::get<1>(at::convolution_backward(
        dy.tensor, p.tensor, w, std::nullopt, stage.stride, stage.padding, stage.dilation, false, {0, 0}, stage.groups,
        {false, true, false}));
  }
  const Input p = product_source(conv);
  const at::Tensor dw = plan.hold(at::empty(w.sizes(), w.options(), kLayout));
  hold(p);
  hold(dy);
  Phase phase;
  phase.kind = Kind::weight_gradient;
  phase.weight_gradient = WeightGradient();
  WeightGradient& g = phase.weight_gradient;
  g.dy = dy.operand;
  g.source = p.operand;
  g.dweight = dw.mutable_data_ptr();
  g.source_height = static_cast<int>(p.size[0]);
  g.source_width = static_cast<int>(p.size[1]);
  g.batch = static_cast<int>(x.size(0));
  g.height = static_cast<int>(sizes[conv][0]);
  g.width = static_cast<int>(sizes[conv][1]);
  g.per_image = Divisor(int64_t{g.height} * g.width);
  g.per_row = Divisor(g.width);
  g.geometry = geometry(conv);
  g.tf32 = spec.how.tf32;
  choose_tile(plan, phase, g.tile, w.size(0) >= 128);
  const int64_t depth = 128 / x.element_size(), rows = g.tile == TileShape::large ? 128 : 64;
  const int64_t tiles = ceil_div(w.size(0), rows) * w.size(2) * w.size(3) * ceil_div(w.size(1), 64);
  // work for every worker, but no split shorter than 8 steps: each costs a float32 partial
  const int64_t splits = std::min(plan.most_workers() / tiles, pixels(sizes[conv]) / (8 * depth));
  g.splits = static_cast<int>(std::max<int64_t>(1, splits));
  if (g.splits > 1) {
    g.partials = plan.scratch<float>(g.splits * w.numel());
    g.tickets = plan.tickets(tiles);
  }
  choose_buffers(plan, phase, g.buffers);
  plan.add(phase, tiles * g.splits);
  return dw;
}

void BlockPlan::pass(const Input& input, const Epilogue& epilogue) {
  hold(input);
  add_pass(plan, input.operand, pixels(input.size), epilogue);
}

Input BlockPlan::materialize(const Input& input) {
  if (!input.computed()) return input;
  const at::Tensor out = activation(input.operand.channels, input.size);
  Epilogue e;
  set_act(e, input.act);
  e.out = out.mutable_data_ptr();
  plan.hold(out);
  pass(input, e);
  plan.barrier();
  return {operand_of(out), out, input.size};
}

Input BlockPlan::product_source(int64_t conv) {
  const Input p = source(conv);
  return p.act.is_identity() ? p : materialize(p);
}

}  // namespace resnet_fused::cuda
