#include "pack.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "../../block/integer_division.h"
#include "../kernels/row_kernels.h"
#include "../share_out.h"
#include "rounding.h"
#include "winograd.h"

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
  for_each_job(packed.panels, [&](int64_t p) {
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
  });
  packed.finite = std::all_of(finite.begin(), finite.end(), [](uint8_t each) { return each; });
  return packed;
}

Packed pack_winograd(const Packed& windows, bool keeps) {
  Packed packed;
  packed.panels = windows.panels;
  packed.taps = kPatch;
  packed.depth = windows.depth;
  const int64_t bytes = packed.elements() * static_cast<int64_t>(sizeof(float));
  packed.memory = keeps ? allocate_together(bytes) : reuse(bytes);
  const auto* all = reinterpret_cast<const float*>(windows.memory.get());
  auto* to = reinterpret_cast<float*>(packed.memory.get());
  const int64_t plane = packed.depth * kPanel;
  for_each_job(packed.panels, [&](int64_t panel) {
    products<float>().winograd->transform_windows(
        all + panel * windows.taps * plane, plane, to + panel * kPatch * plane);
  });
  return packed;
}

namespace {

typedef uint32_t Words __attribute__((vector_size(16), may_alias, aligned(2)));
typedef uint16_t Halves __attribute__((vector_size(16), may_alias, aligned(2)));

// 4 x 4 words; strides in elements.
template <class T>
void transpose_words(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  const auto row = [&](int64_t i) { return *reinterpret_cast<const Words*>(from + i * from_stride); };
  const auto put = [&](int64_t i, Words words) { *reinterpret_cast<Words*>(to + i * to_stride) = words; };
  const Words a = row(0), b = row(1), c = row(2), d = row(3);
  const Words ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  put(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  put(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  const Words ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  put(2, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
  put(3, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

// even[i], odd[i] side by side, for 8 of each
void interleave(const bf16* even, const bf16* odd, bf16* to) {
  const auto at = [](const bf16* values) { return *reinterpret_cast<const Halves*>(values); };
  const Halves a = at(even), b = at(odd);
  reinterpret_cast<Halves*>(to)[0] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  reinterpret_cast<Halves*>(to)[1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// 32 channels of 32 outputs, or as many as there are; strides in elements.
template <class T>
void pack_block(const T* w, int64_t outputs, int64_t channels, int64_t output_stride, int64_t channel_stride, T* to) {
  constexpr int64_t word = 4 / sizeof(T);
  const bool whole = outputs == kPanel && channels == kPanel;
  if (whole && channel_stride == 1) {  // pairs of 16 bits lie side by side as they shall
    for (int64_t o = 0; o < kPanel; o += 4)
      for (int64_t c = 0; c < kPanel; c += 4 * word)
        transpose_words(w + o * output_stride + c, output_stride, to + offset_in_panel<T>(c, o), kPanel);
    return;
  }
  if (whole && output_stride == 1) {
    for (int64_t c = 0; c < kPanel; c += word) {
      const T* row = w + c * channel_stride;
      if constexpr (sizeof(T) == 2)
        for (int64_t o = 0; o < kPanel; o += 8)
          interleave(row + o, row + channel_stride + o, to + offset_in_panel<T>(c, o));
      else
        std::copy_n(row, kPanel, to + c * kPanel);
    }
    return;
  }
  if (!whole) std::fill_n(to, round_up(channels, kDepthStep<T>) * kPanel, T{});
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
  // Returns whether all are finite.
  const auto pack = [&](int64_t panel, int64_t tap, int64_t block) {
    const int64_t o = panel * kPanel, c = block * kPanel;
    const int64_t outputs = std::min(kPanel, out - o), channels = std::min(kPanel, in - c);
    const auto [r, s] = taps[tap];
    T* to = all + ((panel * packed.taps + tap) * packed.depth + c) * kPanel;
    pack_block(
        w + r * weight.stride(2) + s * weight.stride(3) + o * output_stride + c * channel_stride, outputs, channels,
        output_stride, channel_stride, to);
    return row_kernels<T>().all_finite(to, round_up(channels, kDepthStep<T>) * kPanel);
  };
  // Neighbouring rows of the weight are read to their end, whichever of both they belong to.
  const bool by_outputs = output_stride > channel_stride;
  const int64_t blocks = ceil_div(in, kPanel), rows = by_outputs ? packed.panels : blocks;
  std::vector<uint8_t> finite(rows, 1);
  for_each_job(rows, [&](int64_t row) {
    for (int64_t tap = 0; tap < packed.taps; ++tap)
      for (int64_t i = 0; i < (by_outputs ? blocks : packed.panels); ++i)
        finite[row] &= by_outputs ? pack(row, tap, i) : pack(i, tap, row);
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
