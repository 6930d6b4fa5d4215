// The Python module resnet_fused._C: importing it registers the operators. It also reports what it was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../block/activations.h"
#include "../block/result_format.h"
#include "../cpu/convolution.h"
#include "../cpu/engine/prepared_block.h"
#include "../cpu/engine/training.h"
#include "../cpu/engine/weight_gradient.h"
#include "../cpu/isa.h"
#include "../cpu/running_stats.h"
#include "../cuda/plan/limits.h"
#include "../cuda/plan/plan.h"
#include "fingerprint.h"
#include "module_state.h"

namespace {

// A sequence of tensors; None stands for an undefined one.
std::vector<at::Tensor> tensors(const pybind11::sequence& sequence) {
  std::vector<at::Tensor> result;
  result.reserve(sequence.size());
  for (const auto item : sequence) {
    if (item.is_none()) {
      result.emplace_back();
      continue;
    }
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "expected a tensor, got ", Py_TYPE(item.ptr())->tp_name);
    result.push_back(THPVariable_Unpack(item.ptr()));
  }
  return result;
}

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info{
      {"version", RESNET_FUSED_VERSION},
      {"compiler", __VERSION__},
      {"c++", std::to_string(__cplusplus / 100 % 100)},
      {"torch", TORCH_VERSION},
      {"instruction set", resnet_fused::cpu::name(resnet_fused::cpu::isa())},
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

std::vector<std::string> activations() {
#define NAME(name) #name,
  return {RESNET_FUSED_ACTIVATIONS(NAME)};
#undef NAME
}

bool is_channels_last(
    const std::vector<int64_t>& block, const std::vector<bool>& processes, const std::vector<bool>& circular,
    const std::vector<bool>& weight_is_last, const std::vector<int64_t>& widths, const std::vector<bool>& one_pixel) {
  TORCH_CHECK_VALUE(
      block.size() == 3 && circular.size() == processes.size() && weight_is_last.size() >= processes.size() &&
          widths.size() == processes.size() && one_pixel.size() == processes.size(),
      "give one value for each stage of the chain");
  return resnet_fused::is_channels_last(
      block[0] != 0, block[1] != 0, block[2], processes, circular, weight_is_last, widths, one_pixel);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of resnet_fused; see resnet_fused.ops.operators.";
  m.def("build_info", &build_info, "What this extension was built with and the instruction set it picked.");
  m.attr("FEW_PIXELS") = resnet_fused::cpu::kFewPixels;
  m.def("activations", &activations, "The names in csrc/block/activations.h, in the order of their codes.");
  m.def(
      "is_channels_last", &is_channels_last, "See csrc/block/result_format.h; first: pre-activation, x is, channels.");
  m.def(
      "suggests_channels_last",
      [](const pybind11::handle& t) {
        TORCH_CHECK_TYPE(THPVariable_Check(t.ptr()), "expected a tensor, got ", Py_TYPE(t.ptr())->tp_name);
        const auto& tensor = THPVariable_Unpack(t.ptr());
        return tensor.layout() == at::kStrided && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
      },
      "ATen's suggest_memory_format.");
  m.def("too_large_for_cuda", &resnet_fused::cuda::too_large, "See csrc/cuda/plan/limits.h.");
  m.def("has_cuda_kernel", &resnet_fused::cuda::has_kernel, "See csrc/cuda/plan/limits.h.");
  m.def(
      "has_post_ops",
      [](const pybind11::handle& x) {
        TORCH_CHECK_TYPE(THPVariable_Check(x.ptr()), "expected a tensor, got ", Py_TYPE(x.ptr())->tp_name);
        return resnet_fused::cpu::has_post_ops(THPVariable_Unpack(x.ptr()));
      },
      "See csrc/cpu/convolution.h.");
  m.def(
      "widens",
      [](const pybind11::handle& dtype) {
        TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "expected a dtype, got ", Py_TYPE(dtype.ptr())->tp_name);
        return resnet_fused::cpu::widens(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type);
      },
      "See csrc/cpu/convolution.h.");
  for (const auto& [name, question] :
       {std::pair{"engine_reason_against", &resnet_fused::cpu::engine::reason_against},
        std::pair{"engine_faster_elsewhere", &resnet_fused::cpu::engine::faster_elsewhere}})
    m.def(
        name,
        [question](
            const std::vector<int64_t>& ints, const std::vector<double>& floats,
            const std::vector<std::vector<int64_t>>& weights, const pybind11::handle& dtype) {
          TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "expected a dtype, got ", Py_TYPE(dtype.ptr())->tp_name);
          const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
          return question(resnet_fused::BlockSpec::decode(ints, floats), weights, type);
        },
        "See csrc/cpu/engine/prepared_block.h.");
  m.def(
      "engine_reasons_against_training",
      [](const std::vector<int64_t>& ints, const std::vector<double>& floats, const pybind11::sequence& weights,
         const pybind11::handle& dtype) {
        namespace engine = resnet_fused::cpu::engine;
        TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "expected a dtype, got ", Py_TYPE(dtype.ptr())->tp_name);
        const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
        const auto spec = resnet_fused::BlockSpec::decode(ints, floats);
        const auto given = tensors(weights);
        TORCH_CHECK_VALUE(given.size() == spec.convs.size(), "give the weight of every convolution");
        std::vector<std::array<std::optional<std::string>, 3>> reasons;
        for (size_t i = 0; i < given.size(); ++i)
          reasons.push_back(
              {engine::reason_against_convolving(given[i], spec.convs[i], type),
               engine::reason_against_data_gradient(given[i], spec.convs[i], type),
               engine::reason_against_weight_gradient(given[i], spec.convs[i], type)});
        return reasons;
      },
      "Of each convolution: forward, data gradient, weight gradient; see csrc/cpu/engine/training.h.");
  m.def("unchanged", &resnet_fused::unchanged, "See csrc/python/module_state.h.");
  m.def(
      "fingerprint",
      [](const pybind11::sequence& of, int64_t reads) -> std::optional<uint64_t> {
        return resnet_fused::fingerprint(tensors(of), static_cast<resnet_fused::Reads>(reads));
      },
      "See csrc/python/fingerprint.h; no entry may be None.");
  m.def(
      "update_running_stats",
      [](const pybind11::sequence& means, const pybind11::sequence& vars, const pybind11::sequence& counters,
         const pybind11::sequence& batch_stats, const std::vector<double>& factors,
         const std::vector<int64_t>& counts) {
        return resnet_fused::cpu::update_running_stats(
            tensors(means), tensors(vars), tensors(counters), tensors(batch_stats), factors, counts);
      },
      "See csrc/cpu/running_stats.h.");
  m.def(
      "install_emulator",
      [](uintptr_t launcher) {
        resnet_fused::cuda::install_emulator(reinterpret_cast<const resnet_fused::cuda::Launcher*>(launcher));
      },
      "Address of a csrc/cuda/launch/launch.h Launcher that runs CUDA kernels on CPU tensors, for tests; 0 removes "
      "it.");
}
