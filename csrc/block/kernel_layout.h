// The memory format that all kernels compute in, on every device, and the way back to the caller's.
#pragma once

#include <ATen/ATen.h>

namespace resnet_fused {

constexpr auto kLayout = at::MemoryFormat::ChannelsLast;

// A kernel's result, [N, C, H, W] in kLayout, with exactly the strides of a new tensor in x's memory format.
inline at::Tensor in_format_of(const at::Tensor& x, const at::Tensor& result) {
  const auto format = x.suggest_memory_format();
  return format == kLayout ? result : result.clone(format);
}

}  // namespace resnet_fused
