// Products by tiles (AMX): 32 positions times a panel in four accumulators, each tile loaded once per product of two.
// Included once per body of the tile operations, after epilogue_impl.h; Tiles holds these operations.
//
// The epilogue of a tile runs between the products of the next one: tiles are multiplied by a unit of their own, which
// would wait while the vector units finish what it made.

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Factor;
using engine::Task;

// A tile whose sums wait for their epilogue.
struct Pending {
  const engine::Rows* rows[2];
  int64_t panel;
  int next, count;  // of its 32 rows
  const float* sums;
};

template <class Finish>
static inline void finish_some(Pending& pending, const Epilogue<bf16>& e, int rows) {
  const int end = pending.next + rows < pending.count ? pending.next + rows : pending.count;
  for (; pending.next < end; ++pending.next) {
    const int half = pending.next >> 4, row = pending.next & 15;
    const engine::Rows& r = *pending.rows[half];
    if (row < r.begin || row >= r.end) continue;
    const int64_t target = e.target[r.first + row];
    if (target >= 0) finish_row<Finish>(pending.sums + pending.next * kPanel, e, pending.panel * kPanel, target);
  }
}

template <class Finish>
static void multiply_tiles(const Task<bf16>& task) {
  const Epilogue<bf16>& e = task.epilogue;
  alignas(64) float sums[2][32 * kPanel];
  alignas(64) unsigned char unused[1024];
  int64_t products = 0;
  for (const auto& f : task.factors) products += f.tap_count * f.depth / 32;
  const int rows_at_once = static_cast<int>((31 + products) / products);
  Pending pending{{}, 0, 0, 0, nullptr};
  int current = 0;

  const auto tile = [&](const engine::Rows* rows, bool two, int64_t panel) {
    const engine::Rows* second = two ? rows + 1 : rows;
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
    int64_t since_store = 0;
    for (const Factor<bf16>& f : task.factors) {
      if (f.tap_count == 0) continue;
      const bf16* w = f.weights + panel * f.tap_count * f.depth * kPanel;
      const int64_t channel = f.first_channel ? f.first_channel[panel] : 0;
      const bf16* upper = f.input + rows->first * f.pitch + channel;
      const bf16* lower = f.input + second->first * f.pitch + channel;
      for (int64_t tap = 0; tap < f.tap_count; ++tap) {
        const bf16 *a0 = upper + f.taps[tap], *a1 = lower + f.taps[tap];
        for (int64_t k = 0; k < f.depth; k += 32, w += 1024) {
          Tiles::template load_once<6>(w, 64);
          Tiles::template load<4>(a0 + k, 2 * f.pitch);
          Tiles::template multiply<0, 4, 6>();
          Tiles::template load_once<7>(w + 512, 64);
          Tiles::template multiply<1, 4, 7>();
          Tiles::template load<5>(a1 + k, 2 * f.pitch);
          Tiles::template multiply<2, 5, 6>();
          Tiles::template multiply<3, 5, 7>();
          finish_some<Finish>(pending, e, rows_at_once);
          // without a store for about 2,000 cycles the next one takes about 900 more
          if (++since_store % 16 == 0) Tiles::template store<4>(unused, 64);
        }
      }
    }
    finish_some<Finish>(pending, e, 32);
    float* out = sums[current];
    Tiles::template store<0>(out, 4 * kPanel);
    Tiles::template store<1>(out + 16, 4 * kPanel);
    if (two) {
      Tiles::template store<2>(out + 16 * kPanel, 4 * kPanel);
      Tiles::template store<3>(out + 16 * kPanel + 16, 4 * kPanel);
    }
    pending = {{rows, second}, panel, 0, two ? 32 : 16, out};
    current ^= 1;
  };

  if (task.panels_inner) {
    for (int64_t r = 0; r < task.row_count; r += 2)
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
        tile(task.rows + r, r + 1 < task.row_count, panel);
  } else {
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
      for (int64_t r = 0; r < task.row_count; r += 2) tile(task.rows + r, r + 1 < task.row_count, panel);
  }
  finish_some<Finish>(pending, e, 32);
}

static void multiply_by_tiles(const Task<bf16>& task) {
  Tiles::configure();
  with_finish(task.epilogue, [&](auto finish) { multiply_tiles<decltype(finish)>(task); });
  Tiles::release();
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
