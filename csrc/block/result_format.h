// The memory format of a block's result.
#pragma once

#include "spec.h"

namespace resnet_fused {

// What PyTorch's own operations would give, one after another: a convolution's result is channels_last where its input
// or its weight is, but for a single pixel; a norm or an activation of a single channel forgets it. Packed weights have
// no format and count as contiguous. The same rule as `output_format` in resnet_fused/ops/operators.py.
at::MemoryFormat result_format(const at::Tensor& x, const std::vector<at::Tensor>& weights, const BlockSpec& spec);

}  // namespace resnet_fused
