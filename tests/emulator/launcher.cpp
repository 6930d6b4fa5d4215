// A launcher (csrc/cuda/launch/launch.h) that runs the kernels of csrc/cuda on this machine's CPU, thread by thread.
// emulated.py compiles and drives it, `install_emulator` of resnet_fused._C takes it.
//
// With RESNET_FUSED_EMULATOR_TYPE=bf16 it is compiled for that type of activation alone, in a third of the time.
#include "launch/launch.h"

#include <exception>
#include <memory>
#include <string>

#include "kernels/run_phases.cuh"

namespace resnet_fused::cuda {
namespace {

// What the tests set: the device that planning sees, how many workers run, and in which order their threads do.
struct Setting {
  Device device{80, 1, 99 << 10, 164 << 10};
  int workers = 3;
  uint64_t seed = 0;
  bool capturing = false;
  int failing_launch = -1;
  std::string failure;
  int barrierless_launch = -1, barrierless_phase = -1;
  int launches = 0;
  std::string launched;  // a line per launch
} setting;

const char* describe(int, Device* device) {
  *device = setting.device;
  return nullptr;
}

using Body = void (*)(const void*);

template <class T>
void body(const void* program) {
  run_phases<T>(*static_cast<const Program*>(program));
}

// The kernel of a type and the shared memory of its phases.
struct Kernel {
  Body body = nullptr;
  int (*shared_bytes)(Phase&) = nullptr;
};
template <class T>
Kernel kernel_of() {
  return {body<T>, shared_bytes<T>};
}
Kernel kernel(Scalar type) {
#ifdef RESNET_FUSED_EMULATOR_TYPE
  return type == Scalar::RESNET_FUSED_EMULATOR_TYPE ? kernel_of<RESNET_FUSED_EMULATOR_TYPE>() : Kernel{};
#else
  return type == Scalar::f32 ? kernel_of<float>() : type == Scalar::bf16 ? kernel_of<bf16>() : kernel_of<f16>();
#endif
}

int shared(Scalar type, Phase* phase) {
  const Kernel found = kernel(type);
  return found.body == nullptr ? 0 : found.shared_bytes(*phase);
}

const char* workers(int, Scalar, int, int* count) {
  *count = setting.workers;
  return nullptr;
}

int blocks(int channels, int columns) { return (channels + columns - 1) / columns; }

// What a phase does and how it was planned, as in "weight gradient of 64 rows, 4 buffers, 3 splits".
std::string describe(const Phase& phase) {
  const auto product = [](const char* what, TileShape tile, int buffers) {
    return std::string(what) + (tile == TileShape::large ? " of 128 rows, " : " of 64 rows, ") +
           std::to_string(buffers) + " buffers";
  };
  const Convolution& convolution = phase.convolution;
  const WeightGradient& gradient = phase.weight_gradient;
  const Chain& chain = phase.chain;
  switch (phase.kind) {
    case Kind::convolution:
      return product(convolution.transposed ? "data gradient" : "convolution", convolution.tile, convolution.buffers);
    case Kind::weight_gradient:
      return product("weight gradient", gradient.tile, gradient.buffers) + ", " + std::to_string(gradient.splits) +
             " splits";
    case Kind::pointwise:
      return "pass";
    case Kind::table:
      return "table";
    case Kind::chain:
      return std::string(chain.projection.weight != nullptr ? "chain with projection, " : "chain, ") +
             std::to_string(chain.buffers) + " buffers";
  }
  return "unknown";
}

struct Tickets {
  int32_t* first = nullptr;
  int count = 0;
};
Tickets tickets(const Phase& phase) {
  switch (phase.kind) {
    case Kind::convolution: {
      const Convolution& c = phase.convolution;
      return {c.epilogue.reduction.tickets, blocks(c.product.result_channels, 64)};
    }
    case Kind::weight_gradient: {
      const WeightGradient& w = phase.weight_gradient;
      return {
          w.tickets, blocks(w.dy.channels, w.tile == TileShape::large ? 128 : 64) * w.geometry.kernel[0] *
                         w.geometry.kernel[1] * blocks(w.source.channels, 64)};
    }
    case Kind::pointwise: {
      const Pointwise& p = phase.pointwise;
      return {p.epilogue.reduction.tickets, blocks(p.source.channels, kPack << p.packs_log2)};
    }
    default:
      return {};
  }
}

// Whether a launch has left every counter as it has to; then, in any case, they are.
bool counters_are_free(const Program& program) {
  bool free = true;
  const auto check = [&](int32_t& counter) {
    free = free && counter == 0;
    counter = 0;
  };
  if (program.barrier != nullptr) {
    *program.barrier &= 0x7fffffff;  // every barrier flips the sign
    check(*program.barrier);
  }
  for (int i = 0; i < program.count; ++i) {
    const Tickets t = tickets(program.phases[i]);
    for (int k = 0; t.first != nullptr && k < t.count; ++k) check(t.first[k]);
  }
  return free;
}

const char* launch(
    int, Scalar type, const Program* program, int workers, int shared, bool cooperative, void* /*stream*/) {
  static std::string error;
  const int number = setting.launches++;
  if (number == setting.failing_launch) return setting.failure.c_str();
  const Kernel found = kernel(type);
  if (found.body == nullptr) return "the emulator was compiled for another type of activation";
  setting.launched += std::to_string(workers) + (cooperative ? " cooperative" : "") + ":";
  for (int i = 0; i < program->count; ++i)
    setting.launched += (i == 0 ? " " : program->phases[i].barrier ? " | " : "; ") + describe(program->phases[i]);
  setting.launched += "\n";
  const auto copy = std::make_unique<Program>(*program);
  if (number == setting.barrierless_launch) copy->phases[setting.barrierless_phase].barrier = false;
  try {
    emulator::run(workers, kThreads, static_cast<size_t>(shared), setting.seed++, found.body, copy.get());
  } catch (const std::exception& failure) {
    counters_are_free(*program);
    error = failure.what();
    return error.c_str();
  }
  return counters_are_free(*program) ? nullptr : "a launch has left a counter that is not zero";
}

const char* capturing(void* /*stream*/, bool* answer) {
  *answer = setting.capturing;
  return nullptr;
}

}  // namespace
}  // namespace resnet_fused::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))
using resnet_fused::cuda::setting;

EXPORT const void* launcher() {
  using namespace resnet_fused::cuda;
  static constexpr Launcher all{describe, shared, workers, launch, capturing};
  return &all;
}

// processors: SMs that planning sees; more of them mean smaller tiles and more splits. workers: how many of them run.
// Forgets what was launched before and any failure to come.
EXPORT void configure(int processors, int workers, uint64_t seed) {
  setting = {};
  setting.device.processors = processors;
  setting.workers = workers;
  setting.seed = seed;
}
EXPORT void set_shared_memory(int bytes) { setting.device.shared_worker = bytes; }
EXPORT void set_capturing(bool capturing) { setting.capturing = capturing; }

// Launches are counted from `configure` on: this one says `text` and runs nothing.
EXPORT void fail_at(int launch, const char* text) {
  setting.failing_launch = launch;
  setting.failure = text;
}
// This one runs without the barrier before one of its phases.
EXPORT void leave_out_barrier(int launch, int phase) {
  setting.barrierless_launch = launch;
  setting.barrierless_phase = phase;
}

// A line for each launch, as in "3 cooperative: table; pass | convolution of 64 rows, 4 buffers": | is a barrier.
EXPORT const char* launched() { return setting.launched.c_str(); }
