// Activations and their gradients, one value at a time.
//
// They are called and not inlined: the registers they need are then not taken from epilogues, which hold a pack of
// results, and least of all from those with a ReLU, which is computed in line.
#pragma once

#include "../../block/activations.h"
#include "ptx.cuh"

namespace resnet_fused::cuda {

#define ACTIVATION_FUNCTION static DEVICE
#include "../../block/activation_functions.h"
#undef ACTIVATION_FUNCTION

// Neither of them needs a function.
DEVICE bool is_simple(const Activation& act) {
  return act.kind == ActivationKind::identity || act.kind == ActivationKind::relu;
}

// act(z); slope: what prelu has learned, or the activation's constant.
NOINLINE_DEVICE float activate(ActivationKind kind, float z, float slope) {
#define CASE(name)           \
  case ActivationKind::name: \
    return activations::name::forward(z, slope);
  switch (kind) { RESNET_FUSED_ACTIVATIONS(CASE) }
#undef CASE
  return z;
}

// dout act'(z). Where the derivative is zero so is the gradient, whatever dout is: PyTorch leaves such values out.
NOINLINE_DEVICE float gradient_through(ActivationKind kind, float dout, float z, float slope) {
  float derivative = 1.0f;
#define CASE(name)                                        \
  case ActivationKind::name:                              \
    derivative = activations::name::derivative(z, slope); \
    break;
  switch (kind) { RESNET_FUSED_ACTIVATIONS(CASE) }
#undef CASE
  return derivative == 0.0f ? 0.0f : dout * derivative;
}

}  // namespace resnet_fused::cuda
