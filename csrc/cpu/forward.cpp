// Training, forward: conv, batch statistics, normalise + activate + add; each is one pass.
#include "../block/result_format.h"
#include "block.h"
#include "heap.h"
#include "residual_block.h"

namespace resnet_fused::cpu {
namespace {

template <class S>
BlockForward forward(const BlockTensors& tensors, const BlockSpec& spec) {
  Block<S> block(tensors, spec);
  std::vector<at::Tensor> stats(spec.convs.size());
  const auto set_norm = [&](int64_t stage, const at::Tensor& u) {
    if (spec.uses_batch(stage)) stats[stage] = batch_statistics<S>(u);
    block.set_norm(stage, stats[stage]);
  };

  at::Tensor first_input;
  for (int64_t i = 0; i < spec.stages; ++i) {
    if (spec.order == Order::pre) set_norm(i, block.input(i));
    const auto p = block.conv_input(i);
    if (i == 0) first_input = p;
    block.y[i] = block.conv(i, p);
    if (spec.order != Order::pre) set_norm(i, block.y[i]);
  }
  if (spec.has_projection()) {
    const int64_t s = spec.projection();
    block.y[s] = block.conv(s, spec.convs[s].input_stage == kNone ? block.x : first_input);
    if (spec.output_norm(s) != kNone) set_norm(s, block.y[s]);
  }
  first_input.reset();

  BlockForward result;
  const Join<S> join(block);
  result.out = normalize<S>(block.y[spec.last()], join.norm, join.act, join.residual)
                   .contiguous(result_format(tensors.x, tensors.weights, spec));
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    if (spec.convs[i].saved) result.conv_outputs.push_back(block.y[i]);
    if (stats[i].defined()) result.batch_stats.push_back(stats[i]);
  }
  return result;
}

}  // namespace

BlockForward residual_block_forward(const BlockTensors& block, const BlockSpec& spec) {
  keep_freed_memory();
  return DISPATCH(block.x, [&] { return forward<scalar_t>(block, spec); });
}

}  // namespace resnet_fused::cpu
