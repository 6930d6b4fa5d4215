#include "winograd_step.h"

#include <algorithm>
#include <atomic>

#include "../../block/integer_division.h"
#include "../share_out.h"

namespace resnet_fused::cpu::engine {

template <class Out>
bool multiply_patches(
    const Schedule& s, int64_t conv, const Step& step, const float* input, const Packed& u, unsigned char* scratch,
    const Epilogue<Out>& epilogue) {
  const Patches& patches = s.patches[conv];
  const Layout& l = s.layouts[conv];
  const auto& kernels = *products<float, Out>().winograd;
  const int64_t count = static_cast<int64_t>(step.patches.size()), chunks = ceil_div(count, patches.at_once);
  float* memory = reinterpret_cast<float*>(scratch + s.winograd_buffer);
  const auto task_of = [&](int64_t chunk, bool& wild) {
    const int64_t first = chunk * patches.at_once;
    WinogradTask<Out> task{};
    task.input = input;
    task.pitch = l.pitch;
    task.right = l.images * l.pitch;
    task.below = l.row * task.right;
    task.channels = l.depth;
    task.weights = reinterpret_cast<const float*>(u.memory.get());
    task.first = step.patches.data() + first;
    task.targets = step.patch_targets.data() + kOutputs * first;
    task.count = std::min(patches.at_once, count - first);
    task.panel_end = u.panels;
    task.transformed = memory + (s.splits_outputs ? chunk * patches.transformed() : 0);
    task.v_pitch = patches.pitch;
    task.v_plane = patches.plane();
    task.sums = memory + (s.splits_outputs ? chunks : 1) * patches.transformed();
    task.epilogue = epilogue;
    if (epilogue.not_finite) task.epilogue.not_finite = &wild;
    task.not_finite = &wild;
    return task;
  };
  if (!s.splits_outputs) {
    bool wild = false;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const auto task = task_of(chunk, wild);
      kernels.transform_patches(task, 0, task.count);
      kernels.multiply(task);
    }
    return !wild;
  }
  const int64_t threads = at::get_num_threads();
  for_each_job(chunks * threads, [&](int64_t i) {
    bool unused;
    const auto task = task_of(i / threads, unused);
    const int64_t t = i % threads;
    kernels.transform_patches(task, t * task.count / threads, (t + 1) * task.count / threads);
  });
  const int64_t shares = std::min(kShares * threads, u.panels);
  std::atomic<bool> finite{true};
  for_each_job(shares, [&](int64_t t) {
    bool wild = false;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      auto task = task_of(chunk, wild);
      task.sums += t * patches.sums();
      task.panel_begin = t * u.panels / shares;
      task.panel_end = (t + 1) * u.panels / shares;
      kernels.multiply(task);
    }
    if (wild) finite = false;
  });
  return finite;
}

#define INSTANTIATE(Out)               \
  template bool multiply_patches<Out>( \
      const Schedule&, int64_t, const Step&, const float*, const Packed&, unsigned char*, const Epilogue<Out>&);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(f16)
#undef INSTANTIATE

}  // namespace resnet_fused::cpu::engine
