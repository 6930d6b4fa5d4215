// The tile operations of AMX; included in namespace KERNELS_ISA of files of kernels, after the target pragma.
//
// In assembly, because GCC 12's intrinsics tell the compiler too little of what they read. What a load reads was
// written before the function was called that loads; only stores write memory that the same function reads.

namespace resnet_fused::cpu::KERNELS_ISA {

struct Tiles {
  static inline void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } all_full;
    asm volatile("ldtilecfg %0" ::"m"(all_full) : "memory");
  }
  static inline void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int t>
  static inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static inline void load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(row_bytes));
  }
  template <int t>  // not to be kept in the first cache
  static inline void load_once(const void* p, int64_t row_bytes) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(row_bytes));
  }
  template <int sum, int a, int b>
  static inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
  }
  template <int t>
  static inline void store(void* p, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(row_bytes) : "memory");
  }
};

}  // namespace resnet_fused::cpu::KERNELS_ISA
