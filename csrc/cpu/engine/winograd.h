// 3×3 convolutions of stride 1 with 16 products where a window has 36: Winograd's minimal filtering F(2×2, 3×3) (Lavin
// & Gray 2016, arXiv:1509.09308). A patch of 4×4 inputs d becomes V = B'dB, a window g once U = GgG'; its 2×2 outputs
// are A'(UV)A, where U and V are multiplied value by value and summed over the channels:
//
//        1  0 -1  0            1   0   0             1  1  1  0
//   B' = 0  1  1  0       G =  1/2 1/2 1/2      A' = 0  1 -1 -1
//        0 -1  1  0            1/2 -1/2 1/2
//        0  1  0 -1            0   0   1
//
// All constants are powers of two. Where an input or a sum is not finite the outputs beside it are not either, and
// PyTorch computes the block.
#pragma once

#include "products.h"

namespace resnet_fused::cpu::engine {

constexpr int64_t kPatch = 16;   // values of V, and of U
constexpr int64_t kOutputs = 4;  // of a patch

// What is multiplied for some patches of one convolution; V lies in scratch memory, patch by patch.
template <class Out>
struct WinogradTask {
  const float* input;      // position 0 of planes (layout.h)
  int64_t pitch;           // elements of a position
  int64_t right, below;    // from an input to its neighbours, in elements
  int64_t channels;        // at least kPanel
  const float* weights;    // U: [panel][16][channels][32]
  const int32_t* first;    // of each patch: the position of its first input
  const int32_t* targets;  // [patch][4]: where its outputs go; -1: nowhere
  int64_t count;           // of patches
  int64_t panel_begin, panel_end;
  float* transformed;  // V: 16 times [count][v_pitch], v_plane apart
  int64_t v_pitch, v_plane;
  float* sums;             // [16][count][32], for one panel
  Epilogue<Out> epilogue;  // its targets are not read
  bool* not_finite;        // set where a sum is not finite
};

// The gradient of the window is the transpose of all that: dU, for each value the product of V and E = A dy A' over all
// patches, and G' dU G.
struct OuterTask {
  const float *v, *e;  // one value of V [patch][v_pitch], of E [patch][32]
  int64_t v_pitch, count, channels;
  float* du;  // [channels][32], which is added to
};

template <class Out>
struct Winograd {
  // U of a panel, from its windows [9][values]: [16][values]
  void (*transform_windows)(const float* windows, int64_t values, float* u);
  // V of patches [begin, end)
  void (*transform_patches)(const WinogradTask<Out>&, int64_t begin, int64_t end);
  // The results, from all of V
  void (*multiply)(const WinogradTask<Out>&);
  // V of one patch, whose values are `plane` apart; E of one of 2×2 gradients, likewise
  void (*transform_patch)(const float* first, int64_t right, int64_t below, int64_t channels, float* v, int64_t plane);
  void (*transform_outputs)(
      const float* first, int64_t right, int64_t below, int64_t channels, float* e, int64_t panel, int64_t plane);
  void (*multiply_outer)(const OuterTask&);
  // The windows [9][values] of a panel, from dU [16] `plane` apart
  void (*transform_gradient)(const float* du, int64_t plane, int64_t values, float* windows);
};

}  // namespace resnet_fused::cpu::engine
