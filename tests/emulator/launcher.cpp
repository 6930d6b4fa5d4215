// A launcher (csrc/cuda/launch.h) that runs the kernels of csrc/cuda on this machine's CPU, thread by thread. ctypes
// loads it, `install_emulator` of resnet_fused._C takes it.
#include "launch.h"

#include <cstring>
#include <exception>
#include <string>

#include "kernels/run_phases.cuh"

namespace resnet_fused::cuda {
namespace {

// What the tests set: the device that planning sees, how many workers run, and in which order their threads do.
struct Setting {
  Device device{80, 1, 99 << 10, 164 << 10};
  int workers = 3;
  uint64_t seed = 0;
  int launches = 0;
  int cooperative = 0;
} setting;

const char* describe(int, Device* device) {
  *device = setting.device;
  return nullptr;
}

int shared(Scalar type, Phase* phase) {
  switch (type) {
    case Scalar::f32:
      return shared_bytes<float>(*phase);
    case Scalar::bf16:
      return shared_bytes<bf16>(*phase);
    default:
      return shared_bytes<f16>(*phase);
  }
}

const char* workers(int, Scalar, int, int* count) {
  *count = setting.workers;
  return nullptr;
}

template <class T>
void body(const void* program) {
  run_phases<T>(*static_cast<const Program*>(program));
}

const char* launch(int, Scalar type, const Program* program, int workers, int shared, bool cooperative, void*) {
  static std::string error;
  ++setting.launches;
  setting.cooperative += cooperative;
  try {
    emulator::run(
        workers, kThreads, static_cast<size_t>(shared), setting.seed++,
        type == Scalar::f32    ? body<float>
        : type == Scalar::bf16 ? body<bf16>
                               : body<f16>,
        program);
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
  return nullptr;
}

const char* capturing(void*, bool* answer) {
  *answer = false;
  return nullptr;
}

}  // namespace
}  // namespace resnet_fused::cuda

extern "C" {

__attribute__((visibility("default"))) const void* launcher() {
  using namespace resnet_fused::cuda;
  static constexpr Launcher all{describe, shared, workers, launch, capturing};
  return &all;
}

// processors: SMs that planning sees; more of them mean smaller tiles and more splits.
__attribute__((visibility("default"))) void configure(int processors, int workers, uint64_t seed) {
  auto& setting = resnet_fused::cuda::setting;
  setting.device.processors = processors;
  setting.workers = workers;
  setting.seed = seed;
  setting.launches = setting.cooperative = 0;
}

__attribute__((visibility("default"))) int launches() { return resnet_fused::cuda::setting.launches; }
__attribute__((visibility("default"))) int cooperative_launches() { return resnet_fused::cuda::setting.cooperative; }
}
