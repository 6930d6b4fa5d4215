// What a block computes and what follows from it, decoded from the flat lists of resnet_fused/ops/encoding.py.
// resnet_fused/spec/facts.py decides; nothing is decided here again.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "activations.h"

namespace resnet_fused {

enum class Statistics : int64_t { none = 0, running = 1, batch = 2 };  // a norm's; none: there is no norm
enum class Skip : int64_t { none = 0, identity = 1, projection = 2 };
enum class Order : int64_t { post = 0, pre = 1, branch = 2 };
// From what backward takes the derivative of the block's last activation: `out`, or the activation's argument, computed
// again.
enum class JoinReads : int64_t { nothing = 0, output = 1, sum = 2, branch = 3 };
// What a convolution reads outside its input, which is padded after its norm and activation; nn.Conv2d's padding_mode.
enum class PaddingMode : int64_t { zeros = 0, circular = 1, reflect = 2, replicate = 3 };
enum class Launch : int64_t { single = 0, phased = 1 };

constexpr int64_t kNone = -1;  // no stage

// A convolution and the norm and activation of its stage.
struct Stage {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
  Statistics statistics;
  Activation act;
  double eps;
  int64_t input_stage;   // whose norm and activation make the convolution's input; kNone: x is the input
  int64_t output_stage;  // whose norm and activation read its output
  bool saved;            // forward keeps the output for backward
  bool read;             // backward reads the output, computed again where it is not saved
  bool wants_dy;         // backward needs the gradient of the output
  bool wants_dp;         // ... of the input
  bool library;          // on a GPU the vendor's convolution runs
  PaddingMode padding_mode;

  bool normalizes() const { return statistics != Statistics::none; }
  // Whether what surrounds the input are values of it, which have to be written out.
  bool pads_values() const { return padding_mode != PaddingMode::zeros && (padding[0] > 0 || padding[1] > 0); }
  bool processes() const { return normalizes() || !act.is(ActivationKind::identity); }
};

// How kernels for a GPU run. It changes results by rounding only.
struct How {
  Launch launch = Launch::single;
  bool tf32 = false;  // products of float32
};

struct BlockSpec {
  std::vector<Stage> convs;  // the chain's stages, then the projection
  int64_t stages;            // length of the chain
  Skip skip;
  Order order;
  JoinReads join;
  How how;

  int64_t last() const { return stages - 1; }
  int64_t projection() const { return stages; }
  bool has_projection() const { return skip == Skip::projection; }
  bool from_x(int64_t conv) const { return conv == 0 || conv == projection(); }

  // The stage whose norm stands before a convolution, or reads its output; kNone where there is no norm.
  int64_t input_norm(int64_t conv) const { return norm_of(convs[conv].input_stage); }
  int64_t output_norm(int64_t conv) const { return norm_of(convs[conv].output_stage); }
  bool uses_batch(int64_t norm) const { return norm >= 0 && convs[norm].statistics == Statistics::batch; }

  // Throws ValueError for lists that `encode` cannot have made.
  static BlockSpec decode(at::IntArrayRef ints, at::ArrayRef<double> floats);

 private:
  int64_t norm_of(int64_t stage) const { return stage >= 0 && convs[stage].normalizes() ? stage : kNone; }
};

}  // namespace resnet_fused
