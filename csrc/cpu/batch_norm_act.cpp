#include "batch_norm_act.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cmath>

#include "../block/kernel_layout.h"
#include "passes.h"

namespace resnet_fused::cpu {
namespace {

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "batch_norm_act", __VA_ARGS__)

template <class A>
NormVectors<A> norm_vectors(const BatchNorm& norm) {
  NormVectors<A> result(norm.mean.size(0));
  result.center = to_vector<A>(norm.mean);
  const auto var = to_vector<A>(norm.var);
  if (norm.weight) result.scale = to_vector<A>(*norm.weight);
  if (norm.bias) result.shift = to_vector<A>(*norm.bias);
  for (size_t c = 0; c < var.size(); ++c) {
    const double inverse_std = 1.0 / std::sqrt(static_cast<double>(var[c]) + norm.eps);
    result.inverse_std[c] = static_cast<A>(inverse_std);
    result.scale[c] = static_cast<A>(inverse_std * result.scale[c]);
  }
  return result;
}

// dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)), xhat = (x - mean) * inverse_std; without sums scale * dz
template <class A>
ApplyVectors<A> apply_vectors(const NormVectors<A>& norm, const std::optional<at::Tensor>& sums, double count) {
  const auto channels = static_cast<int64_t>(norm.scale.size());
  ApplyVectors<A> k(channels);
  k.k_dz = norm.scale;
  if (!sums) return k;
  k.y_term = true;
  const auto sum = to_vector<double>(*sums);
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = norm.scale[c], inverse_std = norm.inverse_std[c];
    k.k_y[c] = static_cast<A>(-scale * inverse_std * inverse_std * sum[channels + c] / count);
    k.k[c] = static_cast<A>(-scale * sum[c] / count);
  }
  return k;
}

at::Tensor empty_in_kernel_layout(const at::Tensor& x) {
  return at::empty(x.sizes(), x.options().memory_format(kLayout));
}

}  // namespace

at::Tensor batch_statistics(const at::Tensor& x) {
  at::Tensor result;
  DISPATCH(x, [&] { result = batch_statistics<scalar_t>(x.contiguous(kLayout)); });
  return result;
}

std::tuple<at::Tensor, at::Tensor> normalize_act(
    const at::Tensor& x, const BatchNorm& norm, const std::optional<at::Tensor>& residual, bool relu, bool save_mask) {
  auto mask = at::empty(save_mask ? mask_sizes(x) : std::vector<int64_t>{0}, x.options().dtype(at::kByte));
  at::Tensor out;
  DISPATCH(x, [&] {
    using A = acc_t<scalar_t>;
    ResidualInput<A> skip;
    if (residual) skip = {residual->contiguous(kLayout), nullptr, std::vector<A>(x.size(1), A(1))};
    const ActVectors<A> act{{relu ? ActivationKind::relu : ActivationKind::identity}};
    out = normalize<scalar_t>(x.contiguous(kLayout), norm_vectors<A>(norm), act, skip, save_mask ? mask : at::Tensor());
  });
  return {in_format_of(x, out), mask};
}

at::Tensor normalize_act_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean) {
  const int64_t channels = x.size(1);
  auto result = at::empty({2, channels}, x.options().dtype(at::kDouble));
  DISPATCH(x, [&] {
    NormVectors<acc_t<scalar_t>> norm(channels);
    norm.center = to_vector<acc_t<scalar_t>>(mean);
    ReduceInput in{.dout = dout.contiguous(kLayout), .reads = Reads::nothing, .out = {}, .y = x.contiguous(kLayout)};
    in.bits.bits = mask.value_or(at::Tensor());
    const auto sums = backward_reduce<scalar_t>(in, norm);
    double* target = result.mutable_data_ptr<double>();
    std::copy(sums.dz.begin(), sums.dz.end(), target);
    std::copy(sums.dz_y.begin(), sums.dz_y.end(), target + channels);
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> normalize_act_backward_apply(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const BatchNorm& norm,
    const std::optional<at::Tensor>& sums, double count, bool save_dz) {
  auto dx = empty_in_kernel_layout(x), dz = at::empty({0}, x.options());
  if (save_dz) dz = mask ? empty_in_kernel_layout(x) : dout.clone(kLayout);
  DISPATCH(x, [&] {
    const auto vectors = norm_vectors<acc_t<scalar_t>>(norm);
    const auto k = apply_vectors(vectors, sums, count);
    const BitMask bits{mask.value_or(at::Tensor()), mask && save_dz ? dz : at::Tensor()};
    backward_apply<scalar_t>(
        dout.contiguous(kLayout), Reads::nothing, sums ? x.contiguous(kLayout) : at::Tensor(), vectors, k, {}, dx,
        bits);
  });
  return {in_format_of(x, dx), save_dz ? in_format_of(x, dz) : dz};
}

}  // namespace resnet_fused::cpu
