// What a block computes, decoded from the flat lists of resnet_fused/spec/block.py (BlockSpec.encode).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "tensors.h"

namespace resnet_fused {

enum class Norm : int64_t { none = 0, running = 1, batch = 2 };
enum class Skip : int64_t { none = 0, identity = 1, projection = 2 };

struct Stage {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  Norm norm;
  bool relu;
  double eps;
};

// How kernels for a GPU are to run, where somebody has measured or asked; it changes no result but by rounding.
enum class Launch : int64_t { choose = 0, single = 1, phased = 2 };
enum class Library : int64_t {
  choose = 0,
  none = 1,
  spatial = 2,
  all = 3
};  // convolutions left to the vendor's library
struct How {
  Launch launch = Launch::choose;
  Library library = Library::choose;
  bool tf32 = false;  // products of float32
};

struct BlockSpec {
  std::vector<Stage> convs;  // the chain's stages, then the projection
  int64_t stages;            // length of the chain
  Skip skip;
  bool pre_activation;
  bool low_memory;
  How how;

  const Stage& last() const { return convs[stages - 1]; }
  bool has_projection() const { return skip == Skip::projection; }

  // Whether backward needs the output of convolution i and forward therefore saves it.
  // The same rule as `saved_convs` in resnet_fused/ops/operators.py.
  bool saves(int64_t i, const Needs& needs) const { return i < stages - 1 || (!low_memory && needs_output(i, needs)); }

  // Whether backward needs it at all; recomputed when it is not saved.
  bool needs_output(int64_t i, const Needs& needs) const {
    if (i < stages - 1) return true;
    if (i == stages - 1 ? needs.branch_scale() : needs.skip_scale()) return true;
    if (pre_activation) return false;
    // running statistics without a gradient for gamma and beta: dy is dz times a constant
    const bool through_norm = convs[i].norm == Norm::batch || (convs[i].norm == Norm::running && needs.norm(i));
    return through_norm || (skip == Skip::none && convs[i].relu);
  }

  // Throws ValueError for lists that `encode` cannot have made.
  static BlockSpec decode(at::IntArrayRef ints, at::ArrayRef<double> eps);
};

}  // namespace resnet_fused
