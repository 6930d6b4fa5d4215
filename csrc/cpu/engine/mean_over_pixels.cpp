#include "mean_over_pixels.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../../block/kernel_layout.h"
#include "../kernels/row_kernels.h"
#include "../share_out.h"

namespace resnet_fused::cpu::engine {
namespace {

constexpr int64_t kChannels = 512;  // at a time

// A pixel's channels as floats: where they are, or in `wide`.
const float* floats(const float* pixel, int64_t, float*) { return pixel; }
template <class T>
const float* floats(const T* pixel, int64_t count, float* wide) {
  row_kernels<T>().widen(pixel, count, wide);
  return wide;
}

// Row by row, then over the rows: a sum of many pixels would lose more.
template <class T>
void mean(const T* x, int64_t height, int64_t width, int64_t channels, int64_t begin, int64_t end, T* out) {
  float row[kChannels], wide[kChannels], sum[kChannels] = {};
  const int64_t count = end - begin;
  for (int64_t h = 0; h < height; ++h) {
    std::fill_n(row, count, 0.0f);
    for (int64_t w = 0; w < width; ++w) {
      const float* pixel = floats(x + (h * width + w) * channels + begin, count, wide);
      for (int64_t c = 0; c < count; ++c) row[c] += pixel[c];
    }
    for (int64_t c = 0; c < count; ++c) sum[c] += row[c];
  }
  for (int64_t c = 0; c < count; ++c) sum[c] /= static_cast<float>(height * width);
  row_kernels<T>().store(sum, count, out + begin);
}

}  // namespace

at::Tensor mean_over_pixels(const at::Tensor& given) {
  const at::Tensor x = given.contiguous(kLayout);
  const int64_t images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  auto out = at::empty({images, channels, 1, 1}, x.options().memory_format(kLayout));
  const int64_t parts = (channels + kChannels - 1) / kChannels;
  const auto of = [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    for_each_job(images * parts, [&](int64_t i) {
      const int64_t n = i / parts, begin = i % parts * kChannels;
      mean(
          from + n * height * width * channels, height, width, channels, begin, std::min(begin + kChannels, channels),
          to + n * channels);
    });
  };
  switch (x.scalar_type()) {
    case at::kFloat:
      of(float{});
      break;
    case at::kBFloat16:
      of(bf16{});
      break;
    case at::kHalf:
      of(f16{});
      break;
    default:
      TORCH_CHECK_TYPE(false, "the engine's results are Float, BFloat16 or Half, got ", x.scalar_type());
  }
  return out;
}

}  // namespace resnet_fused::cpu::engine
