// Whole numbers of parts. Kernels on a GPU have their own (csrc/cuda/kernels/packs.cuh): these are for the host.
#pragma once

#include <cstdint>

namespace resnet_fused {

// How many parts of `part` cover `whole`.
constexpr int64_t ceil_div(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// The smallest multiple of `step` that is at least `value`.
constexpr int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

}  // namespace resnet_fused
