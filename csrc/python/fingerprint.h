// Finds changes of tensors that PyTorch's version counters do not show.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace resnet_fused {

enum class Reads : int64_t { metadata = 0, samples = 1, everything = 2 };

// A hash of the tensors' shapes, strides, dtypes and devices. Unless `reads` is metadata, it also covers their
// addresses, version counters and values: up to kSampledLines cache lines of 64 bytes, spread evenly, or all of them.
// Tensors without a version counter (made in inference mode) are read whole in either case. Values on other devices are
// not read. nullopt for a tensor whose memory cannot be read (a fake or wrapped one).
std::optional<uint64_t> fingerprint(const std::vector<at::Tensor>& tensors, Reads reads);

}  // namespace resnet_fused
