// Training, forward, on a GPU: which phases it is made of. The formula and its symbols are those of
// docs/architecture.md.
#include "residual_block.h"

#include "../../block/result_format.h"
#include "block.h"

namespace resnet_fused::cuda {
namespace {

// out = act(branch_scale norm_n(y_n) + skip_scale S), or branch_scale act(norm_n(y_n)) + skip_scale S
at::Tensor join(BlockPlan& block) {
  const BlockSpec& spec = block.spec;
  const int64_t last = block.last(), s = block.projection();
  const at::Tensor& y = block.y[last];
  if (spec.order == Order::pre && spec.skip == Skip::none && !block.tensors.branch_scale)
    return y;  // then it is not saved
  Epilogue e;
  const at::Tensor out = block.activation(block.width(last), block.sizes[last]);
  e.out = out.mutable_data_ptr();
  e.norm = block.norm(spec.output_norm(last));
  e.factor = block.scale(block.tensors.branch_scale);
  e.act_first = spec.join == JoinReads::branch;
  if (spec.order != Order::pre) set_act(e, block.act(last));
  if (spec.skip != Skip::none) {
    const at::Tensor& skip = spec.has_projection() ? block.y[s] : block.x;
    e.residual = skip.const_data_ptr();
    e.residual_scale = block.scale(block.tensors.skip_scale);
    if (spec.has_projection()) e.residual_norm = block.norm(spec.output_norm(s));
  }
  block.pass(block.input_of(y), e);
  return out;
}

}  // namespace

BlockForward Kernels::residual_block_forward(const BlockTensors& tensors, const BlockSpec& spec) {
  BlockPlan block(tensors, spec);
  std::vector<int64_t> known;
  for (size_t i = 0; i < spec.convs.size(); ++i)
    if (spec.convs[i].statistics == Statistics::running) known.push_back(static_cast<int64_t>(i));
  block.write_tables(known);
  if (spec.order == Order::pre && spec.uses_batch(0)) {
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
      const int64_t norm = spec.output_norm(conv);
      return spec.uses_batch(norm) ? norm : kNone;
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
    if (spec.convs[i].saved) result.conv_outputs.push_back(block.y[i]);
    if (spec.uses_batch(static_cast<int64_t>(i))) result.batch_stats.push_back(block.stats[i]);
  }
  return result;
}

}  // namespace resnet_fused::cuda
