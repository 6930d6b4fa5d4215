// Depthwise convolutions over tiles of channels in float32: single-threaded, torch-free, one table per instruction set.
//
// A plane holds pixels of one tile of `lanes` channels: [pixels, lanes] floats. Borders are zeros that have been
// written out, so a tap of the window is one shift for all outputs of a row.
#pragma once

#include "../x86.h"
#include "scalar_types.h"

namespace resnet_fused::cpu {

// Rows of outputs as sums over taps: out[q] = start + sum over t of weights[t] * in[offsets[t] + q * step].
template <class T>
struct DepthwiseRow {
  const float* in;
  const int64_t* offsets;  // [taps], in floats
  const float* weights;    // [taps, lanes]
  int64_t taps;
  int64_t step;        // between outputs, in floats
  const float* start;  // [lanes]
  int64_t count;       // of outputs
  T* out;
  int64_t pitch;     // between outputs, in elements
  int64_t channels;  // of the tile that exist; the others are not written
};

// Sums of products over a band:
// sums[t] += sum over rows and q of dy[row, q] * in[row * row_step + offsets[t] + q * step].
struct DepthwiseProducts {
  const float* dy;  // [rows, count, lanes]
  const float* in;
  const int64_t* offsets;
  int64_t taps, rows, count, row_step, step;
  double* sums;  // [taps, lanes]
};

template <class T>
struct DepthwiseKernels {
  int64_t lanes;
  // planes[i][q] := the i-th tile of `channels` channels of pixel q, for tiles that lie `plane` floats apart; lanes
  // without a channel are zero. pitch: between pixels of `from`.
  void (*unpack)(const T* from, int64_t pitch, int64_t pixels, int64_t channels, int64_t plane, float* planes);
  void (*convolve)(const DepthwiseRow<T>&);
  void (*add_products)(const DepthwiseProducts&);
};

// The table for the instruction set of isa.h.
template <class T>
const DepthwiseKernels<T>& depthwise_kernels();

}  // namespace resnet_fused::cpu
