// Both operands of a part of a weight gradient, packed as its products read them (gradient_products.h).
#pragma once

#include "gradient_layout.h"
#include "operand.h"

namespace resnet_fused::cpu::engine {

// The memory of a packed part: first the transposed operand, then the interleaved one.
struct PackFormat {
  bool transposes_gradient;                           // or the input
  int64_t transposed_channels, interleaved_channels;  // multiples of kPanel
  int64_t pitch = 0;                                  // positions of a channel of the transposed operand
  int64_t positions = 0;                              // of the interleaved operand

  // Makes room for a part.
  void widen(const GradientLayout& layout, const Slab& part);
  int64_t panel() const { return positions * kPanel; }
  int64_t interleaved() const { return transposed_channels * pitch; }
  int64_t elements() const { return interleaved() + interleaved_channels * positions; }
};

// Packs one of `shares` shares of an operand's positions. Whether all its values are finite.
bool pack(
    const GradientLayout& layout, const Slab& part, Side side, const Operand<bf16>& operand, const PackFormat& format,
    int64_t share, int64_t shares, bf16* to);

}  // namespace resnet_fused::cpu::engine
