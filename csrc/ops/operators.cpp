// The operators torch.ops.resnet_fused.*: schemas, and what they run on the CPU.
// resnet_fused/ops/operators.py documents the arguments and calls them.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../block/kernel_layout.h"
#include "../cpu/max_pool.h"
#include "../cpu/residual_block.h"
#include "operators.h"

namespace resnet_fused {
namespace {

struct CpuKernels {
  static constexpr auto residual_block_forward = &cpu::residual_block_forward;
  static constexpr auto residual_block_backward = &cpu::residual_block_backward;
  static constexpr auto residual_block_infer = &cpu::residual_block_infer;
};

cpu::PoolWindow window(int64_t kernel, int64_t stride, int64_t padding) {
  TORCH_CHECK_VALUE(
      kernel >= 1 && kernel <= 15 && stride >= 1 && padding >= 0 && 2 * padding <= kernel,
      "unsupported pooling window: kernel ", kernel, ", stride ", stride, ", padding ", padding);
  return {kernel, stride, padding};
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  const auto win = window(kernel, stride, padding);
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.numel() > 0 && std::min(x.size(2), x.size(3)) + 2 * padding >= kernel,
      "x must be [N, C, H, W] and hold a window, got ", x.sizes());
  return cpu::max_pool2d(x, win);
}

at::Tensor max_pool2d_backward(
    const at::Tensor& dout, const at::Tensor& positions, int64_t height, int64_t width, int64_t kernel, int64_t stride,
    int64_t padding) {
  const auto win = window(kernel, stride, padding);
  TORCH_CHECK_VALUE(
      dout.dim() == 4 && positions.sizes() == dout.sizes() && positions.scalar_type() == at::kByte,
      "positions must be as max_pool2d returned them for dout ", dout.sizes());
  for (int64_t d = 0; d < 2; ++d)
    TORCH_CHECK_VALUE(
        ((d ? width : height) + 2 * padding - kernel) / stride + 1 == dout.size(2 + d), "dout ", dout.sizes(),
        " is not the pooling of ", height, "x", width);
  return cpu::max_pool2d_backward(dout, positions.contiguous(kLayout), height, width, win);
}

}  // namespace

TORCH_LIBRARY(resnet_fused, m) {
  // The overload names the kernels: csrc's, or those that resnet_fused/backends/triton.py registers.
  for (const std::string overload : {"", ".triton"}) {
    m.def(("residual_block_forward" + overload + kForward).c_str());
    m.def(("residual_block_backward" + overload + kBackward).c_str());
    m.def(("residual_block_infer" + overload + kInfer).c_str());
  }
  m.def("max_pool2d(Tensor x, int kernel_size, int stride, int padding) -> (Tensor out, Tensor positions)");
  m.def(
      "max_pool2d_backward(Tensor dout, Tensor positions, int height, int width, int kernel_size, int stride, int "
      "padding) "
      "-> Tensor dx");
}

TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("residual_block_forward", &residual_block_forward<CpuKernels>);
  m.impl("residual_block_backward", &residual_block_backward<CpuKernels>);
  m.impl("residual_block_infer", &residual_block_infer<CpuKernels>);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
}

// Packed weights (resnet_fused/backends/folding.py) carry this key.
TORCH_LIBRARY_IMPL(resnet_fused, MkldnnCPU, m) { m.impl("residual_block_infer", &residual_block_infer<CpuKernels>); }

}  // namespace resnet_fused
