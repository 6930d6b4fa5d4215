#include "pack.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "../../block/integer_division.h"
#include "../kernels/row_kernels.h"
#include "rounding.h"

namespace resnet_fused::cpu::engine {
namespace {

template <class T>
int64_t offset_in_panel(int64_t channel, int64_t output) {
  if constexpr (sizeof(T) == 2)
    return channel / 32 * 1024 + output / 16 * 512 + channel % 32 / 2 * 32 + output % 16 * 2 + channel % 2;
  else
    return channel * kPanel + output;
}

}  // namespace

template <class T, class P>
Packed pack(const at::Tensor& given, const float* factor, Layout::Kind kind, int64_t groups) {
  const auto weight = given.to(at::kFloat).contiguous();
  const int64_t out = weight.size(0), in = weight.size(1), height = weight.size(2), width = weight.size(3);
  constexpr int64_t step = kDepthStep<P>;
  // which taps of the window become taps of the layout, and which become channels
  const bool rows_fold = kind == Layout::Kind::columns, columns_fold = rows_fold || kind == Layout::Kind::folded;
  Packed packed;
  packed.panels = ceil_div(out, kPanel);
  packed.taps = (rows_fold ? 1 : height) * (columns_fold ? 1 : width);
  const int64_t whole = round_up(in * groups * (rows_fold ? height : 1) * (columns_fold ? width : 1), step);
  packed.depth = whole;
  if (groups > 1) {
    std::vector<int64_t> begin(packed.panels), end(packed.panels);
    packed.depth = 0;
    for (int64_t p = 0; p < packed.panels; ++p) {
      const int64_t last = std::min(out, (p + 1) * kPanel) - 1, width_of_group = out / groups;
      begin[p] = p * kPanel / width_of_group * in / step * step;
      end[p] = round_up((last / width_of_group + 1) * in, step);
      packed.depth = std::max(packed.depth, end[p] - begin[p]);
    }
    for (int64_t p = 0; p < packed.panels; ++p)
      packed.first_channel.push_back(static_cast<int32_t>(std::min(begin[p], whole - packed.depth)));
  }
  packed.memory = allocate_together(packed.elements() * static_cast<int64_t>(sizeof(P)));
  P* all = reinterpret_cast<P*>(packed.memory.get());
  std::fill_n(reinterpret_cast<unsigned char*>(all), packed.elements() * sizeof(P), 0);
  const float* w = weight.const_data_ptr<float>();
  std::vector<uint8_t> finite(packed.panels, 1);
  at::parallel_for(0, packed.panels, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      P* panel = all + p * packed.taps * packed.depth * kPanel;
      const int64_t first = packed.first_channel.empty() ? 0 : packed.first_channel[p];
      for (int64_t o = p * kPanel; o < std::min(out, (p + 1) * kPanel); ++o) {
        const int64_t group_begin = o / (out / groups) * in;
        for (int64_t c = 0; c < in; ++c)
          for (int64_t r = 0; r < height; ++r)
            for (int64_t s = 0; s < width; ++s) {
              const int64_t tap = (rows_fold ? 0 : r) * (columns_fold ? 1 : width) + (columns_fold ? 0 : s);
              const int64_t folded = (rows_fold ? r : 0) * width + (columns_fold ? s : 0);
              const int64_t channel = folded * in * groups + group_begin + c - first;
              const T value = rounded<T>(w[((o * in + c) * height + r) * width + s] * (factor ? factor[o] : 1.0f));
              panel[tap * packed.depth * kPanel + offset_in_panel<P>(channel, o % kPanel)] = exactly<P>(value);
              if (!std::isfinite(exactly<float>(value))) finite[p] = 0;
            }
      }
    }
  });
  packed.finite = std::all_of(finite.begin(), finite.end(), [](uint8_t each) { return each; });
  return packed;
}

