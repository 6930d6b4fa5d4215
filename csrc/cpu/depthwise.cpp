#include "depthwise.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../block/integer_division.h"
#include "../block/kernel_layout.h"
#include "engine/memory.h"
#include "kernels/depthwise_kernels.h"
#include "passes.h"
#include "share_out.h"

namespace resnet_fused::cpu {
namespace {

// Channels that are laid out together: a whole line of memory in bfloat16, so that no line is read for half of it.
constexpr int64_t kGroup = 32;
// Floats of a band's planes, which stay in the second cache.
constexpr int64_t kBandFloats = int64_t{1} << 16;
// At most this many partial sums of a weight's gradient are kept for each group of channels.
constexpr int64_t kPartials = 16;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// A channels_last picture and how much of it a band reads: `columns` [begin, end) may lie beyond it, where zeros are.
template <class T>
struct Source {
  const T* data;
  int64_t channels, height, width;
  Range columns;

  // Rows [rows.begin, rows.end) of one image and of `count` channels from `first` on, in planes.
  void lay_out(int64_t image, Range rows, int64_t first, int64_t count, float* planes) const {
    const auto& kernels = depthwise_kernels<T>();
    const int64_t lanes = kernels.lanes, tiles = ceil_div(count, lanes), row_floats = columns.size() * lanes;
    const int64_t plane = rows.size() * row_floats;
    const int64_t left = std::clamp<int64_t>(-columns.begin, 0, columns.size());
    const int64_t right = std::max(left, std::min(columns.size(), width - columns.begin));
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* to = planes + (row - rows.begin) * row_floats;
      const bool inside = row >= 0 && row < height;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        float* at = to + tile * plane;
        std::fill(at, at + (inside ? left : columns.size()) * lanes, 0.0f);
        if (inside) std::fill(at + right * lanes, at + row_floats, 0.0f);
      }
      if (inside && right > left)
        kernels.unpack(
            data + ((image * height + row) * width + columns.begin + left) * channels + first, channels, right - left,
            count, plane, to + left * lanes);
    }
  }
};

template <class S>
Source<element_t<S>> source_of(const at::Tensor& t, Range columns) {
  return {reinterpret_cast<const element_t<S>*>(t.const_data_ptr<S>()), t.size(1), t.size(2), t.size(3), columns};
}

// Filters [C, 1, R, S] as [C / lanes, R * S, lanes] floats, zeros beyond C.
std::vector<float> by_tile(const at::Tensor& weight, int64_t lanes) {
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3), tiles = ceil_div(channels, lanes);
  const auto flat = weight.to(at::kFloat).contiguous();
  const float* from = flat.const_data_ptr<float>();
  std::vector<float> to(tiles * taps * lanes, 0.0f);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) to[(c / lanes * taps + t) * lanes + c % lanes] = from[c * taps + t];
  return to;
}

// Filters whose products with the padding's zeros are zeros.
bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

// What an output reads along one dimension: the position in the source, and the row or column of the filter.
struct Tap {
  int64_t position, index;
};

// What outputs of one phase read along one dimension. Output o reads, for each tap, position + (o - phase) / stride *
// step.
struct Phase {
  int64_t step;
  std::vector<Tap> taps;
};

struct Dimension {
  int64_t kernel, stride, padding, dilation;
};
Dimension dimension(const at::Tensor& weight, const Stage& stage, int64_t d) {
  return {weight.size(2 + d), stage.stride[d], stage.padding[d], stage.dilation[d]};
}

// The forward convolution has one phase.
std::vector<Phase> forward_phases(const Dimension& d) {
  Phase phase{d.stride, {}};
  for (int64_t k = 0; k < d.kernel; ++k) phase.taps.push_back({k * d.dilation - d.padding, k});
  return {phase};
}

// p[i] contributes to y[o] through tap k where i = o * stride - padding + k * dilation: of its gradient, every
// stride-th value reads the same taps.
std::vector<Phase> backward_phases(const Dimension& d) {
  std::vector<Phase> phases(d.stride, Phase{1, {}});
  for (int64_t phase = 0; phase < d.stride; ++phase)
    for (int64_t k = 0; k < d.kernel; ++k) {
      const int64_t reached = phase + d.padding - k * d.dilation;
      if (floor_div(reached, d.stride) * d.stride == reached)
        phases[phase].taps.push_back({floor_div(reached, d.stride), k});
    }
  return phases;
}

