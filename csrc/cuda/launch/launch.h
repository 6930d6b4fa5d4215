// Launching programs on a device, without torch: raw pointers, a stream, an error text back (null: none).
//
// launch.cu implements it for a GPU; tests/emulator implements it for a CPU, on the same kernels.
#pragma once

#include "../kernels/phase.h"

namespace resnet_fused::cuda {

// What planning has to know of a device.
struct Device {
  int arch = 0;              // 80, 90, ...
  int processors = 0;        // SMs
  int shared_worker = 0;     // bytes of shared memory that one worker may have
  int shared_processor = 0;  // and that one SM has
};

struct Launcher {
  const char* (*describe_device)(int index, Device* device);

  // Dynamic shared memory of a phase for activations of `type`, in bytes; a chain gets its places within it.
  int (*shared_bytes)(Scalar type, Phase* phase);

  // How many workers with `shared` bytes run at once on the whole device; 0: none does. Called before a first launch.
  const char* (*resident_workers)(int device, Scalar type, int shared, int* workers);

  // Runs the program on `workers` workers; cooperative: all at once, as grid barriers need.
  const char* (*launch)(
      int device, Scalar type, const Program* program, int workers, int shared, bool cooperative, void* stream);

  // Whether the stream is being captured into a graph.
  const char* (*is_capturing)(void* stream, bool* capturing);
};

// Of launch.cu: null where the extension was built without it, so ask before calling.
#define WEAK __attribute__((weak))
WEAK const Launcher& gpu_launcher();
WEAK const char* cuda_version();   // "13.0"
WEAK const char* architectures();  // "80, 90 + PTX"
#undef WEAK

}  // namespace resnet_fused::cuda
