#include "spec.h"

#include <c10/util/Exception.h>

namespace resnet_fused {

BlockSpec BlockSpec::decode(at::IntArrayRef ints, at::ArrayRef<double> eps) {
  constexpr int64_t header = 5, per_conv = 9;
  const int64_t size = static_cast<int64_t>(ints.size());
  TORCH_CHECK_VALUE(size > header && (size - header) % per_conv == 0, "a block spec has 5 + 9 k ints, got ", size);
  const int64_t count = (size - header) / per_conv;
  const int64_t stages = ints[0], skip = ints[1];
  TORCH_CHECK_VALUE(
      skip >= 0 && skip <= 2 && stages >= 1 && stages + (skip == 2) == count, "a block spec of ", count,
      " convolutions cannot have ", stages, " stages and skip code ", skip);
  TORCH_CHECK_VALUE(
      eps.empty() || static_cast<int64_t>(eps.size()) == count, "a block spec of ", count,
      " convolutions needs as many eps, got ", eps.size());
  const int64_t how = ints[4], launch = how & 3, library = how >> 2 & 3;
  TORCH_CHECK_VALUE(how >= 0 && how < 32 && launch <= 2, "a block spec has ", how, " at position 4");
  BlockSpec spec{
      {},           stages,       static_cast<Skip>(skip),
      ints[2] != 0, ints[3] != 0, {static_cast<Launch>(launch), static_cast<Library>(library), (how & 16) != 0}};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* s = ints.data() + header + i * per_conv;
    for (int64_t k = 0; k < 7; ++k) {
      const int64_t least = k == 2 || k == 3 ? 0 : 1;  // padding may be 0
      TORCH_CHECK_VALUE(s[k] >= least, "convolution ", i, " of a block spec has ", s[k], " at position ", k);
    }
    TORCH_CHECK_VALUE(s[7] >= 0 && s[7] <= 2 && (s[8] == 0 || s[8] == 1), "unknown norm or activation code");
    spec.convs.push_back(
        {{s[0], s[1]},
         {s[2], s[3]},
         {s[4], s[5]},
         s[6],
         static_cast<Norm>(s[7]),
         s[8] == 1,
         eps.empty() ? 0.0 : eps[i]});
  }
  return spec;
}

}  // namespace resnet_fused
