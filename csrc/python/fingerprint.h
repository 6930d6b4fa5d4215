// What tells a change of tensors that PyTorch's version counters do not.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace resnet_fused {

enum class Reads : int64_t { metadata = 0, samples = 1, everything = 2 };

// A hash of the tensors' shapes, strides, dtypes and devices; unless only of their metadata, also of their addresses,
// version counters and values: of up to kSampledLines cache lines of 64 bytes, spread evenly, or of all of them.
// Tensors without a version counter (made in inference mode) are read whole in either case, the values of tensors on
// other devices not at all. Nothing for a tensor whose memory is not its own to read (a fake or wrapped one).
std::optional<uint64_t> fingerprint(const std::vector<at::Tensor>& tensors, Reads reads);

}  // namespace resnet_fused
