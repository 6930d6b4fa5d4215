// From phases to launches: all in one cooperative launch with grid barriers, or one launch each.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "../../block/spec.h"
#include "../launch/launch.h"

namespace resnet_fused::cuda {

Scalar scalar_of(const at::Tensor& t);

// What launches for tensors on the CPU: the tests' emulator of a GPU; null removes it.
void install_emulator(const Launcher* launcher);

class Plan {
 public:
  // For activations like x, on x's device and its current stream. mode: single or phased.
  Plan(const at::Tensor& x, Launch mode);

  const Device& device() const { return device_; }
  // The most workers that a launch may have: what partials are made for.
  int most_workers() const { return 2 * device_.processors; }
  // Shared memory that leaves room for two workers per SM, with the phase's own.
  int shared_budget() const;
  // Of a phase; a chain gets its places there.
  int shared(Phase& phase) const { return launcher_->shared_bytes(type_, &phase); }

  // A float32 zero that kernels may read.
  const void* zero();
  // `count` counters at zero, which whoever uses them leaves at zero.
  int32_t* tickets(int64_t count);
  // Memory for `count` values, held.
  template <class V>
  V* scratch(int64_t count) {
    return static_cast<V*>(allocate(count * static_cast<int64_t>(sizeof(V))));
  }
  // The tensor lives until the phases added so far, and the one that will be added next, have been launched; then its
  // memory is free for what follows on the stream. Whoever adds a phase holds what it reads and writes, after any
  // launch that comes before it.
  at::Tensor hold(at::Tensor t) {
    held_.push_back(t);
    return t;
  }
  // The tensor lives as long as the plan: what is small, or read by several phases.
  at::Tensor keep(at::Tensor t) {
    kept_.push_back(t);
    return t;
  }

  // The next phase reads what an earlier one writes.
  void barrier() { barrier_ = true; }
  // Adds a phase, which phased mode launches at once; items: how many workers could share it.
  void add(Phase phase, int64_t items);
  // Launches what was added so far; then a library call may follow on the stream.
  void launch();

 private:
  at::Tensor workspace();
  void* allocate(int64_t bytes);
  void run();

  const Launcher* launcher_;
  Device device_;
  int index_;
  Scalar type_;
  Launch mode_;
  void* stream_ = nullptr;
  at::Tensor workspace_, like_;
  int64_t used_ = 0;
  bool barrier_ = false;
  std::vector<Phase> phases_;
  std::vector<int64_t> items_;
  std::vector<at::Tensor> held_, kept_;
};

}  // namespace resnet_fused::cuda
