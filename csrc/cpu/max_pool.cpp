#include "max_pool.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <vector>

#include "../block/kernel_layout.h"
#include "engine/memory.h"
#include "passes.h"
#include "share_out.h"

namespace resnet_fused::cpu {
namespace {

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, (x).scalar_type(), "max_pool2d", __VA_ARGS__)

}  // namespace

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& x_in, const PoolWindow& win) {
  const auto x = x_in.contiguous(kLayout);
  const int64_t n = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const auto length = [&](int64_t in) { return (in + 2 * win.padding - win.kernel) / win.stride + 1; };
  const int64_t out_h = length(height), out_w = length(width);
  auto out = engine::reused_empty(n, channels, out_h, out_w, x.scalar_type());
  auto positions = at::empty({n, channels, out_h, out_w}, x.options().dtype(at::kByte).memory_format(kLayout));
  DISPATCH(x, [&] {
    using T = element_t<scalar_t>;
    const auto& kernels = row_kernels<T>();
    const T* source = reinterpret_cast<const T*>(x.const_data_ptr<scalar_t>());
    T* target = reinterpret_cast<T*>(out.mutable_data_ptr<scalar_t>());
    uint8_t* position = positions.mutable_data_ptr<uint8_t>();
    share_out(n * out_h, [&](int64_t) {
      const int64_t most = win.kernel * win.kernel;
      return [&, rows = std::vector<const T*>(most), places = std::vector<uint8_t>(most)](int64_t row) mutable {
        const int64_t top = (row % out_h) * win.stride - win.padding;
        const T* image = source + (row / out_h) * height * width * channels;
        for (int64_t ow = 0; ow < out_w; ++ow) {
          const int64_t left = ow * win.stride - win.padding, offset = (row * out_w + ow) * channels;
          int64_t count = 0;
          for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + win.kernel, height); ++h)
            for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + win.kernel, width); ++w, ++count) {
              rows[count] = image + (h * width + w) * channels;
              places[count] = static_cast<uint8_t>((h - top) * win.kernel + (w - left));
            }
          kernels.max_and_place(rows.data(), places.data(), count, channels, target + offset, position + offset);
        }
      };
    });
  });
  return {out.contiguous(x_in.suggest_memory_format()), positions};
}

at::Tensor max_pool2d_backward(
    const at::Tensor& dout_in, const at::Tensor& positions, int64_t height, int64_t width, const PoolWindow& win) {
  const auto dout = dout_in.contiguous(kLayout);
  const int64_t n = dout.size(0), channels = dout.size(1), out_h = dout.size(2), out_w = dout.size(3);
  auto dx = engine::reused_empty(n, channels, height, width, dout.scalar_type());
  DISPATCH(dout, [&] {
    using T = element_t<scalar_t>;
    const auto& kernels = row_kernels<T>();
    const T* source = reinterpret_cast<const T*>(dout.const_data_ptr<scalar_t>());
    const uint8_t* position = positions.const_data_ptr<uint8_t>();
    T* target = reinterpret_cast<T*>(dx.mutable_data_ptr<scalar_t>());
    // Each input pixel gathers from the windows that cover it, so no two threads write the same value.
    share_out(n * height, [&](int64_t) {
      return [&, sum = std::vector<acc_t<scalar_t>>(channels)](int64_t row) mutable {
        const int64_t image = row / height, h = row % height + win.padding;
        const int64_t oh0 = h < win.kernel ? 0 : (h - win.kernel) / win.stride + 1,
                      oh1 = std::min(h / win.stride, out_h - 1);
        for (int64_t column = 0; column < width; ++column) {
          const int64_t w = column + win.padding;
          const int64_t ow0 = w < win.kernel ? 0 : (w - win.kernel) / win.stride + 1,
                        ow1 = std::min(w / win.stride, out_w - 1);
          std::fill(sum.begin(), sum.end(), acc_t<scalar_t>(0));
          for (int64_t oh = oh0; oh <= oh1; ++oh)
            for (int64_t ow = ow0; ow <= ow1; ++ow) {
              const int64_t offset = ((image * out_h + oh) * out_w + ow) * channels;
              const auto at_window = static_cast<uint8_t>((h - oh * win.stride) * win.kernel + (w - ow * win.stride));
              kernels.add_where(source + offset, position + offset, at_window, channels, sum.data());
            }
          kernels.store(sum.data(), channels, target + (row * width + column) * channels);
        }
      };
    });
  });
  return dx.contiguous(dout_in.suggest_memory_format());
}

}  // namespace resnet_fused::cpu
