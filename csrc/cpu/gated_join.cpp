#include "gated_join.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cmath>

#include "../block/kernel_layout.h"
#include "merged_statistics.h"
#include "passes.h"

namespace resnet_fused::cpu {
namespace {

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "gated_join", __VA_ARGS__)

using Optional = std::optional<at::Tensor>;

// body(place, channel) for every value of [N, C].
template <class Body>
void each_value(size_t values, int64_t channels, const Body& body) {
  for (size_t image = 0; image < values; image += channels)
    for (int64_t c = 0; c < channels; ++c) body(image + c, c);
}

// norm(y) = (y - mean) * scale + shift, by channel. Without a bias there is no shift: a gate that is infinite would
// make NaN of its zeros.
struct Coefficients {
  int64_t channels;
  std::vector<double> mean, inverse_std, scale, shift;

  Coefficients(const JoinNorm& norm, int64_t channels)
      : channels(channels), mean(channels, 0.0), inverse_std(channels, 1.0) {
    if (norm.mean) {
      mean = to_vector<double>(*norm.mean);
      inverse_std = to_vector<double>(*norm.var);
      for (double& v : inverse_std) v = 1.0 / std::sqrt(v + norm.eps);
    }
    scale = inverse_std;
    if (norm.weight) {
      const auto weight = to_vector<double>(*norm.weight);
      for (int64_t c = 0; c < channels; ++c) scale[c] *= weight[c];
    }
    if (norm.bias) shift = to_vector<double>(*norm.bias);
  }

  // A set of channels for each image: gate * norm.
  template <class A>
  NormVectors<A> gated(const std::vector<double>& gate) const {
    NormVectors<A> sets(static_cast<int64_t>(gate.size()));
    each_value(gate.size(), channels, [&](size_t i, int64_t c) {
      sets.center[i] = static_cast<A>(mean[c]);
      sets.scale[i] = static_cast<A>(gate[i] * scale[c]);
      if (!shift.empty()) sets.shift[i] = static_cast<A>(gate[i] * shift[c]);
    });
    return sets;
  }
};

// A row of [rows, N, C], or of nothing.
std::vector<double> row_of(const Optional& rows, int64_t row, size_t length) {
  return rows ? to_vector<double>(rows->select(0, row)) : std::vector<double>(length, 0.0);
}

template <class A>
ResidualInput<A> residual_of(const Optional& skip) {
  if (!skip) return {};
  return {skip->contiguous(kLayout), nullptr, std::vector<A>(skip->size(1), A(1))};
}

at::Tensor new_like(const at::Tensor& y) { return at::empty(y.sizes(), y.options().memory_format(kLayout)); }
at::Tensor nothing(const at::Tensor& y) { return at::empty({0}, y.options()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_statistics(
    const at::Tensor& y, const JoinNorm& given, bool of_batch, bool pools) {
  const int64_t images = y.size(0), channels = y.size(1), pixels = y.size(2) * y.size(3);
  at::Tensor of_images, statistics = nothing(y), means = nothing(y), pooled = nothing(y);
  DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    of_images = image_statistics<scalar_t>(y.contiguous(kLayout));
    const A* mean = of_images.template const_data_ptr<A>();
    JoinNorm norm = given;
    if (of_batch) {
      MergedStatistics merged(channels);
      for (int64_t n = 0; n < images; ++n) {
        const A* of_image = mean + n * 2 * channels;
        merged.add(static_cast<double>(pixels), [&](int64_t c) {
          return std::pair<double, double>(of_image[c], static_cast<double>(of_image[channels + c]) * pixels);
        });
      }
      statistics = at::empty({2, channels}, of_images.options());
      A* of_all = statistics.template mutable_data_ptr<A>();
      merged.write(of_all, of_all + channels);
      norm.mean = statistics.select(0, 0);
      norm.var = statistics.select(0, 1);
    }
    if (!pools) return;
    means = of_images.select(1, 0).contiguous();
    const Coefficients k(norm, channels);
    auto values = to_vector<double>(means);
    each_value(values.size(), channels, [&](size_t i, int64_t c) {
      values[i] = (values[i] - k.mean[c]) * k.scale[c];
      if (!k.shift.empty()) values[i] += k.shift[c];
    });
    pooled = from_vector(values, {images, channels}, y.scalar_type());
  });
  return {statistics, means, pooled};
}

at::Tensor gated_join(
    const at::Tensor& y, const at::Tensor& gate, const JoinNorm& norm, const Optional& skip,
    const JoinActivation& act) {
  const int64_t channels = y.size(1);
  const auto factors = to_vector<double>(gate);
  return DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    return normalize<scalar_t>(
        y.contiguous(kLayout), Coefficients(norm, channels).gated<A>(factors),
        act_vectors<A>(act.act, act.slope, channels), residual_of<A>(skip));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gated_join_backward(
    const at::Tensor& dout, const Optional& out, const at::Tensor& y, const at::Tensor& gate, const JoinNorm& norm,
    const Optional& skip, const JoinActivation& act) {
  const int64_t images = y.size(0), channels = y.size(1);
  const bool differentiates = !act.act.is(ActivationKind::identity);
  const at::Tensor dz = differentiates ? new_like(y) : nothing(y);
  const Coefficients k(norm, channels);
  const auto factors = to_vector<double>(gate);
  const Sums sums = DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    ReduceInput in{.dout = dout.contiguous(kLayout), .reads = Reads::nothing, .out = {}, .y = y.contiguous(kLayout)};
    if (differentiates) {
      in.reads = out ? Reads::output : Reads::argument;
      if (out) in.out = out->contiguous(kLayout);
      in.dz = dz;
    }
    in.sums_slope = act.slope.has_value();
    return backward_reduce<scalar_t>(
        in, k.gated<A>(factors), act_vectors<A>(act.act, act.slope, channels), nullptr,
        in.reads == Reads::argument ? residual_of<A>(skip) : ResidualInput<A>{});
  });

