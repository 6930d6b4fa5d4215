// The products of gradient_products.h by vectors: tiles of the transposed operand's channels times a panel of the
// other's, as those of a convolution are of positions times outputs. Included once per instruction set.

#include "vector_tile_impl.h"

#include "gradient_pack_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::GradientTask;
using engine::kBlock;
using engine::TapRun;

// A panel's 32 channels in three tiles: 22 accumulators are enough to hide a product's latency, and 14 of the channels
// at a time would leave a tile of four.
constexpr int kTiles = 3;

static void multiply(const GradientTask& task) {
  for (int64_t p = 0; p < task.pair_count; ++p) {
    const bf16* a = task.transposed + task.pairs[p].transposed * kPanel * task.pitch;
    const bf16* b = task.interleaved + task.pairs[p].interleaved * task.interleaved_panel;
    for (int64_t t = 0; t < task.taps; ++t) {
      const TapRun& tap = task.runs[t];
      float* sums = task.sums + (p * task.taps + t) * kBlock;
      if (tap.steps <= 0) {
        if (!task.adds) __builtin_memset(sums, 0, kBlock * sizeof(float));
        continue;
      }
      const Run<bf16> run{a + tap.transposed, task.pitch, b + tap.interleaved * kPanel, tap.steps * kPositions};
      for (int i = 0; i < kTiles; ++i) {
        const int first = i * kPanel / kTiles, end = (i + 1) * kPanel / kTiles;
        const auto multiply_rows = kMultiplyTile<bf16, Unfinished, Halves::together>[end - first];
        const Tile tile{0, task.adds, sums + first * kPanel};
        multiply_rows(&run, &run + 1, first, tile, reinterpret_cast<const char*>(run.weights), 0);
      }
    }
  }
}

// Steps: 4 of them took 6 to 10 % longer, since part of the last is empty; 28 as long (Zen 4).
const engine::GradientKernels& gradient_kernels() {
  static constexpr engine::GradientKernels table{7,         14,           &transpose,   &interleave,
                                                 &multiply, &store<bf16>, &store<float>};
  return table;
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
