#include "plan.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

namespace resnet_fused::cuda {
namespace {

constexpr int64_t kCounters = 1 << 16;
constexpr size_t kStreams = 64;  // workspaces remembered, 256 KiB each
constexpr int64_t kHeader = 32;  // the barrier's counter and a zero, each in a cache line of its own

void check(const char* error) { TORCH_CHECK(error == nullptr, "resnet_fused: ", error); }

void* stream_of(const at::Tensor& x) {
  if (x.device().is_cpu()) return nullptr;  // the tests' emulated device
  const c10::impl::VirtualGuardImpl guard(x.device().type());
  return guard.getStream(x.device()).native_handle();
}

std::atomic<const Launcher*> emulator{nullptr};

const Launcher* launcher_of(const at::Tensor& x) {
  if (x.device().is_cpu()) {
    const Launcher* launcher = emulator.load();
    TORCH_CHECK_NOT_IMPLEMENTED(
        launcher != nullptr, "resnet_fused's CUDA kernels run on CUDA tensors, x is on the CPU");
    return launcher;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      &gpu_launcher != nullptr, "resnet_fused was built without CUDA kernels, x is on ", x.device(),
      "; install it where nvcc is found, or use backend 'triton'");
  return &gpu_launcher();
}

Device describe(const Launcher& launcher, int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  if (&launcher == emulator.load()) {  // which changes from test to test
    Device device;
    check(launcher.describe_device(index, &device));
    return device;
  }
  const std::lock_guard lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) {
    Device device;
    check(launcher.describe_device(index, &device));
    TORCH_CHECK_NOT_IMPLEMENTED(
        device.arch >= 80, "resnet_fused's CUDA kernels need compute capability 8.0 or newer, device ", index, " has ",
        device.arch / 10, ".", device.arch % 10);
    found = known.emplace(index, device).first;
  }
  return found->second;
}

int resident_workers(const Launcher& launcher, int device, Scalar type, int shared) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Scalar, int>, int> known;
  int workers = 0;
  if (&launcher == emulator.load()) {
    check(launcher.resident_workers(device, type, shared, &workers));
    return workers;
  }
  const std::lock_guard lock(mutex);
  const auto found = known.find({device, type, shared});
  if (found != known.end()) return found->second;
  check(launcher.resident_workers(device, type, shared, &workers));
  return known[{device, type, shared}] = workers;
}

}  // namespace

void install_emulator(const Launcher* launcher) { emulator = launcher; }

Scalar scalar_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Scalar::f32;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::f16;
    case at::kDouble:
      return Scalar::f64;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating point tensor, got ", t.scalar_type());
  }
}

Plan::Plan(const at::Tensor& x, Launch mode)
    : launcher_(launcher_of(x)),
      index_(x.device().is_cpu() ? 0 : x.device().index()),
      type_(scalar_of(x)),
      mode_(mode),
      like_(x) {
  TORCH_CHECK_TYPE(
      type_ != Scalar::f64, "resnet_fused's CUDA kernels compute in float32, bfloat16 and float16, got ",
      x.scalar_type());
  stream_ = stream_of(x);
  device_ = describe(*launcher_, index_);
}

int Plan::shared_budget() const {
  return std::min(device_.shared_worker, device_.shared_processor / 2 - 1024);  // 1 KiB per worker is the system's
}

// One per stream, cleared once. A graph under capture gets its own: it may run beside the stream it was captured on.
at::Tensor Plan::workspace() {
  const auto fresh = [&] { return at::zeros({kHeader * 2 + kCounters}, like_.options().dtype(at::kInt)); };
  bool capturing = false;
  check(launcher_->is_capturing(stream_, &capturing));
  if (capturing) return fresh();
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int, void*>, at::Tensor>;  // not freed at exit, when CUDA is gone
  const std::lock_guard lock(mutex);
  // Plans at work hold theirs, and what is freed here is reused on its own stream.
  if (known.size() >= kStreams && !known.contains({index_, stream_})) known.clear();
  auto& found = known[{index_, stream_}];
  if (!found.defined()) found = fresh();
  return found;
}

const void* Plan::zero() {
  if (!workspace_.defined()) workspace_ = workspace();
  return workspace_.const_data_ptr<int32_t>() + kHeader;
}

int32_t* Plan::tickets(int64_t count) {
  if (!workspace_.defined()) workspace_ = workspace();
  if (used_ + count > kCounters) return hold(at::zeros({count}, workspace_.options())).mutable_data_ptr<int32_t>();
  used_ += count;
  return workspace_.mutable_data_ptr<int32_t>() + 2 * kHeader + used_ - count;
}

void* Plan::allocate(int64_t bytes) {
  return hold(at::empty({bytes}, like_.options().dtype(at::kByte), at::MemoryFormat::Contiguous)).mutable_data_ptr();
}

void Plan::add(Phase phase, int64_t items) {
  phase.barrier = barrier_ && !phases_.empty();
  barrier_ = false;
  if (phases_.size() == static_cast<size_t>(Program::kMost)) {
    run();
    phase.barrier = false;
  }
  phases_.push_back(phase);
  items_.push_back(items);
  if (mode_ == Launch::phased) launch();
}

void Plan::launch() {
  run();
  held_.clear();
}

void Plan::run() {
  barrier_ = false;  // the end of a launch is one
  if (phases_.empty()) return;
  Program program;
  program.count = static_cast<int>(phases_.size());
  int shared = 0;
  for (int i = 0; i < program.count; ++i) {
    shared = std::max(shared, launcher_->shared_bytes(type_, &phases_[i]));
    program.phases[i] = phases_[i];
  }
  TORCH_CHECK(
      shared <= device_.shared_worker, "resnet_fused: a phase needs ", shared, " bytes of shared memory, device ",
      index_, " has ", device_.shared_worker);
  const int resident = resident_workers(*launcher_, index_, type_, shared);
  const int64_t items = *std::max_element(items_.begin(), items_.end());
  const auto workers = static_cast<int>(std::min<int64_t>({resident, most_workers(), std::max<int64_t>(items, 1)}));
  TORCH_CHECK(workers > 0, "resnet_fused: no worker with ", shared, " bytes of shared memory fits device ", index_);
  bool cooperative = false;
  for (const Phase& phase : phases_) cooperative = cooperative || phase.barrier;
  if (cooperative) {
    if (!workspace_.defined()) workspace_ = workspace();
    program.barrier = workspace_.mutable_data_ptr<int32_t>();
  }
  phases_.clear();
  items_.clear();
  check(launcher_->launch(index_, type_, &program, workers, shared, cooperative, stream_));
}

}  // namespace resnet_fused::cuda
