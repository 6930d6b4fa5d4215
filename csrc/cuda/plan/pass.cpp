#include "pass.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "../../block/integer_division.h"

namespace resnet_fused::cuda {
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Vector vector_of(Plan& plan, const std::optional<at::Tensor>& t) {
  if (!t) return {};
  return {plan.keep(t->contiguous()).const_data_ptr(), scalar_of(*t), 1};
}

Operand operand_of(const at::Tensor& u) {
  Operand o;
  o.x = u.const_data_ptr();
  o.channels = static_cast<int>(u.size(1));
  o.wide = u.size(1) % 8 == 0 && aligned(o.x);
  return o;
}

void complete(Plan& plan, Epilogue& e, int64_t channels, int64_t pixels, int64_t blocks) {
  e.channels = static_cast<int>(channels);
  e.wide = channels % 8 == 0;
  for (const void* p : {static_cast<const void*>(e.out), e.residual, e.y, e.s, static_cast<const void*>(e.dx)})
    e.wide = e.wide && aligned(p);
  if (e.mask == Mask::by_out) e.wide = e.wide && aligned(e.mask_by);
  if (e.reduce == Reduce::none) return;
  const int64_t lanes = std::max<int64_t>(1, plan.most_workers() / std::min<int64_t>(blocks, plan.most_workers()));
  e.reduction.partials = plan.scratch<double>(lanes * 3 * channels);
  e.reduction.tickets = plan.tickets(blocks);
  e.reduction.rows = static_cast<double>(pixels);
}

bool only_stores(const Epilogue& e) {
  return e.residual == nullptr && e.act.kind == ActivationKind::identity && e.mask == Mask::none &&
         e.reduce == Reduce::none && e.factor.data == nullptr && e.norm.mean.data == nullptr && e.dx == nullptr &&
         e.bits == nullptr;
}

void add_pass(Plan& plan, const Operand& input, int64_t pixels, Epilogue epilogue) {
  Phase phase;
  phase.kind = Kind::pointwise;
  phase.pointwise = Pointwise();
  Pointwise& p = phase.pointwise;
  p.source = input;
  p.pixels = pixels;
  const int64_t packs = ceil_div(input.channels, 8);
  while (p.packs_log2 < 4 && (1 << p.packs_log2) < packs) ++p.packs_log2;
  const int64_t blocks = ceil_div(packs, 1 << p.packs_log2);
  complete(plan, epilogue, input.channels, pixels, blocks);
  p.epilogue = epilogue;
  plan.add(phase, blocks * ceil_div(pixels, 2 * (kThreads >> p.packs_log2)));
}

void add_table(
    Plan& plan, const Norm& norm, float* table, int64_t channels, bool gradient, const double* sums, double rows) {
  Phase phase;
  phase.kind = Kind::table;
  phase.table = {norm, table, sums, rows, static_cast<int>(channels), gradient};
  plan.add(phase, ceil_div(channels, kThreads));
}

}  // namespace resnet_fused::cuda
