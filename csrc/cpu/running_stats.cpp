#include "running_stats.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cmath>

namespace resnet_fused::cpu {
namespace {

bool plain(const at::Tensor& t, int64_t numel) {
  return t.defined() && t.device().is_cpu() && t.layout() == at::kStrided && t.is_contiguous() && t.numel() == numel &&
         !t.is_inference() && !t.key_set().has(c10::DispatchKey::Python);
}

// Whether running statistics of this type can be blended with a batch's of type `batch`.
bool narrower(at::ScalarType running, at::ScalarType batch) {
  return running == batch || running == at::kBFloat16 || running == at::kHalf;
}

// Like at::lerp_ exact at both ends; computed in the statistics' precision and rounded once.
template <class A>
void blend(const at::Tensor& running, const A* batch, A unbiased, A factor) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running.scalar_type(), "update_running_stats", [&] {
    auto* r = running.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < running.numel(); ++c) {
      const A before = static_cast<A>(r[c]), value = batch[c] * unbiased, difference = value - before;
      const A after = std::abs(factor) < A(0.5) ? before + factor * difference : value - difference * (A(1) - factor);
      r[c] = static_cast<scalar_t>(after);
    }
  });
  running.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

bool update_running_stats(
    const std::vector<at::Tensor>& means, const std::vector<at::Tensor>& vars, const std::vector<at::Tensor>& counters,
    const std::vector<at::Tensor>& batch_stats, const std::vector<double>& factors,
    const std::vector<int64_t>& counts) {
  const size_t norms = batch_stats.size();
  TORCH_CHECK_VALUE(
      means.size() == norms && vars.size() == norms && counters.size() == norms && factors.size() == norms &&
          counts.size() == norms,
      "every list needs one entry per norm, there are ", norms);
  const auto untracked = [&](size_t i) { return !means[i].defined() && !vars[i].defined() && !counters[i].defined(); };
  for (size_t i = 0; i < norms; ++i) {
    const auto& stats = batch_stats[i];
    const auto type = stats.scalar_type();
    if (untracked(i)) continue;
    if ((type != at::kFloat && type != at::kDouble) || stats.dim() != 2 || stats.size(0) != 2) return false;
    const int64_t channels = stats.size(1);
    if (!plain(stats, 2 * channels) || !plain(means[i], channels) || !plain(vars[i], channels)) return false;
    if (!narrower(means[i].scalar_type(), type) || !narrower(vars[i].scalar_type(), type)) return false;
    if (counters[i].defined() && (!plain(counters[i], 1) || counters[i].scalar_type() != at::kLong)) return false;
  }
  for (size_t i = 0; i < norms; ++i) {
    const auto& stats = batch_stats[i];
    if (untracked(i)) continue;
    const double count = static_cast<double>(counts[i]);
    AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "update_running_stats", [&] {
      const auto* batch = stats.const_data_ptr<scalar_t>();
      const auto factor = static_cast<scalar_t>(factors[i]);
      blend<scalar_t>(means[i], batch, scalar_t(1), factor);
      blend<scalar_t>(vars[i], batch + stats.size(1), static_cast<scalar_t>(count / (count - 1)), factor);
    });
    if (counters[i].defined()) {
      *counters[i].mutable_data_ptr<int64_t>() += 1;
      counters[i].unsafeGetTensorImpl()->bump_version();
    }
  }
  return true;
}

}  // namespace resnet_fused::cpu
