#include "result_format.h"

#include <ATen/ATen.h>

namespace resnet_fused {

at::MemoryFormat result_format(const at::Tensor& x, const std::vector<at::Tensor>& weights, const BlockSpec& spec) {
  constexpr auto last = at::MemoryFormat::ChannelsLast;
  bool is_last = x.suggest_memory_format() == last;
  int64_t channels = x.size(1);
  std::array<int64_t, 2> size{x.size(2), x.size(3)};
  for (int64_t i = 0; i < spec.stages; ++i) {
    const auto& stage = spec.convs[i];
    const auto& w = weights[i];
    const auto forgets = [&] { return channels == 1 && (stage.norm != Norm::none || stage.relu); };
    if (spec.pre_activation && forgets()) is_last = false;
    for (int64_t d = 0; d < 2; ++d)
      size[d] = (size[d] + 2 * stage.padding[d] - stage.dilation[d] * (w.size(2 + d) - 1) - 1) / stage.stride[d] + 1;
    channels = w.size(0);
    if (!is_last) is_last = !w.is_mkldnn() && w.suggest_memory_format() == last;
    if (size[0] * size[1] == 1 || (!spec.pre_activation && forgets())) is_last = false;
  }
  return is_last ? last : at::MemoryFormat::Contiguous;
}

}  // namespace resnet_fused
