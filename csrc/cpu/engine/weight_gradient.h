// The gradient of a convolution's weight: products over positions, summed in float and rounded once.
//
// Few weights: the parts are dealt out in slots, and each slot, which one thread packs and multiplies, has sums of its
// own, which are added in the order of the slots. Many weights: all threads pack all parts, then each makes a share of
// the sums, as many at a time as stay in its second cache.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../../block/spec.h"
#include "gradient_pack.h"

namespace resnet_fused::cpu::engine {

// Why the engine does not train such a weight in this dtype on this machine; nullopt where it does.
std::optional<std::string> reason_against_training(const at::Tensor& weight, at::ScalarType dtype);

// Why this machine's kernels do not compute it for inputs of this dtype, or others do so faster; nullopt where they do.
std::optional<std::string> reason_against_weight_gradient(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype);

inline bool has_weight_gradient(const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  return !reason_against_weight_gradient(weight, stage, dtype);
}

// In weight's memory format and this dtype, float or bfloat16. Undefined where a value that is not finite might meet a
// zero of the padding: the product would be NaN, where the convolution has none.
at::Tensor weight_gradient(
    const Operand<bf16>& dy, const Operand<bf16>& p, int64_t images, Size input, Size output, const at::Tensor& weight,
    const Stage& stage, at::ScalarType result);

class WeightGradient {
 public:
  WeightGradient(
      const at::Tensor& weight, const Stage& stage, int64_t images, Size input, Size output, at::ScalarType result);

  at::Tensor compute(const Operand<bf16>& dy, const Operand<bf16>& p);

  // A window of one pixel, and few weights: rows may also be given as somebody makes them, output rows [begin, end) of
  // all images one behind the other, those of a slot by one thread; `finish` follows.
  bool takes_rows() const { return apart_ && !layout_.mixes_zeros(); }
  int64_t slots() const { return slots_; }
  void add_rows(
      int64_t thread, int64_t slot, int64_t begin, int64_t end, const Operand<bf16>& dy, const Operand<bf16>& p);
  at::Tensor finish();

 private:
  struct Groups {
    int64_t count, out, in;  // channels of each
  };

  at::Tensor weight_;
  Groups groups_;
  GradientLayout layout_;
  PackFormat format_;
  std::vector<PanelPair> pairs_;
  int64_t threads_, slots_;
  bool apart_;
  int64_t at_once_;  // pairs whose sums a slot has, or a thread
  std::vector<Slab> parts_;
  int64_t round_;  // parts that are packed together
  at::Tensor packs_, sums_, result_;
  std::vector<char> finite_, begun_;  // of each thread; of each slot

  int64_t pair_floats() const { return layout_.taps() * kBlock; }
  bf16* pack_at(int64_t index);
  float* sums_of(int64_t slot);
  bool is_sound() const;
  int64_t longest() const;  // steps of a product
  void cut();
  void add(int64_t thread, int64_t slot, const Slab& part, const Operand<bf16>& dy, const Operand<bf16>& p);
  void find_pairs();
  void multiply(const Slab& part, const bf16* packed, int64_t from, int64_t to, float* sums, bool adds);
  void write(int64_t pair, const float* sums, int64_t partials);
  template <class T, class Store>
  void write_to(T* dw, const Store& store, int64_t pair, const float* sums, int64_t partials) const;
  // Of parts [first, first + count): whether the result will be sound, and its sums.
  bool pack_together(int64_t first, int64_t count, const Operand<bf16>& dy, const Operand<bf16>& p);
  void multiply_together(int64_t first, int64_t count);
  at::Tensor result() const;
};

}  // namespace resnet_fused::cpu::engine
