// What a product of training reads: pixels as they lie in a tensor, or what a pass over rows makes of them, a few at a
// time, so that it is made where it is read and never lies in memory.
#pragma once

#include <atomic>

#include "../kernels/row_kernels.h"

namespace resnet_fused::cpu::engine {

// The arguments are those of pixel 0; their vectors outlive the operand.
template <class T>
class Operand {
 public:
  Operand(const T* pixels, int64_t channels) : channels_(channels), given_(pixels) {}
  // act(norm(y)): a convolution's input.
  Operand(const NormalizeArgs<T>& args, int64_t channels) : channels_(channels), normalize_(args) {}
  // k_dz dz + k_y (y - center) + k: the gradient of a convolution's output.
  Operand(const BackwardApplyArgs<T>& args, int64_t channels) : channels_(channels), apply_(args) {}

  std::atomic<bool>* not_finite = nullptr;  // set by `put` (fill.h) where a value is not finite; nullptr: not looked at

  int64_t channels() const { return channels_; }
  bool is_given() const { return given_ != nullptr; }

  // Keeps what is made, in `all`, for whoever reads it next; it may be what it is made of. Every pixel must then be
  // made once.
  void keep(T* all) { kept_ = all; }
  const T* kept() const { return kept_; }

  // Pixels [first, first + count) as rows of `channels`: where they are, or made in `scratch`, unless they are kept.
  const T* pixels(int64_t first, int64_t count, T* scratch) const {
    const int64_t at = first * channels_;
    if (given_) return given_ + at;
    if (kept_) scratch = kept_ + at;
    if (normalize_.y) {
      NormalizeArgs<T> args = normalize_;
      args.y += at;
      if (args.skip) args.skip += at;
      args.out = scratch;
      row_kernels<T>().normalize(args, count, channels_);
    } else {
      BackwardApplyArgs<T> args = apply_;
      args.dz += at;
      if (args.y) args.y += at;
      if (args.add) args.add += at;
      args.dx = scratch;
      row_kernels<T>().backward_apply(args, count, channels_);
    }
    return scratch;
  }

 private:
  int64_t channels_;
  const T* given_ = nullptr;
  T* kept_ = nullptr;
  NormalizeArgs<T> normalize_{};
  BackwardApplyArgs<T> apply_{};
};

}  // namespace resnet_fused::cpu::engine
