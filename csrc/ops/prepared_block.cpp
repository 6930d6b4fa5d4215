// torch.classes.resnet_fused.PreparedBlock, several of them that follow one another, and the operators that run them:
// evaluation on the CPU by the engine. resnet_fused/backends/prepared.py makes them.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "../cpu/engine/mean_over_pixels.h"
#include "../cpu/engine/prepared_block.h"
#include "operators.h"

namespace resnet_fused {
namespace {

using cpu::engine::PreparedBlock;
using Prepared = c10::intrusive_ptr<PreparedBlock>;

Prepared prepare(
    const std::vector<at::Tensor>& weights, const OptionalList& factors, const std::vector<at::Tensor>& scales,
    const std::vector<at::Tensor>& shifts, const std::optional<at::Tensor>& pre_scale,
    const std::optional<at::Tensor>& pre_shift, const OptionalList& slopes,
    const std::optional<at::Tensor>& branch_scale, const std::optional<at::Tensor>& skip_scale,
    const std::vector<int64_t>& pool, const std::vector<int64_t>& ints, const std::vector<double>& floats,
    at::ScalarType dtype) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto spec = BlockSpec::decode(ints, floats);
  for (const size_t entries : {weights.size(), factors.size(), scales.size(), shifts.size(), slopes.size()})
    TORCH_CHECK_VALUE(entries == spec.convs.size(), "every list of tensors needs one entry for each convolution");
  for (const auto& w : weights)
    TORCH_CHECK_VALUE(w.dim() == 4 && w.numel() > 0, "weights must be [out, in / groups, R, S], got ", w.sizes());
  TORCH_CHECK_VALUE(
      pool.empty() || (pool.size() == 3 && spec.skip == Skip::none && pool[0] >= 1 && pool[1] >= 1 && pool[2] >= 0 &&
                       2 * pool[2] <= pool[0]),
      "pooling behind a block without a skip path is [kernel, stride, padding], got ", pool);
  return PreparedBlock::prepare(
      {weights, to_vector(factors), scales, shifts, pre_scale, pre_shift, to_vector(slopes), branch_scale, skip_scale,
       pool},
      std::move(spec), dtype);
}

std::optional<at::Tensor> run(const at::Tensor& x, const Prepared& block, const std::optional<at::Tensor>& residual) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto out = block->run(x, residual);
  if (!out.defined()) return std::nullopt;
  return out;
}

struct PreparedBlocks : torch::CustomClassHolder {
  PreparedBlocks(std::vector<Prepared> given, std::optional<Prepared> linear)
      : blocks(std::move(given)), head(std::move(linear)) {}
  std::vector<Prepared> blocks;
  std::optional<Prepared> head;  // a pointwise convolution of their result's mean over all pixels
};

// What the first blocks compute one after the other, and how many they are: fewer than all where PyTorch has to compute
// the next one. The head counts as one.
std::tuple<at::Tensor, int64_t> run_all(const at::Tensor& given, const c10::intrusive_ptr<PreparedBlocks>& all) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor x = given;
  int64_t count = 0;
  const auto run_next = [&](PreparedBlock& block, const at::Tensor& input) {
    auto out = block.run(input, std::nullopt);
    if (!out.defined()) return false;
    x = std::move(out);
    ++count;
    return true;
  };
  bool runs = true;
  for (const auto& block : all->blocks) runs = runs && run_next(*block, x);
  if (runs && all->head) run_next(**all->head, cpu::engine::mean_over_pixels(x));
  return {count == 0 ? given.clone() : x, count};  // an operator's result is no alias of its input
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.class_<PreparedBlock>("PreparedBlock")
      .def(torch::init(&prepare))
      .def("finite", [](const Prepared& self) { return self->finite(); })
      .def("describe", [](const Prepared& self, int64_t images, int64_t height, int64_t width) {
        return self->describe(images, height, width);
      });
  m.def(
      "residual_block_prepared(Tensor x, __torch__.torch.classes.resnet_fused.PreparedBlock block, Tensor? residual) "
      "-> "
      "Tensor?");
  m.class_<PreparedBlocks>("PreparedBlocks").def(torch::init<std::vector<Prepared>, std::optional<Prepared>>());
  m.def(
      "residual_blocks_prepared(Tensor x, __torch__.torch.classes.resnet_fused.PreparedBlocks blocks) -> (Tensor, "
      "int)");
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("residual_block_prepared", &run);
  m.impl("residual_blocks_prepared", &run_all);
}

}  // namespace resnet_fused