// The positions that outputs [out.begin, out.end) read; empty where they read none.
Range reach(const std::vector<Phase>& phases, Range out) {
  const int64_t period = static_cast<int64_t>(phases.size());
  Range all{0, 0};
  bool any = false;
  for (int64_t phase = 0; phase < period; ++phase) {
    const int64_t first = ceil_div(std::max<int64_t>(out.begin - phase, 0), period);
    if (first * period + phase >= out.end) continue;
    const int64_t last = (out.end - 1 - phase) / period;
    for (const Tap& tap : phases[phase].taps) {
      const int64_t low = first * phases[phase].step + tap.position;
      const int64_t high = last * phases[phase].step + tap.position + 1;
      all = any ? Range{std::min(all.begin, low), std::max(all.end, high)} : Range{low, high};
      any = true;
    }
  }
  return all;
}

// How many rows of outputs a band has: as many as leave its planes in the cache.
int64_t band_rows(const std::vector<Phase>& rows, int64_t height, int64_t row_floats) {
  int64_t band = height;
  while (band > 1 && reach(rows, {0, band}).size() * row_floats > kBandFloats) band = ceil_div(band, 2);
  return band;
}

// out[n, c, i, j] = start[c] + sum of filter taps over what the phases say, which serves the convolution and its
// adjoint.
template <class S>
at::Tensor convolve(
    const at::Tensor& in, const std::vector<float>& filters, int64_t filter_width, const std::vector<float>& start,
    const std::vector<Phase>& rows, const std::vector<Phase>& columns, at::IntArrayRef sizes) {
  using T = element_t<S>;
  const auto& kernels = depthwise_kernels<T>();
  const int64_t lanes = kernels.lanes, images = sizes[0], channels = sizes[1], height = sizes[2], width = sizes[3];
  const int64_t taps = static_cast<int64_t>(filters.size()) / round_up(channels, lanes);
  auto out = at::empty(sizes, in.options().memory_format(kLayout));
  T* target = reinterpret_cast<T*>(out.template mutable_data_ptr<S>());
  const auto source = source_of<S>(in, reach(columns, {0, width}));
  const int64_t row_floats = source.columns.size() * kGroup, band = band_rows(rows, height, row_floats);
  const int64_t bands = ceil_div(height, band), groups = ceil_div(channels, kGroup);
  const int64_t row_period = static_cast<int64_t>(rows.size()), column_period = static_cast<int64_t>(columns.size());

  share_out(images * bands * groups, [&](int64_t) {
    return [&, offsets = std::vector<int64_t>(taps), used = std::vector<float>(taps * lanes)](int64_t item) mutable {
      const int64_t image = item / (bands * groups), first = item % groups * kGroup;
      const Range out_rows{item / groups % bands * band, std::min(height, (item / groups % bands + 1) * band)};
      const int64_t count = std::min(kGroup, channels - first);
      const Range in_rows = reach(rows, out_rows);
      float* planes = reinterpret_cast<float*>(
          engine::scratch((in_rows.size() * row_floats + 1) * static_cast<int64_t>(sizeof(float))));
      source.lay_out(image, in_rows, first, count, planes);
      for (int64_t c = 0; c < count; c += lanes) {
        const float* plane = planes + c * in_rows.size() * source.columns.size();
        const float* tile = filters.data() + (first + c) / lanes * taps * lanes;
        for (int64_t b = 0; b < column_period && b < width; ++b)
          for (int64_t row = out_rows.begin; row < out_rows.end; ++row) {
            const Phase &vertical = rows[row % row_period], &horizontal = columns[b];
            int64_t t = 0;
            for (const Tap& r : vertical.taps) {
              const int64_t y = row / row_period * vertical.step + r.position - in_rows.begin;
              for (const Tap& s : horizontal.taps) {
                offsets[t] = (y * source.columns.size() + s.position - source.columns.begin) * lanes;
                std::copy_n(tile + (r.index * filter_width + s.index) * lanes, lanes, used.data() + t++ * lanes);
              }
            }
            kernels.convolve(
                {plane, offsets.data(), used.data(), t, horizontal.step * lanes, start.data() + first + c,
                 ceil_div(width - b, column_period),
                 target + ((image * height + row) * width + b) * channels + first + c, column_period * channels,
                 std::min(lanes, count - c)});
          }
      }
    };
  });
  return out;
}

