#include "spec.h"

#include <c10/util/Exception.h>

namespace resnet_fused {

BlockSpec BlockSpec::decode(at::IntArrayRef ints, at::ArrayRef<double> floats) {
  constexpr int64_t header = 5, per_conv = 13;
  const int64_t size = static_cast<int64_t>(ints.size());
  TORCH_CHECK_VALUE(size > header && (size - header) % per_conv == 0, "a block spec has 5 + 13 k ints, got ", size);
  const int64_t count = (size - header) / per_conv;
  const int64_t stages = ints[0], skip = ints[1], order = ints[2], join = ints[3], how = ints[4];
  TORCH_CHECK_VALUE(
      skip >= 0 && skip <= 2 && stages >= 1 && stages + (skip == 2) == count, "a block spec of ", count,
      " convolutions cannot have ", stages, " stages and skip code ", skip);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(floats.size()) == 2 * count, "a block spec of ", count, " convolutions needs ", 2 * count,
      " floats, got ", floats.size());
  TORCH_CHECK_VALUE(
      order >= 0 && order <= 2 && join >= 0 && join <= 3 && how >= 0 && how <= 3, "a block spec has order code ", order,
      ", join code ", join, " and way code ", how);
  BlockSpec spec{
      {},
      stages,
      static_cast<Skip>(skip),
      static_cast<Order>(order),
      static_cast<JoinReads>(join),
      {static_cast<Launch>(how & 1), (how & 2) != 0}};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* s = ints.data() + header + i * per_conv;
    for (int64_t k = 0; k < 7; ++k) {
      const int64_t least = k == 2 || k == 3 ? 0 : 1;  // padding may be 0
      TORCH_CHECK_VALUE(s[k] >= least, "convolution ", i, " of a block spec has ", s[k], " at position ", k);
    }
    const int64_t statistics = s[7], act = s[8], input_stage = s[9], output_stage = s[10], flags = s[11], mode = s[12];
    TORCH_CHECK_VALUE(
        statistics >= 0 && statistics <= 2 && act >= 0 && act < kActivations && mode >= 0 && mode <= 3,
        "unknown norm, activation or padding mode code");
    // Whether a norm has as many channels as it reads is checked with the tensors.
    TORCH_CHECK_VALUE(
        input_stage >= kNone && input_stage < count && output_stage >= kNone && output_stage < count && flags >= 0 &&
            flags < 32,
        "convolution ", i, " of a block spec stands between the stages ", input_stage, " and ", output_stage);
    spec.convs.push_back(
        {{s[0], s[1]},
         {s[2], s[3]},
         {s[4], s[5]},
         s[6],
         static_cast<Statistics>(statistics),
         {static_cast<ActivationKind>(act), floats[2 * i + 1]},
         floats[2 * i],
         input_stage,
         output_stage,
         (flags & 1) != 0,
         (flags & 2) != 0,
         (flags & 4) != 0,
         (flags & 8) != 0,
         (flags & 16) != 0,
         static_cast<PaddingMode>(mode)});
  }
  return spec;
}

}  // namespace resnet_fused
