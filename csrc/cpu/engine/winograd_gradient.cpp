#include "winograd_gradient.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "../../block/integer_division.h"
#include "../../block/kernel_layout.h"
#include "../kernels/row_kernels.h"
#include "../share_out.h"
#include "memory.h"
#include "training.h"
#include "winograd.h"

namespace resnet_fused::cpu::engine {
namespace {

// Patches whose products are summed in registers; V and E of a group wait in the last cache for theirs.
constexpr int64_t kChunk = 256, kFewest = 256, kMost = 1024, kValues = 1 << 17;

// A picture's pixels, of which those beyond its edges are zeros.
struct Picture {
  const float* pixels;
  int64_t height, width, channels;

  // side × side pixels from (y, x) on: where they are, or copied to `scratch`. Returns the first and the distances to
  // the right and below.
  struct Square {
    const float* first;
    int64_t right, below;
  };
  Square square(int64_t y, int64_t x, int64_t side, float* scratch) const {
    if (y >= 0 && x >= 0 && y + side <= height && x + side <= width)
      return {pixels + (y * width + x) * channels, channels, width * channels};
    for (int64_t i = 0; i < side * side; ++i) {
      const int64_t row = y + i / side, column = x + i % side;
      float* to = scratch + i * channels;
      if (row < 0 || column < 0 || row >= height || column >= width)
        std::memset(to, 0, channels * sizeof(float));
      else
        std::memcpy(to, pixels + (row * width + column) * channels, channels * sizeof(float));
    }
    return {scratch, channels, side * channels};
  }
};

}  // namespace

at::Tensor winograd_weight_gradient(const at::Tensor& dy, const at::Tensor& p, const at::Tensor& weight) {
  if (is_small(batch_of(p), p.size(1))) return {};
  const auto& kernels = *products<float>().winograd;
  const int64_t images = p.size(0), in = p.size(1), height = p.size(2), width = p.size(3), out = dy.size(1);
  const int64_t rows = ceil_div(height, 2), columns = ceil_div(width, 2), of_image = rows * columns;
  const int64_t all = images * of_image, panels = out / kPanel,
                group = std::min(all, std::clamp(kValues / std::max(in, out), kFewest, kMost));
  const int64_t plane = group * in + 16, panel = group * kPanel, e_plane = group * out + 16;  // a line apart
  const auto floats = [](int64_t count) { return reuse(count * static_cast<int64_t>(sizeof(float))); };
  const Memory v_memory = floats(kPatch * plane), e_memory = floats(kPatch * e_plane),
               du_memory = floats(kPatch * out * in);
  float *v = reinterpret_cast<float*>(v_memory.get()), *e = reinterpret_cast<float*>(e_memory.get());
  float* du = reinterpret_cast<float*>(du_memory.get());  // [16][panel][in][32]
  const float *gradients = dy.const_data_ptr<float>(), *inputs = p.const_data_ptr<float>();
  for (int64_t first = 0; first < all; first += group) {
    const int64_t count = std::min(group, all - first), pieces = ceil_div(count, 16);
    for_each_job(pieces, [&](int64_t piece) {
      float* square = reinterpret_cast<float*>(scratch(kPatch * std::max(in, out) * sizeof(float)));
      for (int64_t i = piece * count / pieces; i < (piece + 1) * count / pieces; ++i) {
        const int64_t image = (first + i) / of_image, patch = (first + i) % of_image;
        const int64_t y = patch / columns * 2, x = patch % columns * 2, pixels = image * height * width;
        const auto d = Picture{inputs + pixels * in, height, width, in}.square(y - 1, x - 1, 4, square);
        kernels.transform_patch(d.first, d.right, d.below, in, v + i * in, plane);
        const auto g = Picture{gradients + pixels * out, height, width, out}.square(y, x, 2, square);
        kernels.transform_outputs(g.first, g.right, g.below, out, e + i * kPanel, panel, e_plane);
      }
    });
    for_each_job(kPatch * panels, [&](int64_t job) {
      const int64_t i = job / panels, o = job % panels;
      float* to = du + job * in * kPanel;
      if (first == 0) std::fill_n(to, in * kPanel, 0.0f);
      for (int64_t from = 0; from < count; from += kChunk)
        kernels.multiply_outer(
            {v + i * plane + from * in, e + i * e_plane + o * panel + from * kPanel, in, std::min(kChunk, count - from),
             in, to});
    });
  }
  auto dw = at::empty({out, in, 3, 3}, weight.options().memory_format(kLayout));
  float* to = dw.mutable_data_ptr<float>();  // [out][9][in]
  std::atomic<bool> finite{true};
  for_each_job(panels, [&](int64_t o) {
    const int64_t values = in * kPanel;
    float* windows = reinterpret_cast<float*>(scratch(9 * values * sizeof(float)));
    kernels.transform_gradient(du + o * values, panels * values, values, windows);
    if (!row_kernels<float>().all_finite(windows, 9 * values)) finite = false;
    for (int64_t k = 0; k < kPanel; ++k)
      for (int64_t tap = 0; tap < 9; ++tap) {
        float* row = to + ((o * kPanel + k) * 9 + tap) * in;
        for (int64_t c = 0; c < in; ++c) row[c] = windows[tap * values + c * kPanel + k];
      }
  });
  if (!finite) return {};
  return dw.contiguous(weight.suggest_memory_format());
}

}  // namespace resnet_fused::cpu::engine
