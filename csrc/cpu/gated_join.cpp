#include "gated_join.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include "../block/kernel_layout.h"
#include "passes.h"

namespace resnet_fused::cpu {
namespace {

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "gated_join", __VA_ARGS__)

// Row `k` of [N, rows, C]: a set of channels for each image.
template <class A>
std::vector<A> sets_of(const at::Tensor& rows, int64_t k) {
  return to_vector<A>(rows.select(1, k).contiguous());
}

template <class A>
NormVectors<A> norm_vectors(const at::Tensor& affine) {
  NormVectors<A> norm;
  norm.center = sets_of<A>(affine, 0);
  norm.scale = sets_of<A>(affine, 1);
  norm.shift = sets_of<A>(affine, 2);
  return norm;
}

template <class A>
ResidualInput<A> residual_of(const std::optional<at::Tensor>& skip) {
  if (!skip) return {};
  return {skip->contiguous(kLayout), nullptr, std::vector<A>(skip->size(1), A(1))};
}

at::Tensor new_like(const at::Tensor& y) { return at::empty(y.sizes(), y.options().memory_format(kLayout)); }

}  // namespace

at::Tensor image_statistics(const at::Tensor& x) {
  return DISPATCH(x, [&] { return image_statistics<scalar_t>(x.contiguous(kLayout)); });
}

at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& affine, const std::optional<at::Tensor>& skip, const JoinActivation& act) {
  return DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    return normalize<scalar_t>(
        y.contiguous(kLayout), norm_vectors<A>(affine), act_vectors<A>(act.act, act.slope, y.size(1)),
        residual_of<A>(skip));
  });
}

std::tuple<at::Tensor, at::Tensor> gated_join_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& out, const at::Tensor& y, const at::Tensor& affine,
    const std::optional<at::Tensor>& skip, const JoinActivation& act) {
  const bool differentiates = !act.act.is(ActivationKind::identity), learns = act.slope.has_value();
  const at::Tensor dz = differentiates ? new_like(y) : at::empty({0}, y.options());
  at::Tensor result;
  DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    ReduceInput in{.dout = dout.contiguous(kLayout), .reads = Reads::nothing, .out = {}, .y = y.contiguous(kLayout)};
    if (differentiates) {
      in.reads = out ? Reads::output : Reads::argument;
      if (out) in.out = out->contiguous(kLayout);
      in.dz = dz;
    }
    in.sums_slope = learns;
    const auto sums = backward_reduce<scalar_t>(
        in, norm_vectors<A>(affine), act_vectors<A>(act.act, act.slope, y.size(1)), nullptr,
        in.reads == Reads::argument ? residual_of<A>(skip) : ResidualInput<A>{});
    std::vector<at::Tensor> rows;
    for (const auto* sum : {&sums.dz, &sums.dz_y, &sums.slope})
      if (!sum->empty()) rows.push_back(at::tensor(*sum, at::kDouble).view({y.size(0), y.size(1)}));
    result = at::stack(rows, 1);
  });
  return {result, dz};
}

at::Tensor gated_join_backward_apply(
    const at::Tensor& dz, const std::optional<at::Tensor>& y, const at::Tensor& coefficients) {
  const at::Tensor dy = new_like(dz);
  DISPATCH(dz, [&] {
    using A = acc_t<scalar_t>;
    NormVectors<A> norm;
    norm.center = sets_of<A>(coefficients, 0);
    ApplyVectors<A> k(0);
    k.k_dz = sets_of<A>(coefficients, 1);
    k.k_y = sets_of<A>(coefficients, 2);
    k.k = sets_of<A>(coefficients, 3);
    k.y_term = y.has_value();
    backward_apply<scalar_t>(
        dz.contiguous(kLayout), Reads::nothing, y ? y->contiguous(kLayout) : at::Tensor(), norm, k, {}, dy);
  });
  return dy;
}

}  // namespace resnet_fused::cpu
