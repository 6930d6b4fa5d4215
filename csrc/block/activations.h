// The activations by name. Their order gives their codes and is that of KINDS in resnet_fused/spec/activations.py.
// activation_functions.h computes them.
#pragma once

#include <stdint.h>

namespace resnet_fused {

#define RESNET_FUSED_ACTIVATIONS(X) \
  X(identity)                       \
  X(relu)                           \
  X(relu6)                          \
  X(leaky_relu)                     \
  X(prelu)                          \
  X(silu)                           \
  X(hardswish)                      \
  X(hardsigmoid)                    \
  X(gelu)                           \
  X(gelu_tanh)

#define NAME(name) name,
enum class ActivationKind : int32_t { RESNET_FUSED_ACTIVATIONS(NAME) };
#undef NAME

#define ONE(name) +1
constexpr int32_t kActivations = RESNET_FUSED_ACTIVATIONS(ONE);
#undef ONE

struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double parameter = 0;  // leaky_relu's slope

  bool is(ActivationKind other) const { return kind == other; }
};

}  // namespace resnet_fused
