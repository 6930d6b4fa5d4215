// Weights in the order in which the products read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "layout.h"
#include "memory.h"

namespace resnet_fused::cpu::engine {

// [panel][tap][depth][32]; bfloat16 has pairs of channels side by side: [panel][tap][depth / 32][2 x 16 outputs]
// [16 pairs][16 outputs][2]. Zero where there is no weight.
struct Packed {
  Memory memory;
  int64_t panels = 0, taps = 0, depth = 0;
  std::vector<int32_t> first_channel;  // of each panel; empty: 0
  bool finite = true;

  int64_t elements() const { return panels * taps * depth * kPanel; }
};

// weight: [out, in / groups, R, S] of any float dtype; times factor[out], rounded to T once, as the products' type P.
template <class T, class P = T>
Packed pack(const at::Tensor& weight, const float* factor, Layout::Kind kind, int64_t groups);

// U of windows packed by their nine taps (winograd.h): [panel][16][depth][32]. keeps: for many calls.
Packed pack_winograd(const Packed& windows, bool keeps);

// The same as `pack` of one group, as it is, of these taps of the window in this order. backward: for the gradient of
// the input, whose outputs are the inputs. weight is of type T.
using Tap = std::array<int64_t, 2>;
template <class T>
Packed pack_taps(const at::Tensor& weight, const std::vector<Tap>& taps, bool backward);

}  // namespace resnet_fused::cpu::engine
