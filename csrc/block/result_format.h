// The memory format of a block's result, as PyTorch's own operations would give it one after another.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "spec.h"

namespace resnet_fused {

// For a block whose x has `channels` channels and is channels_last or not. For each stage: whether its norm or
// activation changes anything, whether its padding is circular, whether its weight is channels_last, how many channels
// its convolution gives, whether the result is a single pixel.
//
// A convolution's result is channels_last where its input or its weight is, except for a single pixel. A norm or an
// activation of a single channel and circular padding lose the format. PyTorch itself departs from this where x has one
// channel and is a slice.
bool is_channels_last(
    bool pre_activation, bool x_is_last, int64_t channels, const std::vector<bool>& processes,
    const std::vector<bool>& circular, const std::vector<bool>& weight_is_last, const std::vector<int64_t>& widths,
    const std::vector<bool>& one_pixel);

// The same of tensors. Weights in oneDNN's layout have no format and count as contiguous.
at::MemoryFormat result_format(const at::Tensor& x, const std::vector<at::Tensor>& weights, const BlockSpec& spec);

}  // namespace resnet_fused
