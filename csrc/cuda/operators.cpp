// What torch.ops.resnet_fused.* run on a GPU; their overload `cuda` also takes tensors on the CPU, for the tests'
// emulator.
#include "../ops/operators.h"

#include <torch/library.h>

#include "plan/residual_block.h"

namespace resnet_fused {

TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def((std::string("residual_block_forward.cuda") + kForward).c_str());
  m.def((std::string("residual_block_backward.cuda") + kBackward).c_str());
  m.def((std::string("residual_block_infer.cuda") + kInfer).c_str());
}

template <class Library>
void implement(Library& m, const std::string& overload) {
  m.impl(("residual_block_forward" + overload).c_str(), &residual_block_forward<cuda::Kernels>);
  m.impl(("residual_block_backward" + overload).c_str(), &residual_block_backward<cuda::Kernels>);
  m.impl(("residual_block_infer" + overload).c_str(), &residual_block_infer<cuda::Kernels>);
}

TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  implement(m, "");
  implement(m, ".cuda");
}
TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { implement(m, ".cuda"); }

}  // namespace resnet_fused
