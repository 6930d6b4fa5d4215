// The products of gradient_products.h by tiles, included once per body of the tile operations, after tiles_*.h.

#include "gradient_pack_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::GradientTask;
using engine::kBlock;
using engine::TapRun;

template <int i>
struct Tile {
  static constexpr int index = i;
};

// As in tile_products_impl.h the sums of one tile leave between the first products of the next.
static void multiply(const GradientTask& task) {
  Tiles::configure();
  alignas(64) float unused[kBlock];
  alignas(64) unsigned char nothing[1024];
  constexpr int64_t row = 4 * kPanel;
  const int64_t pitch = task.pitch;
  float* before = unused;
  for (int64_t p = 0; p < task.pair_count; ++p) {
    const bf16* a_panel = task.transposed + task.pairs[p].transposed * kPanel * pitch;
    const bf16* b_panel = task.interleaved + task.pairs[p].interleaved * task.interleaved_panel;
    for (int64_t t = 0; t < task.taps; ++t) {
      const TapRun run = task.runs[t];
      float* sums = task.sums + (p * task.taps + t) * kBlock;
      if (run.steps <= 0) {
        if (!task.adds) __builtin_memset(sums, 0, kBlock * sizeof(float));
        continue;
      }
      const bf16* a = a_panel + run.transposed;
      const bf16* b = b_panel + run.interleaved * kPanel;
      for (int64_t s = 0; s < run.steps; ++s, a += kPositions, b += kPositions * kPanel) {
        Tiles::template load_once<6>(b, row);
        Tiles::template load<4>(a, 2 * pitch);
        if (s == 0) {
          const auto begin = [&](auto tile, int64_t at) {
            constexpr int k = decltype(tile)::index;
            Tiles::template store<k>(before + at, row);
            if (task.adds)
              Tiles::template load<k>(sums + at, row);
            else
              Tiles::template zero<k>();
          };
          begin(Tile<0>(), 0);
          Tiles::template multiply<0, 4, 6>();
          Tiles::template load_once<7>(b + kPanel, row);
          begin(Tile<1>(), 16);
          Tiles::template multiply<1, 4, 7>();
          Tiles::template load<5>(a + 16 * pitch, 2 * pitch);
          begin(Tile<2>(), 16 * kPanel);
          Tiles::template multiply<2, 5, 6>();
          begin(Tile<3>(), 16 * kPanel + 16);
          Tiles::template multiply<3, 5, 7>();
        } else {
          Tiles::template multiply<0, 4, 6>();
          Tiles::template load_once<7>(b + kPanel, row);
          Tiles::template multiply<1, 4, 7>();
          Tiles::template load<5>(a + 16 * pitch, 2 * pitch);
          Tiles::template multiply<2, 5, 6>();
          Tiles::template multiply<3, 5, 7>();
        }
        // after about 2,000 cycles without a store the next one takes about 900 cycles more
        if (s % 16 == 15) Tiles::template store<4>(nothing, 64);
      }
      before = sums;
    }
  }
  Tiles::template store<0>(before, row);
  Tiles::template store<1>(before + 16, row);
  Tiles::template store<2>(before + 16 * kPanel, row);
  Tiles::template store<3>(before + 16 * kPanel + 16, row);
  Tiles::release();
}

// Steps: both operands' panels stay in the first cache for all taps. Measured: 8 to 16 are equal. Of one tap, whose
// operands are read once, for sums that are written once: 14 took 1 to 10 % longer than 28.
const engine::GradientKernels& gradient_kernels() {
  static constexpr engine::GradientKernels table{14,        28,           &transpose,   &interleave,
                                                 &multiply, &store<bf16>, &store<float>};
  return table;
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
