// Convolutions as matrix products of our own: positions times channels, by one table of kernels per instruction set.
// Single-threaded and torch-free.
//
// The input is a buffer of positions, each of `pitch` elements, in which a tap of the window is a shift (layout.h).
// Weights are packed in panels of 32 outputs (pack.h). All products of an output are summed in float before the
// epilogue rounds the sum once, to the element type Out of the results.
#pragma once

#include "../../block/activations.h"
#include "../kernels/scalar_types.h"
#include "../x86.h"

namespace resnet_fused::cpu::engine {

constexpr int64_t kPanel = 32;     // outputs
constexpr int64_t kTileRows = 16;  // the most positions of a tile of any instruction set
// Rows of weights that are packed together: the channels of a tap are padded to their multiple.
template <class T>
constexpr int64_t kDepthStep = sizeof(T) == 2 ? 32 : 1;

// Neighbouring positions. A tile reads as many as it has rows, beginning with `first`, and gives the results of
// [begin, end).
struct Rows {
  int32_t first;
  int16_t begin, end;
};

// What is multiplied: for each tap and panel `depth` channels.
template <class T>
struct Factor {
  const T* input = nullptr;  // position 0
  int64_t pitch = 0;
  const int64_t* taps = nullptr;           // shifts, in elements
  int64_t tap_count = 0;                   // 0: no such factor
  int64_t depth = 0;                       // multiple of kDepthStep
  const int32_t* first_channel = nullptr;  // of each panel, where groups read a part of the channels; nullptr: 0
  const T* weights = nullptr;              // [panel][tap][depth][32]
};

// Of whole panels and sums that are only shifted, what the norm around them needs is gathered on the way: the
// statistics of the results, or the sums of a gradient behind the norm's ReLU.
enum class Gathers {
  nothing,
  statistics,  // rows of [3][32] for each panel: a value of the channel, the sum of (z - value), and of its square
  gradient  // results are zero where the norm of y is not positive; rows of [2][32]: their sum, that times (y - center)
};

// For Gathers::gradient: y laid out as `out`, and its norm's vectors [panels * 32].
template <class T>
struct Differentiated {
  const T* y = nullptr;
  const float *center = nullptr, *scale = nullptr, *shift = nullptr;
  bool relu = false;  // whether there is one
};

// out = act(scale product + shift + residual_scale residual), or branch_scale act(scale product + shift) + ...
template <class T>
struct Epilogue {
  const float* scale = nullptr;  // [panels * 32], as all of these
  const float* shift = nullptr;
  const T* residual = nullptr;            // laid out as `out`; nullptr: none
  const float* residual_scale = nullptr;  // nullptr: 1
  Activation act;
  const float* slope = nullptr;
  const float* branch_scale = nullptr;  // nullptr: the activation stands behind the sum
  T* out = nullptr;
  int64_t pitch = 0;
  const int32_t* target = nullptr;  // which position of `out` each position is; -1: none
  int64_t channels = 0;             // of `out` that are written; those beyond the convolution's own are made from zeros
  int64_t ahead = 0;           // distance to the line that will be written soon and is in no cache; 0: it is in a cache
  bool* not_finite = nullptr;  // set where an output is not finite; nullptr: not looked at
  Gathers gathers = Gathers::nothing;
  float* sums = nullptr;    // [panels], each as `gathers` says
  int32_t* rows = nullptr;  // [panels]: how many results the statistics are of; 0 at first
  Differentiated<T> behind;
};

template <class T, class Out = T>
struct Task {
  Factor<T> factors[2];  // summed
  const Rows* rows;
  int64_t row_count;
  int64_t panel_begin, panel_end;
  bool panels_inner;  // all panels for some positions before the next positions, or the reverse
  bool prefetches;    // the first factor's input may be far away
  Epilogue<Out> epilogue;
};

template <class Out>
struct Winograd;  // winograd.h

template <class T, class Out = T>
struct Products {
  int64_t tile_rows;
  bool reads_whole_tiles;  // also where fewer rows are asked for
  void (*multiply)(const Task<T, Out>&);
  const Winograd<Out>* winograd = nullptr;  // of floats
};

// The tables of an instruction set (isa.h).
template <class T, class Out = T>
const Products<T, Out>& products();

// Whether bfloat16 is widened where it is laid out and packed, once, and not in every product.
bool widens_bfloat16();

}  // namespace resnet_fused::cpu::engine
