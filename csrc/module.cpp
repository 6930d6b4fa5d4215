// The Python module resnet_fused._C: importing it registers the operators; it tells what it was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/kernels/row_kernels.h"
#include "cuda/plan.h"

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info{
      {"version", RESNET_FUSED_VERSION},
      {"compiler", __VERSION__},
      {"c++", std::to_string(__cplusplus / 100 % 100)},
      {"torch", TORCH_VERSION},
      {"instruction set", resnet_fused::cpu::row_kernel_isa()},
      {"openmp",
#ifdef _OPENMP
       std::to_string(_OPENMP)
#else
       "no"
#endif
      },
      {"cuda", "no"},
  };
  if (&resnet_fused::cuda::cuda_version != nullptr) {
    info["cuda"] = resnet_fused::cuda::cuda_version();
    info["cuda architectures"] = resnet_fused::cuda::architectures();
  }
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of resnet_fused; see resnet_fused.operators.";
  m.def("build_info", &build_info, "What this extension was built with and the instruction set it picked.");
  m.def(
      "install_emulator",
      [](uintptr_t launcher) {
        resnet_fused::cuda::install_emulator(reinterpret_cast<const resnet_fused::cuda::Launcher*>(launcher));
      },
      "Address of a csrc/cuda/launch.h Launcher that runs CUDA kernels on CPU tensors, for tests; 0 removes it.");
}
