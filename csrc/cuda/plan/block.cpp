#include "block.h"

#include <algorithm>

namespace resnet_fused::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// NHWC memory that begins at a multiple of 16 bytes, which a slice may not do.
at::Tensor in_memory(const at::Tensor& t) {
  const at::Tensor last = t.contiguous(kLast);
  return aligned(last.const_data_ptr()) ? last : last.clone(kLast);
}

// Activations of one launch up to here, several beyond, each with the library's convolutions between them. Derived, not
// measured: batch 32 of a ResNet-50 at 224 pixels is to stay below in every block, because there launches are a large
// part of the time.
constexpr int64_t kSingleLaunchBytes = 128 << 20;

Launch choose_launch(const at::Tensor& x, const std::vector<at::Tensor>& weights, const How& how) {
  if (how.launch != Launch::choose) return how.launch;
  int64_t widest = 0;
  for (const auto& w : weights) widest = std::max(widest, w.size(0));
  const int64_t bytes = x.element_size() * (x.numel() + x.numel() / x.size(1) * widest);
  return bytes <= kSingleLaunchBytes ? Launch::single : Launch::phased;
}

// These kernels have no groups and read 8 channels at a time. A tile of a product has 64 channels a side, so what has
// few would mostly multiply zeros.
bool left_to_library(const at::Tensor& weight, const Stage& stage, Launch launch, Library library) {
  if (stage.groups > 1 || weight.size(0) % 8 != 0 || weight.size(1) % 8 != 0) return true;
  const bool spatial = weight.size(2) * weight.size(3) > 1;
  switch (library) {
    case Library::none:
      return false;
    case Library::spatial:
      return spatial;
    case Library::all:
      return true;
    default:
      return std::min(weight.size(0), weight.size(1)) < 16 || (spatial && launch == Launch::phased);
  }
}

// Rows and columns of a picture are counted in 14 bits, pixels and the values that a tile's images span in 31.
void check_size(int64_t batch, int64_t channels, Size in, Size out, const Stage& stage) {
  const int64_t pixels = std::max(in[0] * in[1], out[0] * out[1]);
  const int64_t fewest = std::min(out[0] * out[1], ceil_div(in[0], stage.stride[0]) * ceil_div(in[1], stage.stride[1]));
  for (int d = 0; d < 2; ++d)
    TORCH_CHECK_VALUE(
        in[d] + 2 * stage.padding[d] < 1 << 14,
        "resnet_fused's CUDA kernels take pictures of up to 16383 rows and columns with their padding, got ", in[d],
        " and twice ", stage.padding[d], "; use another backend");
  TORCH_CHECK_VALUE(
      pixels * channels <= 1 << 29 && (128 / fewest + 2) * pixels * channels < int64_t{1} << 31 &&
          batch * pixels <= 1 << 30,
      "resnet_fused's CUDA kernels count tiles in 32 bits: up to 2^30 pixels a batch and about 2^29 values an image, "
      "got ",
      batch, " images of ", channels, "x", in[0], "x", in[1], "; use smaller batches or another backend");
}

}  // namespace

Block::Block(const BlockTensors& tensors, const BlockSpec& spec)
    : tensors(tensors),
      spec(spec),
      x(in_memory(tensors.x)),
      y(spec.convs.size()),
      stats(spec.convs.size()),
      plan(x, choose_launch(x, tensors.weights, spec.how)),
      tables_(spec.convs.size()) {
  const Launch launch = choose_launch(x, tensors.weights, spec.how);
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const auto& w = tensors.weights[i];
    const Stage& stage = spec.convs[i];
    weights.push_back(in_memory(w));
    library_.push_back(left_to_library(w, stage, launch, spec.how.library));
    const Size in = from_x(static_cast<int64_t>(i)) ? Size{x.size(2), x.size(3)} : sizes.back();
    Size out;
    for (int d = 0; d < 2; ++d)
      out[d] = (in[d] + 2 * stage.padding[d] - stage.dilation[d] * (w.size(2 + d) - 1) - 1) / stage.stride[d] + 1;
    sizes.push_back(out);
    check_size(x.size(0), std::max(w.size(0), w.size(1) * stage.groups), in, out, stage);
  }
}

int64_t Block::input_norm(int64_t conv) const {
  if (conv == projection()) return spec.pre_activation ? 0 : -1;
  return spec.pre_activation ? conv : conv - 1;
}

int64_t Block::output_norm(int64_t conv) const {
  int64_t norm = conv;
  if (spec.pre_activation) {
    if (conv >= last()) return -1;
    norm = conv + 1;
  }
  return normalizes(norm) ? norm : -1;
}

int64_t Block::norm_channels(int64_t norm) const {
  if (!spec.pre_activation) return width(norm);
  return norm == 0 ? x.size(1) : width(norm - 1);
}

at::Tensor Block::activation(int64_t channels, Size size) const {
  return at::empty({x.size(0), channels, size[0], size[1]}, x.options(), kLast);
}
at::Tensor Block::filled_later(at::IntArrayRef shape, at::ScalarType type) const {
  return at::empty(shape, x.options().dtype(type), at::MemoryFormat::Contiguous);
}

