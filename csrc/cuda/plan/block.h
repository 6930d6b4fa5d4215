// What forward, backward and evaluation of a block on a GPU share: its tensors as kernels take them, and its phases.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "../../block/kernel_layout.h"
#include "../../block/spec.h"
#include "../../block/tensors.h"
#include "pass.h"
#include "plan.h"

namespace resnet_fused::cuda {

using Size = std::array<int64_t, 2>;  // height, width

// An activation and prelu's slopes, as an epilogue takes them.
struct Act {
  Activation kind;
  Vector slopes;

  bool is_identity() const { return kind.is(ActivationKind::identity); }
};

// An operand, the tensors behind it, and the picture it is.
struct Input {
  Operand operand;
  at::Tensor tensor;
  Size size;
  at::Tensor y = {};  // of a gradient
  Act act = {};       // to be applied to the operand by a pass: products do not compute it

  bool computed() const { return operand.source != Source::raw || operand.relu || !act.is_identity(); }
};

inline void set_act(Epilogue& e, const Act& act) {
  e.act = act.kind;
  e.slopes = act.slopes;
}

inline bool is_relu(const Activation& act) { return act.is(ActivationKind::relu); }

// Activations are [N, C, H, W] in channels_last. A norm is named by the stage that owns it; kNone: there is no norm.
class BlockPlan {
 public:
  BlockPlan(const BlockTensors& tensors, const BlockSpec& spec);

  const BlockTensors& tensors;
  const BlockSpec& spec;
  at::Tensor x;
  std::vector<at::Tensor> weights;  // [K, C, R, S] whose memory is [K, R, S, C]
  std::vector<at::Tensor> y;        // of each convolution
  std::vector<at::Tensor> stats;    // [2, C] of each norm with batch statistics
  std::vector<Size> sizes;          // of each y
  Plan plan;

  int64_t last() const { return spec.last(); }
  int64_t projection() const { return spec.projection(); }
  int64_t width(int64_t conv) const { return weights[conv].size(0); }
  const at::Tensor& input(int64_t conv) const { return spec.from_x(conv) ? x : y[conv - 1]; }
  Size input_size(int64_t conv) const { return spec.from_x(conv) ? Size{x.size(2), x.size(3)} : sizes[conv - 1]; }
  int64_t pixels(Size size) const { return x.size(0) * size[0] * size[1]; }
  bool in_library(int64_t conv) const { return library_[conv]; }

  at::Tensor activation(int64_t channels, Size size) const;
  at::Tensor filled_later(at::IntArrayRef shape, at::ScalarType type) const;
  float* new_table(int64_t channels) {
    return plan.keep(filled_later({kTableRows, channels}, at::kFloat)).mutable_data_ptr<float>();
  }

  Vector vector(const std::optional<at::Tensor>& t) { return vector_of(plan, t); }
  Vector scale(const std::optional<at::Tensor>& t);
  Act act(int64_t stage);  // kNone: the identity
  Norm norm(int64_t stage);
  float* table(int64_t norm);

  Input input_of(const at::Tensor& u) const { return {operand_of(u), u, {u.size(2), u.size(3)}}; }
  Product product(int64_t conv, const Input& source, bool transposed);
  // P of a convolution: a pass can make it from what is stored, and so can a product's prologue where `act` is empty.
  Input source(int64_t conv);

  // --- phases: each is added to the plan ---------------------------------------------------------------------------

  void write_tables(const std::vector<int64_t>& norms);
  void write_table(int64_t norm, const Norm& of);
  // y of a convolution: as a phase, or by the library with passes around it. norm: whose statistics are gathered.
  at::Tensor convolve(int64_t conv, Epilogue epilogue, int64_t norm);
  // The gradient of a convolution's input from dy.
  at::Tensor data_gradient(int64_t conv, const Input& dy, Epilogue epilogue);
  at::Tensor weight_gradient(int64_t conv, const Input& dy);
  // A pass over `input`, whose results the epilogue stores.
  void pass(const Input& input, const Epilogue& epilogue);
  // The operand as a tensor of its own.
  Input materialize(const Input& input);
  // P of a convolution as a product can read it: an activation other than relu is computed by a pass before.
  Input product_source(int64_t conv);

 private:
  void convolution_phase(
      const Input& source, int64_t conv, bool transposed, at::Tensor& result, Size size, Epilogue epilogue);
  Geometry geometry(int64_t conv) const;
  void hold(const Input& input);

  std::vector<bool> library_;
  std::vector<at::Tensor> tables_;
  int64_t norm_channels(int64_t norm) const;
};

}  // namespace resnet_fused::cuda
