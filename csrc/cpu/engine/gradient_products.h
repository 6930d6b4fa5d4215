// Products of a convolution's weight gradient: sums over positions of one operand's channels times the other's, by
// tiles or vectors. Single-threaded and torch-free.
//
// One operand lies transposed, [panel][32 channels][pitch positions], so that a tap of the window is a shift by whole
// elements. The other lies in pairs of positions, [panel][position / 2][32 channels][2], as products of pairs want it.
#pragma once

#include "products.h"

namespace resnet_fused::cpu::engine {

constexpr int64_t kPositions = 32;           // that a product sums, and that are packed at a time
constexpr int64_t kBlock = kPanel * kPanel;  // sums of a panel times a panel

// Where a tap's positions begin in both operands; that of `interleaved` is even.
struct TapRun {
  int64_t transposed, interleaved;
  int64_t steps;  // of kPositions
};

// A panel of each operand.
struct PanelPair {
  int32_t transposed, interleaved;
};

struct GradientTask {
  const bf16* transposed;
  const bf16* interleaved;
  int64_t pitch;              // positions of a channel of `transposed`
  int64_t interleaved_panel;  // elements of a panel
  const TapRun* runs;         // of each tap
  int64_t taps;
  const PanelPair* pairs;
  int64_t pair_count;
  float* sums;  // [pair][tap][32 of transposed][32 of interleaved]
  bool adds;    // to what `sums` holds
};

// Which part of a pair's sums is written: the sum of `count` blocks in this order, transposed if asked for, and of its
// 32 x 32 values rows [row, row_end) and columns [column, column_end).
struct BlockSums {
  const float* const* blocks;
  int64_t count;
  bool transposed;
  int64_t row, row_end, column, column_end;
  int64_t pitch;  // elements from a row to the next where they are written
};

struct GradientKernels {
  // Steps that a product sums at once: those that are taken again for other taps, and those of one tap alone.
  int64_t steps, long_steps;
  // Pack kPositions pixels of `channels` channels; zeros fill the last panel. Whether all values are finite.
  bool (*transpose)(const bf16* const* pixels, int64_t channels, int64_t pitch, bf16* out);
  bool (*interleave)(const bf16* const* pixels, int64_t channels, int64_t panel, bf16* out);
  void (*multiply)(const GradientTask&);
  // To `out`, which is that of the first row and column.
  void (*store)(const BlockSums&, bf16* out);
  void (*store_float)(const BlockSums&, float* out);
};

// The table of an instruction set (isa.h); nullptr: it has none.
const GradientKernels* gradient_kernels();

}  // namespace resnet_fused::cpu::engine
