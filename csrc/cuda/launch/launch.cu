#include "launch.h"

#include <cuda_runtime_api.h>

#include <string>

#include "kernel.h"

namespace resnet_fused::cuda {
namespace {

// The text of this thread's error; it lives until the thread's next one.
const char* explain(const std::string& what, cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  static thread_local std::string text;
  text = what + ": " + cudaGetErrorString(status);
  cudaGetLastError();  // leaves no error behind for the next call that looks
  return text.c_str();
}

// `device` is the current one for as long as this lives.
class Current {
 public:
  explicit Current(int device) {
    status = cudaGetDevice(&before_);
    if (status == cudaSuccess && before_ != device) status = cudaSetDevice(device);
  }
  ~Current() { cudaSetDevice(before_); }
  cudaError_t status;

 private:
  int before_ = 0;
};

Kernel kernel(Scalar type) {
  return type == Scalar::f32 ? kernel_f32() : type == Scalar::bf16 ? kernel_bf16() : kernel_f16();
}

std::string phases(const Program& program) {
  static constexpr const char* names[] = {"convolution", "weight gradient", "pass", "table", "chain"};
  std::string list;
  for (int i = 0; i < program.count; ++i)
    list += std::string(i == 0 ? "" : ", ") + names[static_cast<int>(program.phases[i].kind)];
  return list;
}

const char* describe_device(int index, Device* device) {
  const std::string what = "properties of CUDA device " + std::to_string(index);
  int major = 0, minor = 0;
  const auto read = [&](int* to, cudaDeviceAttr attribute) { return cudaDeviceGetAttribute(to, attribute, index); };
  for (const cudaError_t status :
       {read(&major, cudaDevAttrComputeCapabilityMajor), read(&minor, cudaDevAttrComputeCapabilityMinor),
        read(&device->processors, cudaDevAttrMultiProcessorCount),
        read(&device->shared_worker, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        read(&device->shared_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor)})
    if (status != cudaSuccess) return explain(what, status);
  device->arch = 10 * major + minor;
  return nullptr;
}

int shared_bytes(Scalar type, Phase* phase) { return kernel(type).shared_bytes(*phase); }

const char* resident_workers(int device, Scalar type, int shared, int* workers) {
  const Kernel k = kernel(type);
  const Current current(device);
  if (current.status != cudaSuccess) return explain(k.name, current.status);
  // The most that a worker may have, set once and for all: another thread's launch may need more than this one.
  int most = 0, each = 0, processors = 0;
  cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(k.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, k.entry, kThreads, shared);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *workers = each * processors;
  return explain(std::string(k.name) + " with " + std::to_string(shared) + " bytes of shared memory", status);
}

const char* launch(
    int device, Scalar type, const Program* program, int workers, int shared, bool cooperative, void* stream) {
  const Kernel k = kernel(type);
  const Current current(device);
  if (current.status != cudaSuccess) return explain(k.name, current.status);
  void* arguments[] = {const_cast<Program*>(program)};
  const dim3 grid(static_cast<unsigned>(workers)), block(kThreads);
  const auto bytes = static_cast<size_t>(shared);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cooperative ? cudaLaunchCooperativeKernel(k.entry, grid, block, arguments, bytes, on)
                                         : cudaLaunchKernel(k.entry, grid, block, arguments, bytes, on);
  return explain(
      std::string(k.name) + " (" + phases(*program) + ") on " + std::to_string(workers) + " workers with " +
          std::to_string(shared) + " bytes of shared memory",
      status);
}

const char* is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const cudaError_t status = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &found);
  *capturing = found != cudaStreamCaptureStatusNone;
  return explain("the state of the stream", status);
}

}  // namespace

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
const char* cuda_version() { return TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__); }
const char* architectures() { return RESNET_FUSED_ARCHITECTURES; }

const Launcher& gpu_launcher() {
  static constexpr Launcher launcher{describe_device, shared_bytes, resident_workers, launch, is_capturing};
  return launcher;
}

}  // namespace resnet_fused::cuda
