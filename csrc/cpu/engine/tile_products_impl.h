// Products by tiles (AMX): 32 positions times a panel in four accumulators, one tile loaded for each product.
// Included once per body of the tile operations, after epilogue_impl.h; Tiles holds these operations.
//
// A unit of its own multiplies tiles, and it would wait while the vector units finish what it made. So sums leave the
// tiles between the first products of the next ones, and their epilogue runs between the products that follow.

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Factor;
using engine::Rows;
using engine::Task;

// A tile of sums that waits for its epilogue.
struct Pending {
  const Rows* rows[2];
  int64_t channel;
  int next, count;  // of its 32 rows
  const float* sums;
};

template <class Finish>
static inline void finish_some(Pending& pending, const Epilogue<bf16>& e, int rows) {
  const int end = pending.next + rows < pending.count ? pending.next + rows : pending.count;
  while (pending.next < end) {
    const Rows& r = *pending.rows[pending.next >> 4];
    const int half = pending.next & 16, stop = end < half + 16 ? end : half + 16;
    const int from = pending.next - half > r.begin ? pending.next - half : r.begin;
    const int to = stop - half < r.end ? stop - half : r.end;
    finish_rows<Finish>(pending.sums + half * kPanel, e, pending.channel, e.target + r.first, from, to);
    pending.next = stop;
  }
}

// Fetches the input of the next two tiles while their predecessors are multiplied: rows that a tile reads are too far
// apart for the processor to see what comes next.
struct Prefetch {
  const char *next, *end;
  int64_t lines;  // at a time

  void start(const Factor<bf16>& f, const Rows* rows, int64_t tiles, int64_t steps) {
    next = reinterpret_cast<const char*>(f.input + rows->first * f.pitch);
    end = next + tiles * 16 * f.pitch * 2;
    lines = ((end - next) / 64 + steps - 1) / steps;
  }
  inline void some() {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(next + 64 * i);
    next += 64 * lines;
  }
};

template <class Finish>
static void multiply_tiles(const Task<bf16>& task) {
  const Epilogue<bf16> e = task.epilogue;  // a copy, which assembly cannot change
  // not 4 KiB apart, where a load of the one would wait for stores to the other
  alignas(64) float sums[2][32 * kPanel + 512];
  alignas(64) unsigned char unused[1024];
  int64_t products = 0;
  for (const auto& f : task.factors) products += f.tap_count * f.depth / 32;
  // half a tile at a time: each start costs as much as a row
  const int rows_at_once = products == 1 ? 32 : 16;
  const int64_t interval = products < 2 ? 1 : products / 2;
  Pending pending{{}, 0, 0, 0, sums[0]};
  int current = 0;
  Prefetch prefetch{nullptr, nullptr, 0};

  const auto tile = [&](const Rows* rows, const Rows* second, int64_t panel) {
    float* out = sums[current];  // of the tile before
    bool first = true;
    int64_t until = 1;
    int since_store = 0;
    for (const Factor<bf16>& f : task.factors) {
      const int64_t taps = f.tap_count, depth = f.depth, pitch = f.pitch, row_bytes = 2 * f.pitch;
      const bf16* w = f.weights + panel * taps * depth * kPanel;
      const int64_t channel = f.first_channel ? f.first_channel[panel] : 0;
      const bf16* upper = f.input + rows->first * pitch + channel;
      const bf16* lower = f.input + second->first * pitch + channel;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t shift = f.taps[tap];
        for (int64_t k = 0; k < depth; k += 32, w += 1024) {
          Tiles::template load_once<6>(w, 64);
          Tiles::template load<4>(upper + shift + k, row_bytes);
          if (first) {
            Tiles::template store<0>(out, 4 * kPanel);
            Tiles::template zero<0>();
            Tiles::template multiply<0, 4, 6>();
            Tiles::template load_once<7>(w + 512, 64);
            Tiles::template store<1>(out + 16, 4 * kPanel);
            Tiles::template zero<1>();
            Tiles::template multiply<1, 4, 7>();
            Tiles::template load<5>(lower + shift + k, row_bytes);
            Tiles::template store<2>(out + 16 * kPanel, 4 * kPanel);
            Tiles::template zero<2>();
            Tiles::template multiply<2, 5, 6>();
            Tiles::template store<3>(out + 16 * kPanel + 16, 4 * kPanel);
            Tiles::template zero<3>();
            Tiles::template multiply<3, 5, 7>();
            first = false;
          } else {
            Tiles::template multiply<0, 4, 6>();
            Tiles::template load_once<7>(w + 512, 64);
            Tiles::template multiply<1, 4, 7>();
            Tiles::template load<5>(lower + shift + k, row_bytes);
            Tiles::template multiply<2, 5, 6>();
            Tiles::template multiply<3, 5, 7>();
          }
          if (--until == 0) {
            if (pending.next < pending.count) finish_some<Finish>(pending, e, rows_at_once);
            until = interval;
          }
          if (prefetch.next < prefetch.end) prefetch.some();
          // after about 2,000 cycles without a store the next one takes about 900 cycles more
          if (++since_store % 16 == 0) Tiles::template store<4>(unused, 64);
        }
      }
    }
    if (pending.next < pending.count) finish_some<Finish>(pending, e, 32);
    current ^= 1;
    pending = {{rows, second}, panel * kPanel, 0, second == rows ? 16 : 32, sums[current]};
  };
  const auto pair = [&](int64_t row, int64_t panel) {
    const Rows* rows = task.rows + row;
    tile(rows, row + 1 < task.row_count ? rows + 1 : rows, panel);
  };

  if (task.panels_inner) {
    for (int64_t row = 0; row < task.row_count; row += 2) {
      if (task.prefetches && row + 3 < task.row_count)
        prefetch.start(task.factors[0], task.rows + row + 2, 2, products * (task.panel_end - task.panel_begin));
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) pair(row, panel);
    }
  } else {
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
      for (int64_t row = 0; row < task.row_count; row += 2) pair(row, panel);
  }
  float* out = sums[current];
  Tiles::template store<0>(out, 4 * kPanel);
  Tiles::template store<1>(out + 16, 4 * kPanel);
  Tiles::template store<2>(out + 16 * kPanel, 4 * kPanel);
  Tiles::template store<3>(out + 16 * kPanel + 16, 4 * kPanel);
  finish_some<Finish>(pending, e, 32);
}

static void multiply_by_tiles(const Task<bf16>& task) {
  Tiles::configure();
  with_finish(task.epilogue, [&](auto finish) { multiply_tiles<decltype(finish)>(task); });
  Tiles::release();
}

const engine::Products<bf16>& products(bf16) {
  static constexpr engine::Products<bf16> table{16, true, &multiply_by_tiles};
  return table;
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
