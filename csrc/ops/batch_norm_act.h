// What the kernels of act(batch_norm(x) + residual) share on every device: the arguments and the checks of these.
//
// Each check throws ValueError (shapes, counts, devices) or TypeError (dtypes). What passes can be read within bounds:
// x, residual and dout are [N, C, H, W] of one dtype with any strides. mean, var, weight and bias are [C] of x's dtype
// or of `statistics_type`, and need not be contiguous; nor need a mask, which kernels get contiguous. All are on x's
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace resnet_fused {

struct BatchNorm {
  at::Tensor mean, var;
  std::optional<at::Tensor> weight, bias;
  double eps;
};

// What batch statistics are kept in: float64 for float64, else float32.
at::ScalarType statistics_type(const at::Tensor& x);

// [N * H * W, ceil(C / 8)]: a row of bytes per pixel. Bit c % 8 of byte c / 8 is set where the activation passes
// channel c's gradient, which is where its output is not <= 0: NaN passes. Bits beyond C are 0.
std::vector<int64_t> mask_sizes(const at::Tensor& x);

void check_batch_statistics(const at::Tensor& x);

void check_normalize_act(
    const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double eps, bool relu,
    bool save_mask);

void check_normalize_act_backward_reduce(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean);

void check_normalize_act_backward_apply(
    const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean,
    const at::Tensor& var, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& sums, double count,
    double eps);

// --- the operators, over the kernels of one device; overload: "" or ".name" ------------------------------------------

inline void define_batch_norm_act(torch::Library& m, const std::string& overload) {
  m.def(("batch_statistics" + overload + "(Tensor x) -> Tensor").c_str());
  m.def(("normalize_act" + overload +
         "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, "
         "bool save_mask) -> (Tensor out, Tensor mask)")
            .c_str());
  m.def(("normalize_act_backward_reduce" + overload + "(Tensor dout, Tensor? mask, Tensor x, Tensor mean) -> Tensor")
            .c_str());
  m.def(("normalize_act_backward_apply" + overload +
         "(Tensor dout, Tensor? mask, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? sums, float count, "
         "float eps, bool save_dz) -> (Tensor dx, Tensor dz)")
            .c_str());
}

// Kernels: a type with the static functions of cpu/batch_norm_act.h.
template <class Kernels>
struct BatchNormAct {
  static at::Tensor batch_statistics(const at::Tensor& x) {
    check_batch_statistics(x);
    return Kernels::batch_statistics(x);
  }
  static std::tuple<at::Tensor, at::Tensor> normalize_act(
      const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, const std::optional<at::Tensor>& weight,
      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, double eps, bool relu,
      bool save_mask) {
    check_normalize_act(x, mean, var, weight, bias, residual, eps, relu, save_mask);
    return Kernels::normalize_act(x, {mean, var, weight, bias, eps}, residual, relu, save_mask);
  }
  static at::Tensor backward_reduce(
      const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean) {
    check_normalize_act_backward_reduce(dout, mask, x, mean);
    return Kernels::normalize_act_backward_reduce(dout, contiguous(mask), x, mean);
  }
  static std::tuple<at::Tensor, at::Tensor> backward_apply(
      const at::Tensor& dout, const std::optional<at::Tensor>& mask, const at::Tensor& x, const at::Tensor& mean,
      const at::Tensor& var, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& sums,
      double count, double eps, bool save_dz) {
    check_normalize_act_backward_apply(dout, mask, x, mean, var, weight, sums, count, eps);
    return Kernels::normalize_act_backward_apply(
        dout, contiguous(mask), x, {mean, var, weight, {}, eps}, sums, count, save_dz);
  }

 private:
  // A saved-tensor hook may change the layout of what it gives back.
  static std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& mask) {
    return mask ? std::optional(mask->contiguous()) : std::nullopt;
  }
};

template <class Kernels>
void implement_batch_norm_act(torch::Library& m, const std::string& overload) {
  using Operators = BatchNormAct<Kernels>;
  m.impl(("batch_statistics" + overload).c_str(), &Operators::batch_statistics);
  m.impl(("normalize_act" + overload).c_str(), &Operators::normalize_act);
  m.impl(("normalize_act_backward_reduce" + overload).c_str(), &Operators::backward_reduce);
  m.impl(("normalize_act_backward_apply" + overload).c_str(), &Operators::backward_apply);
}

}  // namespace resnet_fused
