#include "mean_over_pixels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../../block/kernel_layout.h"

namespace resnet_fused::cpu::engine {
namespace {

constexpr int64_t kChannels = 512;  // at a time

// Row by row, then over the rows: a sum of many pixels would lose more.
template <class T>
void mean(const T* x, int64_t height, int64_t width, int64_t channels, int64_t begin, int64_t end, T* out) {
  float row[kChannels], sum[kChannels] = {};
  const int64_t count = end - begin;
  for (int64_t h = 0; h < height; ++h) {
    std::fill_n(row, count, 0.0f);
    for (int64_t w = 0; w < width; ++w) {
      const T* pixel = x + (h * width + w) * channels + begin;
      for (int64_t c = 0; c < count; ++c) row[c] += static_cast<float>(pixel[c]);
    }
    for (int64_t c = 0; c < count; ++c) sum[c] += row[c];
  }
  for (int64_t c = 0; c < count; ++c) out[begin + c] = static_cast<T>(sum[c] / static_cast<float>(height * width));
}

}  // namespace

at::Tensor mean_over_pixels(const at::Tensor& given) {
  const at::Tensor x = given.contiguous(kLayout);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  auto out = at::empty({images, channels, 1, 1}, x.options().memory_format(kLayout));
  const int64_t parts = (channels + kChannels - 1) / kChannels;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "mean_over_pixels", [&] {
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, images * parts, 1, [&](int64_t first, int64_t beyond) {
      for (int64_t i = first; i < beyond; ++i) {
        const int64_t n = i / parts, begin = i % parts * kChannels;
        mean(
            from + n * height * width * channels, height, width, channels, begin, std::min(begin + kChannels, channels),
            to + n * channels);
      }
    });
  });
  return out;
}

}  // namespace resnet_fused::cpu::engine