namespace {

// 32 channels of 32 outputs, or as many as there are; strides in elements.
template <class T>
void pack_block(const T* w, int64_t outputs, int64_t channels, int64_t output_stride, int64_t channel_stride, T* to) {
  if (outputs < kPanel || channels < kPanel) std::fill_n(to, round_up(channels, kDepthStep<T>) * kPanel, T{});
  if constexpr (sizeof(T) == 2) {
    typedef uint32_t __attribute__((may_alias, aligned(2))) Pair;
    if (channel_stride == 1 && channels == kPanel) {  // pairs lie side by side: a transposition of pairs
      for (int64_t o = 0; o < outputs; ++o) {
        const auto* from = reinterpret_cast<const Pair*>(w + o * output_stride);
        auto* pairs = reinterpret_cast<Pair*>(to + o / 16 * 512 + o % 16 * 2);
        for (int64_t pair = 0; pair < 16; ++pair) pairs[pair * 16] = from[pair];
      }
      return;
    }
    if (output_stride == 1 && channels == kPanel && outputs == kPanel) {
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t pair = 0; pair < 16; ++pair) {
          const T* even = w + 2 * pair * channel_stride + half * 16;
          const T* odd = even + channel_stride;
          T* at = to + half * 512 + pair * 32;
          for (int64_t o = 0; o < 16; ++o) {
            at[2 * o] = even[o];
            at[2 * o + 1] = odd[o];
          }
        }
      return;
    }
  }
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < channels; ++c) to[offset_in_panel<T>(c, o)] = w[o * output_stride + c * channel_stride];
}

}  // namespace

template <class T>
Packed pack_taps(const at::Tensor& weight, const std::vector<Tap>& taps, bool backward) {
  const int64_t out = weight.size(backward ? 1 : 0), in = weight.size(backward ? 0 : 1);
  const int64_t output_stride = weight.stride(backward ? 1 : 0), channel_stride = weight.stride(backward ? 0 : 1);
  Packed packed;
  packed.panels = ceil_div(out, kPanel);
  packed.taps = static_cast<int64_t>(taps.size());
  packed.depth = round_up(in, kDepthStep<T>);
  packed.memory = reuse(packed.elements() * static_cast<int64_t>(sizeof(T)));
  T* all = reinterpret_cast<T*>(packed.memory.get());
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  std::vector<uint8_t> finite(packed.panels, 1);
  const int64_t size = packed.taps * packed.depth * kPanel;
  at::parallel_for(0, packed.panels, 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p) {
      T* panel = all + p * size;
      const int64_t outputs = std::min(kPanel, out - p * kPanel);
      for (int64_t tap = 0; tap < packed.taps; ++tap) {
        const auto [r, s] = taps[tap];
        const T* block = w + r * weight.stride(2) + s * weight.stride(3) + p * kPanel * output_stride;
        for (int64_t c = 0; c < in; c += kPanel)
          pack_block(
              block + c * channel_stride, outputs, std::min(kPanel, in - c), output_stride, channel_stride,
              panel + (tap * packed.depth + c) * kPanel);
      }
      finite[p] = row_kernels<T>().all_finite(panel, size);
    }
  });
  packed.finite = std::all_of(finite.begin(), finite.end(), [](uint8_t each) { return each; });
  return packed;
}

template Packed pack_taps<float>(const at::Tensor&, const std::vector<Tap>&, bool);
template Packed pack_taps<bf16>(const at::Tensor&, const std::vector<Tap>&, bool);
template Packed pack<float>(const at::Tensor&, const float*, Layout::Kind, int64_t);
template Packed pack<bf16>(const at::Tensor&, const float*, Layout::Kind, int64_t);
template Packed pack<bf16, float>(const at::Tensor&, const float*, Layout::Kind, int64_t);
template Packed pack<f16, float>(const at::Tensor&, const float*, Layout::Kind, int64_t);

}  // namespace resnet_fused::cpu::engine
