// Single values between the element types, and the tensor types that these are.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "../kernels/scalar_types.h"

namespace resnet_fused::cpu::engine {

inline at::ScalarType scalar_type(float) { return at::kFloat; }
inline at::ScalarType scalar_type(bf16) { return at::kBFloat16; }
inline at::ScalarType scalar_type(f16) { return at::kHalf; }

// To nearest, ties to even.
template <class T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, bf16>)
    return {c10::BFloat16(value).x};
  else if constexpr (std::is_same_v<T, f16>)
    return {c10::Half(value).x};
  else
    return value;
}

// To a type that holds every value of T.
template <class P, class T>
P exactly(T value) {
  if constexpr (std::is_same_v<T, P>)
    return value;
  else if constexpr (std::is_same_v<T, bf16>)
    return static_cast<float>(c10::BFloat16(value.bits, c10::BFloat16::from_bits()));
  else
    return static_cast<float>(c10::Half(value.bits, c10::Half::from_bits()));
}

}  // namespace resnet_fused::cpu::engine
