// The tile operations of AMX in plain C++; included as tiles_amx.h is, after elementwise_impl.h.

namespace resnet_fused::cpu::KERNELS_ISA {

struct Tiles {
  struct Tile {
    alignas(64) unsigned char row[16][64];
  };
  static inline thread_local Tile tiles[8];

  static void configure() { __builtin_memset(tiles, 0, sizeof(tiles)); }
  static void release() { __builtin_memset(tiles, 0xff, sizeof(tiles)); }
  template <int t>
  static void zero() {
    __builtin_memset(&tiles[t], 0, sizeof(Tile));
  }
  template <int t>
  static void load(const void* p, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r)
      __builtin_memcpy(tiles[t].row[r], static_cast<const unsigned char*>(p) + r * row_bytes, 64);
  }
  template <int t>
  static void load_once(const void* p, int64_t row_bytes) {
    load<t>(p, row_bytes);
  }
  // In the processor's order: the first and the second products of the pairs are summed apart, then both are added.
  template <int sum, int a, int b>
  static void multiply() {
    for (int m = 0; m < 16; ++m) {
      float total[16], first[16] = {}, second[16] = {};
      bf16 left[32], right[32];
      __builtin_memcpy(left, tiles[a].row[m], 64);
      for (int k = 0; k < 16; ++k) {
        __builtin_memcpy(right, tiles[b].row[k], 64);
        for (int n = 0; n < 16; ++n) {
          first[n] += KERNELS_ISA::load(left[2 * k]) * KERNELS_ISA::load(right[2 * n]);
          second[n] += KERNELS_ISA::load(left[2 * k + 1]) * KERNELS_ISA::load(right[2 * n + 1]);
        }
      }
      __builtin_memcpy(total, tiles[sum].row[m], 64);
      for (int n = 0; n < 16; ++n) total[n] += first[n] + second[n];
      __builtin_memcpy(tiles[sum].row[m], total, 64);
    }
  }
  template <int t>
  static void store(void* p, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<unsigned char*>(p) + r * row_bytes, tiles[t].row[r], 64);
  }
};

}  // namespace resnet_fused::cpu::KERNELS_ISA
