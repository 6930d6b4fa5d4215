// The element types of the row kernels, without torch: bit patterns and their arithmetic type.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arith_t = typename Arithmetic<T>::type;

// Sums over many rows are kept in double, as PyTorch keeps them. Those of bfloat16, whose values carry eight bits, are
// kept in float, which is twice as fast.
template <class T>
struct Summation {
  using type = double;
};
template <>
struct Summation<bf16> {
  using type = float;
};
template <class T>
using sum_t = typename Summation<T>::type;

}  // namespace resnet_fused::cpu