Vector Block::scale(const std::optional<at::Tensor>& t) {
  Vector v = vector(t);
  v.stride = t && t->numel() > 1 ? 1 : 0;
  return v;
}

Norm Block::norm(int64_t stage) {
  if (!normalizes(stage)) return {};
  Norm n;
  if (uses_batch(stage)) {
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

float* Block::table(int64_t norm) {
  if (!tables_[norm].defined()) tables_[norm] = filled_later({kTableRows, norm_channels(norm)}, at::kFloat);
  return tables_[norm].mutable_data_ptr<float>();
}

Input Block::source(int64_t conv) {
  Input in{operand_of(input(conv)), input(conv), input_size(conv)};
  const int64_t n = input_norm(conv);
  if (n < 0) return in;
  in.operand.relu = spec.convs[n].relu;
  if (normalizes(n)) {
    in.operand.source = Source::normalize;
    in.operand.table = table(n);
  }
  return in;
}

// --- phases ----------------------------------------------------------------------------------------------------------

void Block::hold(const Input& input) {
  plan.hold(input.tensor);
  plan.hold(input.y);
}

void Block::write_tables(const std::vector<int64_t>& norms) {
  for (const int64_t n : norms) write_table(n, norm(n));
}

void Block::write_table(int64_t norm, const Norm& of) { add_table(plan, of, table(norm), norm_channels(norm)); }

Geometry Block::geometry(int64_t conv) const {
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

// As many stages as leave room for two workers an SM, which hide each other's waits; else as many as one may have.
void choose_stages(const Plan& plan, Phase& phase, int32_t& stages) {
  for (const int room : {plan.shared_budget(), plan.device().shared_worker})
    for (stages = 4; stages >= 2; --stages)
      if (plan.shared(phase) <= room) return;
}

// The larger tile where that leaves work for every worker, and room for two an SM.
void choose_tile(const Plan& plan, Phase& phase, TileShape& tile, bool enough) {
  tile = enough ? TileShape::large : TileShape::small;
  if (plan.shared(phase) > plan.shared_budget()) tile = TileShape::small;
}

}  // namespace

Product Block::product(int64_t conv, const Input& source, bool transposed) {
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

void Block::convolution_phase(
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
  choose_stages(plan, phase, c.stages);
  plan.add(phase, blocks * c.class_tiles * c.classes[0] * c.classes[1]);
}

at::Tensor Block::convolve(int64_t conv, Epilogue epilogue, int64_t norm) {
  const Stage& stage = spec.convs[conv];
  if (norm >= 0) {
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
    convolution_phase(source(conv), conv, false, result, sizes[conv], epilogue);
    return result;
  }
  const Input p = materialize(source(conv));
  plan.launch();
  const at::Tensor computed = at::convolution(
                                  p.tensor, weights[conv], tensors.biases[conv], stage.stride, stage.padding,
                                  stage.dilation, false, {0, 0}, stage.groups)
                                  .contiguous(kLast);
  if (only_stores(epilogue)) return computed;
  const bool changes = epilogue.relu || epilogue.residual != nullptr;
  result = changes ? activation(width(conv), sizes[conv]) : computed;
  epilogue.out = changes ? result.mutable_data_ptr() : nullptr;
  plan.hold(result);
  pass(input_of(computed), epilogue);
  plan.barrier();
  return result;
}

at::Tensor Block::data_gradient(int64_t conv, const Input& dy, Epilogue epilogue) {
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
          .contiguous(kLast);
  if (only_stores(epilogue)) return dp;
  const bool changes = epilogue.mask != Mask::none || epilogue.residual != nullptr;
  result = changes ? at::empty_like(dp) : dp;
  epilogue.out = changes ? result.mutable_data_ptr() : nullptr;
  plan.hold(result);
  pass(input_of(dp), epilogue);
  return result;
}

at::Tensor Block::weight_gradient(int64_t conv, const Input& dy) {
  const Stage& stage = spec.convs[conv];
  const at::Tensor& w = weights[conv];
  if (in_library(conv)) {
    const Input p = materialize(source(conv));
    plan.launch();
    return std::get<1>(at::convolution_backward(
        dy.tensor, p.tensor, w, std::nullopt, stage.stride, stage.padding, stage.dilation, false, {0, 0}, stage.groups,
        {false, true, false}));
  }
  const at::Tensor dw = plan.hold(at::empty(w.sizes(), w.options(), kLast));
  const Input p = source(conv);
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
  choose_stages(plan, phase, g.stages);
  plan.add(phase, tiles * g.splits);
  return dw;
}

void Block::pass(const Input& input, const Epilogue& epilogue) {
  hold(input);
  add_pass(plan, input.operand, pixels(input.size), epilogue);
}

Input Block::materialize(const Input& input) {
  if (!input.computed()) return input;
  const at::Tensor out = activation(input.operand.channels, input.size);
  Epilogue e;
  e.out = out.mutable_data_ptr();
  plan.hold(out);
  pass(input, e);
  plan.barrier();
  return {operand_of(out), out, input.size};
}

}  // namespace resnet_fused::cuda
