// act(batch_norm(x) + residual) on a GPU: the passes around a convolution, each an operator; see ../batch_norm_act.h.
#include "../../ops/batch_norm_act.h"

#include <ATen/ATen.h>

#include "../../block/kernel_layout.h"
#include "pass.h"

namespace resnet_fused::cuda {
namespace {

int64_t pixels(const at::Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

at::Tensor new_like(const at::Tensor& x) { return at::empty(x.sizes(), x.options(), kLayout); }

Norm norm_of(Plan& plan, const BatchNorm& norm) {
  return {
      vector_of(plan, norm.mean), vector_of(plan, norm.var), vector_of(plan, norm.weight), vector_of(plan, norm.bias),
      norm.eps};
}

void mask_by(Plan& plan, Epilogue& e, const std::optional<at::Tensor>& mask) {
  if (!mask) return;
  e.mask = Mask::by_bits;
  e.mask_by = plan.keep(*mask).const_data_ptr();
}

struct Kernels {
  static at::Tensor batch_statistics(const at::Tensor& x) {
    Plan plan(x, Launch::phased);
    const at::Tensor stats = at::empty({2, x.size(1)}, x.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
    Epilogue e;
    e.reduce = Reduce::statistics;
    e.reduction.stats = stats.mutable_data_ptr<float>();
    add_pass(plan, operand_of(plan.keep(x.contiguous(kLayout))), pixels(x), e);
    plan.launch();
    return stats;
  }

  static std::tuple<at::Tensor, at::Tensor> normalize_act(
      const at::Tensor& x, const BatchNorm& norm, const std::optional<at::Tensor>& residual, bool relu,
      bool save_mask) {
    Plan plan(x, Launch::phased);
    const at::Tensor out = new_like(x);
    const auto mask = at::empty(
        save_mask ? mask_sizes(x) : std::vector<int64_t>{0}, x.options().dtype(at::kByte),
        at::MemoryFormat::Contiguous);
    Epilogue e;
    e.norm = norm_of(plan, norm);
    if (residual) e.residual = plan.keep(residual->contiguous(kLayout)).const_data_ptr();
    if (relu) e.act.kind = ActivationKind::relu;
    e.out = out.mutable_data_ptr();
    if (save_mask) e.bits = mask.mutable_data_ptr<uint8_t>();
    add_pass(plan, operand_of(plan.keep(x.contiguous(kLayout))), pixels(x), e);
    plan.launch();
    return {in_format_of(x, out), mask};
  }

  static at::Tensor normalize_act_backward_reduce(
      const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean) {
    Plan plan(x, Launch::phased);
    const at::Tensor sums = at::empty({2, x.size(1)}, x.options().dtype(at::kDouble), at::MemoryFormat::Contiguous);
    Epilogue e;
    mask_by(plan, e, mask);
    e.y = plan.keep(x.contiguous(kLayout)).const_data_ptr();
    e.y_norm.mean = vector_of(plan, mean);
    e.reduce = Reduce::sums;
    e.reduction.sums = sums.mutable_data_ptr<double>();
    add_pass(plan, operand_of(plan.keep(dout.contiguous(kLayout))), pixels(x), e);
    plan.launch();
    return sums;
  }

  static std::tuple<at::Tensor, at::Tensor> normalize_act_backward_apply(
      const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const BatchNorm& norm,
      const std::optional<at::Tensor>& sums, double count, bool save_dz) {
    Plan plan(x, Launch::single);
    const int64_t channels = x.size(1);
    const at::Tensor dx = new_like(x), dz = save_dz ? new_like(x) : at::empty({0}, x.options());
    float* const table = plan.scratch<float>(kTableRows * channels);
    const Norm n = norm_of(plan, norm);
    const double* const given = sums ? plan.keep(sums->contiguous()).const_data_ptr<double>() : nullptr;
    add_table(plan, n, table, channels, true, given, count);
    plan.barrier();
    Epilogue e;
    mask_by(plan, e, mask);
    if (save_dz) e.out = dz.mutable_data_ptr();
    e.dx = dx.mutable_data_ptr();
    e.dx_table = table;
    if (sums) {  // else the statistics are constants, and x is not read
      e.y = plan.keep(x.contiguous(kLayout)).const_data_ptr();
      e.y_norm = n;
    }
    add_pass(plan, operand_of(plan.keep(dout.contiguous(kLayout))), pixels(x), e);
    plan.launch();
    return {in_format_of(x, dx), save_dz ? in_format_of(x, dz) : dz};
  }
};

}  // namespace
}  // namespace resnet_fused::cuda

namespace resnet_fused {

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) { define_batch_norm_act(m, ".cuda"); }

TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  implement_batch_norm_act<cuda::Kernels>(m, "");
  implement_batch_norm_act<cuda::Kernels>(m, ".cuda");
}
TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { implement_batch_norm_act<cuda::Kernels>(m, ".cuda"); }

}  // namespace resnet_fused
