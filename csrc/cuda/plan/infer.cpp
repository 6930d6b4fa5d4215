// Evaluation on a GPU: the whole block tile by tile on the chip, or phases.
#include "residual_block.h"

#include <algorithm>

#include "../../block/integer_division.h"
#include "../../block/result_format.h"
#include "block.h"

namespace resnet_fused::cuda {
namespace {

// Adds the phase that runs the whole block tile by tile on the chip and returns its result; nullopt where it cannot.
std::optional<at::Tensor> chain(BlockPlan& block, const Epilogue& epilogue, const std::vector<Act>& acts) {
  const BlockSpec& spec = block.spec;
  const int64_t last = block.last(), s = block.projection();
  if (spec.stages < 2 || spec.stages > Chain::kMost) return std::nullopt;
  for (size_t i = 0; i < spec.convs.size(); ++i)
    if (block.in_library(static_cast<int64_t>(i))) return std::nullopt;
  // the projection's product is added to the last convolution's: nothing can stand between them
  if (spec.has_projection() && epilogue.act_first) return std::nullopt;
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
    stage.act = acts[i].kind;
    stage.slopes = acts[i].slopes;
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
  for (c.buffers = 4; c.buffers > 2; --c.buffers)
    if (block.plan.shared(phase) <= block.plan.shared_budget()) break;
  if (block.plan.shared(phase) > block.plan.device().shared_worker) return std::nullopt;
  const Input first = block.product_source(0);
  c.stage[0].product.source = first.operand;
  if (spec.has_projection()) c.projection.source = first.operand;
  block.plan.hold(first.tensor);
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
    const bool leads = spec.order == Order::pre && i == 0;
    stage.statistics = leads && pre ? Statistics::running : Statistics::none;
    if (!leads) stage.act = {};
  }
  return without;
}

}  // namespace

at::Tensor Kernels::residual_block_infer(const FoldedBlock& given, const BlockSpec& of) {
  const BlockSpec spec = folded(of, given.pre_scale.has_value());
  const auto& [x, pre_scale, pre_shift, weights, biases, branch_scale, skip_scale, slopes, residual] = given;
  TORCH_CHECK_NOT_IMPLEMENTED(!residual, "a residual in place of a skip path is added on the CPU only; add it behind");
  const OptionalTensors none(weights.size());
  const BlockTensors tensors{x, branch_scale, skip_scale, weights, biases, none, none, none, none, slopes};
  BlockPlan block(tensors, spec);
  if (pre_scale) {
    // as a norm of mean 0 and variance 1
    block.write_table(
        0, {{block.plan.zero(), Scalar::f32, 0}, {}, block.vector(pre_scale), block.vector(pre_shift), 0});
    block.plan.barrier();
  }
  const int64_t last = block.last(), s = block.projection();
  std::vector<Act> acts;  // behind each convolution
  for (int64_t i = 0; i <= last; ++i) {
    const int64_t stage = of.convs[i].output_stage;
    acts.push_back(stage == kNone ? Act() : Act{of.convs[stage].act, block.scale(slopes[stage])});
  }

  Epilogue e;
  set_act(e, acts[last]);
  if (of.join == JoinReads::branch) {
    e.act_first = true;
    e.factor = block.scale(branch_scale);
  }
  if (spec.skip == Skip::identity) {
    e.residual = block.x.const_data_ptr();
    e.residual_scale = block.scale(skip_scale);
  }
  std::optional<at::Tensor> out;
  if (spec.how.launch != Launch::phased) out = chain(block, e, acts);
  if (!out) {
    if (spec.has_projection()) {
      block.y[s] = block.convolve(s, {}, kNone);
      e.residual = block.y[s].const_data_ptr();
    }
    for (int64_t i = 0; i <= last; ++i) {
      if (i > 0 || (i == last && spec.has_projection())) block.plan.barrier();
      Epilogue between;
      set_act(between, acts[i]);
      block.y[i] = block.convolve(i, i == last ? e : between, kNone);
      if (i > 0) block.y[i - 1].reset();
    }
    out = block.y[last];
  }
  block.plan.launch();
  return out->contiguous(result_format(x, weights, of));
}

}  // namespace resnet_fused::cuda