template <class S>
at::Tensor backward_weight(const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight, const Stage& stage) {
  using T = element_t<S>;
  const auto& kernels = depthwise_kernels<T>();
  const int64_t lanes = kernels.lanes, channels = dy.size(1), height = dy.size(2), width = dy.size(3);
  const auto rows = forward_phases(dimension(weight, stage, 0)), columns = forward_phases(dimension(weight, stage, 1));
  const auto source = source_of<S>(p, reach(columns, {0, width}));
  const auto gradient = source_of<S>(dy, {0, width});
  const int64_t row_floats = source.columns.size() * kGroup, band = band_rows(rows, height, row_floats);
  const int64_t bands = ceil_div(height, band), groups = ceil_div(channels, kGroup);
  const int64_t units = dy.size(0) * bands, partials = std::min(units, kPartials);
  const int64_t taps = weight.size(2) * weight.size(3);
  std::vector<double> sums(groups * partials * taps * kGroup, 0.0);

  std::vector<int64_t> offsets;
  for (const Tap& r : rows[0].taps)
    for (const Tap& s : columns[0].taps)
      offsets.push_back(
          ((r.position - rows[0].taps[0].position) * source.columns.size() + s.position - source.columns.begin) *
          lanes);
  for_each_job(groups * partials, [&](int64_t item) {
    const int64_t first = item / partials * kGroup, count = std::min(kGroup, channels - first);
    const int64_t part = item % partials;
    for (int64_t unit = part * units / partials; unit < (part + 1) * units / partials; ++unit) {
      const int64_t image = unit / bands;
      const Range out_rows{unit % bands * band, std::min(height, (unit % bands + 1) * band)};
      const Range in_rows = reach(rows, out_rows);
      const int64_t in_floats = in_rows.size() * row_floats, dy_floats = out_rows.size() * width * kGroup;
      float* planes =
          reinterpret_cast<float*>(engine::scratch((in_floats + dy_floats) * static_cast<int64_t>(sizeof(float))));
      source.lay_out(image, in_rows, first, count, planes);
      gradient.lay_out(image, out_rows, first, count, planes + in_floats);
      for (int64_t c = 0; c < count; c += lanes)
        kernels.add_products(
            {planes + in_floats + c * out_rows.size() * width, planes + c * in_rows.size() * source.columns.size(),
             offsets.data(), taps, out_rows.size(), width, stage.stride[0] * source.columns.size() * lanes,
             stage.stride[1] * lanes, sums.data() + (item * kGroup + c) * taps});
    }
  });

  auto result = at::empty(weight.sizes(), weight.options().memory_format(weight.suggest_memory_format()));
  S* target = result.template mutable_data_ptr<S>();  // one input channel: every memory format is [C, R, S]
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) {
      double sum = 0;
      for (int64_t part = 0; part < partials; ++part) {
        const double* group = sums.data() + (c / kGroup * partials + part) * kGroup * taps;
        const int64_t within = c % kGroup;
        sum += group[within / lanes * lanes * taps + t * lanes + within % lanes];
      }
      if (!std::isfinite(sum)) return {};
      target[c * taps + t] = static_cast<S>(static_cast<float>(sum));
    }
  return result;
}

int64_t lanes_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? depthwise_kernels<float>().lanes : depthwise_kernels<bf16>().lanes;
}

bool is_depthwise(const at::Tensor& weight, const Stage& stage) {
  const auto dtype = weight.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && weight.layout() == at::kStrided && weight.size(1) == 1 &&
         stage.groups > 1 && weight.size(0) == stage.groups && !stage.pads_values();
}

// `run` with the scalar type of x, float or bfloat16.
template <class Run>
at::Tensor typed(const at::Tensor& x, const Run& run) {
  return x.scalar_type() == at::kFloat ? run(float{}) : run(c10::BFloat16{});
}

}  // namespace

bool has_faster_backward_data(const at::Tensor& weight, const Stage& stage) {
  const bool strided = stage.stride[0] > 1 || stage.stride[1] > 1;
  return is_depthwise(weight, stage) && weight.scalar_type() == at::kBFloat16 && strided;
}

bool has_faster_backward_weight(const at::Tensor& weight, const Stage& stage) {
  constexpr int64_t few = 9;
  return is_depthwise(weight, stage) && weight.size(2) * weight.size(3) > few;
}

at::Tensor depthwise_backward_data(
    const at::Tensor& dy, const at::Tensor& like_p, const at::Tensor& weight, const Stage& stage) {
  const int64_t lanes = lanes_of(dy);
  const auto filters = by_tile(weight, lanes);
  if (!all_finite(filters)) return {};
  const std::vector<float> zeros(round_up(dy.size(1), lanes), 0.0f);
  return typed(dy, [&](auto scalar) {
    return convolve<decltype(scalar)>(
        dy, filters, weight.size(3), zeros, backward_phases(dimension(weight, stage, 0)),
        backward_phases(dimension(weight, stage, 1)), like_p.sizes());
  });
}

at::Tensor depthwise_backward_weight(
    const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight, const Stage& stage) {
  return typed(dy, [&](auto scalar) { return backward_weight<decltype(scalar)>(dy, p, weight, stage); });
}

}  // namespace resnet_fused::cpu