  std::vector<double> d_gate(factors.size()), d_slope(act.slope ? act.slope->numel() : 0, 0.0), handoff = factors;
  each_value(factors.size(), channels, [&](size_t i, int64_t c) {
    d_gate[i] = sums.dz_y[i] * k.scale[c];
    if (!k.shift.empty()) d_gate[i] += sums.dz[i] * k.shift[c];
    if (!d_slope.empty()) d_slope[d_slope.size() == 1 ? 0 : c] += sums.slope[i];
  });
  handoff.insert(handoff.end(), sums.dz.begin(), sums.dz.end());
  handoff.insert(handoff.end(), sums.dz_y.begin(), sums.dz_y.end());
  return {
      dz, from_vector(d_gate, {images, channels}, gate.scalar_type()),
      act.slope ? from_vector(d_slope, act.slope->sizes(), act.slope->scalar_type()) : nothing(y),
      from_vector(handoff, {3, images, channels}, at::kDouble)};
}

// The gradient of norm(y) is g = gate * dz + d_pooled / pixels; y's is scale * (g - mean(g) - xhat * mean(g * xhat)),
// the means over the batch, without them where the statistics are constants (Ioffe & Szegedy 2015).
std::tuple<at::Tensor, at::Tensor, at::Tensor> pooled_norm_backward(
    const Optional& dz, const at::Tensor& y, const Optional& d_pooled, const Optional& handoff, const Optional& means,
    const JoinNorm& norm, bool of_batch, std::array<bool, 3> needs) {
  const int64_t images = y.size(0), channels = y.size(1), pixels = y.size(2) * y.size(3);
  const size_t all = images * channels;
  const Coefficients k(norm, channels);
  const auto gate = row_of(handoff, 0, all), sum_dz = row_of(handoff, 1, all), sum_dz_y = row_of(handoff, 2, all);
  const auto spread = d_pooled ? to_vector<double>(*d_pooled) : std::vector<double>(all, 0.0);
  const auto of_images = means ? to_vector<double>(*means) : std::vector<double>();
  std::vector<double> sum_g(channels, 0.0), sum_g_xhat(channels, 0.0);
  each_value(all, channels, [&](size_t i, int64_t c) {
    sum_g[c] += gate[i] * sum_dz[i] + spread[i];
    sum_g_xhat[c] += gate[i] * sum_dz_y[i];
    if (d_pooled && means) sum_g_xhat[c] += spread[i] * (of_images[i] - k.mean[c]);
  });
  for (int64_t c = 0; c < channels; ++c) sum_g_xhat[c] *= k.inverse_std[c];

  at::Tensor dy = nothing(y), d_weight = nothing(y), d_bias = nothing(y);
  if (needs[1]) d_weight = from_vector(sum_g_xhat, {channels}, norm.weight->scalar_type());
  if (needs[2]) d_bias = from_vector(sum_g, {channels}, norm.bias->scalar_type());
  if (!needs[0]) return {dy, d_weight, d_bias};
  dy = new_like(y);
  DISPATCH(y, [&] {
    using A = acc_t<scalar_t>;
    NormVectors<A> centers(static_cast<int64_t>(all));
    ApplyVectors<A> apply(static_cast<int64_t>(all));
    apply.y_term = of_batch || d_pooled;
    const double rows = static_cast<double>(images * pixels);
    each_value(all, channels, [&](size_t i, int64_t c) {
      const double of_all = of_batch ? k.scale[c] / rows : 0.0;
      centers.center[i] = static_cast<A>(k.mean[c]);
      apply.k_dz[i] = static_cast<A>(k.scale[c] * gate[i]);
      apply.k_y[i] = static_cast<A>(-of_all * k.inverse_std[c] * sum_g_xhat[c]);
      apply.k[i] = static_cast<A>(k.scale[c] * spread[i] / static_cast<double>(pixels) - of_all * sum_g[c]);
    });
    backward_apply<scalar_t>(
        dz ? dz->contiguous(kLayout) : at::zeros_like(dy), Reads::nothing,
        apply.y_term ? y.contiguous(kLayout) : at::Tensor(), centers, apply, {}, dy);
  });
  return {dy, d_weight, d_bias};
}

}  // namespace resnet_fused::cpu
