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
  if (spec.order == Order::pre) {
    if (spec.uses_batch(0)) stats[0] = batch_statistics<S>(block.x);
    block.set_norm(0, stats[0]);
  }
  at::Tensor first_input;  // P_1, which the projection reads as well
  for (int64_t i = 0; i < static_cast<int64_t>(spec.convs.size()); ++i) {
    const int64_t norm = spec.output_norm(i);
    const bool counts = norm != kNone && spec.uses_batch(norm);
    at::Tensor statistics;
    block.y[i] = block.convolved(i, counts ? &statistics : nullptr, spec.from_x(i) ? &first_input : nullptr);
    if (counts) stats[norm] = statistics.defined() ? statistics : batch_statistics<S>(block.y[i]);
    if (spec.convs[i].output_stage != kNone)
      block.set_norm(spec.convs[i].output_stage, norm == kNone ? at::Tensor() : stats[norm]);
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
