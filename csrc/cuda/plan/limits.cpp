#include "limits.h"

#include <algorithm>

#include "../../block/integer_division.h"

namespace resnet_fused::cuda {

std::optional<std::string> too_large(
    int64_t batch, int64_t channels, const std::vector<int64_t>& in, const std::vector<int64_t>& out,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  for (size_t d = 0; d < 2; ++d)
    if (in[d] + 2 * padding[d] >= 1 << 14)
      return "take pictures of up to 16383 rows and columns with their padding, got " + text(in[d]) + " and twice " +
             text(padding[d]);
  const int64_t pixels = std::max(in[0] * in[1], out[0] * out[1]);
  const int64_t fewest = std::min(out[0] * out[1], ceil_div(in[0], stride[0]) * ceil_div(in[1], stride[1]));
  if (pixels * channels <= 1 << 29 && (128 / fewest + 2) * pixels * channels < int64_t{1} << 31 &&
      batch * pixels <= 1 << 30)
    return std::nullopt;
  return "count tiles in 32 bits: up to 2^30 pixels per batch and about 2^29 values per image, got " + text(batch) +
         " images of " + text(channels) + "x" + text(in[0]) + "x" + text(in[1]);
}

}  // namespace resnet_fused::cuda
