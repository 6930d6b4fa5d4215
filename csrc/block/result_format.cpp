#include "result_format.h"

#include <ATen/ATen.h>

#include "kernel_layout.h"

namespace resnet_fused {

bool is_channels_last(
    bool pre_activation, bool x_is_last, int64_t channels, const std::vector<bool>& processes,
    const std::vector<bool>& circular, const std::vector<bool>& weight_is_last, const std::vector<int64_t>& widths,
    const std::vector<bool>& one_pixel) {
  bool is_last = x_is_last;
  for (size_t i = 0; i < processes.size(); ++i) {
    if (pre_activation && processes[i] && channels == 1) is_last = false;
    is_last = (is_last && !circular[i]) || weight_is_last[i];
    channels = widths[i];
    if (one_pixel[i] || (!pre_activation && processes[i] && channels == 1)) is_last = false;
  }
  return is_last;
}

at::MemoryFormat result_format(const at::Tensor& x, const std::vector<at::Tensor>& weights, const BlockSpec& spec) {
  std::vector<bool> processes, circular, weight_is_last, one_pixel;
  std::vector<int64_t> widths;
  std::array<int64_t, 2> size{x.size(2), x.size(3)};
  for (int64_t i = 0; i < spec.stages; ++i) {
    const auto& stage = spec.convs[i];
    const auto& w = weights[i];
    for (int64_t d = 0; d < 2; ++d)
      size[d] = (size[d] + 2 * stage.padding[d] - stage.dilation[d] * (w.size(2 + d) - 1) - 1) / stage.stride[d] + 1;
    processes.push_back(stage.processes());
    circular.push_back(stage.padding_mode == PaddingMode::circular);
    weight_is_last.push_back(!w.is_mkldnn() && w.suggest_memory_format() == kLayout);
    widths.push_back(w.size(0));
    one_pixel.push_back(size[0] * size[1] == 1);
  }
  const bool x_is_last = x.suggest_memory_format() == kLayout;
  return is_channels_last(
             spec.order == Order::pre, x_is_last, x.size(1), processes, circular, weight_is_last, widths, one_pixel)
             ? kLayout
             : at::MemoryFormat::Contiguous;
}

}  // namespace resnet_fused
