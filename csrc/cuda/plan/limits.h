// What the kernels of csrc/cuda can run and count.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace resnet_fused::cuda {

// Whether there is a kernel for a convolution: it has no groups, and 8 channels are read at a time.
inline bool has_kernel(int64_t output_channels, int64_t channels_in_group, int64_t groups) {
  return groups == 1 && output_channels % 8 == 0 && channels_in_group % 8 == 0;
}

// Why a convolution cannot be counted, as the rest of a sentence about these kernels. Rows and columns are counted in
// 14 bits, pixels and the values that a tile's images span in 31. channels: the wider of its sides; in, out: rows,
// columns.
std::optional<std::string> too_large(
    int64_t batch, int64_t channels, const std::vector<int64_t>& in, const std::vector<int64_t>& out,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding);

}  // namespace resnet_fused::cuda
