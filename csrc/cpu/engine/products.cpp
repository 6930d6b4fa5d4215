// Which instruction set's products run (isa.h).
#include "products.h"

#include "../isa.h"

namespace resnet_fused::cpu {

namespace baseline {
const engine::Products<float>& products(float);
const engine::Products<float, bf16>& products(float, bf16);
const engine::Products<float, f16>& products(float, f16);
const engine::Products<bf16>& products(bf16);
}  // namespace baseline
namespace amx_portable {
const engine::Products<bf16>& products(bf16);
}
#if defined(RESNET_FUSED_X86)
namespace avx2 {
const engine::Products<float>& products(float);
const engine::Products<float, bf16>& products(float, bf16);
const engine::Products<float, f16>& products(float, f16);
const engine::Products<bf16>& products(bf16);
}  // namespace avx2
namespace avx512 {
const engine::Products<float>& products(float);
const engine::Products<float, f16>& products(float, f16);
const engine::Products<bf16>& products(bf16);
}  // namespace avx512
namespace avx512_bf16 {
const engine::Products<bf16>& products(bf16);
}
namespace amx {
const engine::Products<bf16>& products(bf16);
}
#endif

namespace engine {

namespace {

// element: none, or that of the results
template <class... T>
const auto& products_of_floats(T... element) {
#if defined(RESNET_FUSED_X86)
  if (vector_isa() >= Isa::avx512) return avx512::products(float{}, element...);
  if (vector_isa() >= Isa::avx2) return avx2::products(float{}, element...);
#endif
  return baseline::products(float{}, element...);
}

}  // namespace

template <>
const Products<float>& products<float>() {
  return products_of_floats();
}

template <>
const Products<float, f16>& products<float, f16>() {
  return products_of_floats(f16{});
}

template <>
const Products<float, bf16>& products<float, bf16>() {
#if defined(RESNET_FUSED_X86)
  if (vector_isa() >= Isa::avx2) return avx2::products(float{}, bf16{});
#endif
  return baseline::products(float{}, bf16{});
}

// ResNet-50 at 224 x 224, AVX2 on Zen 3, 2 threads, of float32's time at batch 1 and 8: 1.4 and 1.9 as pairs, whose
// halves each product takes apart, and 1.01 widened. AVX-512 has not been measured.
bool widens_bfloat16() { return isa() <= Isa::avx2; }

template <>
const Products<bf16>& products<bf16>() {
  switch (isa()) {
    case Isa::amx_portable:
      return amx_portable::products(bf16{});
#if defined(RESNET_FUSED_X86)
    case Isa::amx:
      return amx::products(bf16{});
    case Isa::avx512_bf16:
      // ResNet-50, batch 16, Sapphire Rapids without AMX, torch.compile's time / ours: 1.11 as floats, 0.99 as pairs
      return has_slow_pairs() && !is_forced() ? avx512::products(bf16{}) : avx512_bf16::products(bf16{});
    case Isa::avx512:
      return avx512::products(bf16{});
    case Isa::avx2:
      return avx2::products(bf16{});
#endif
    default:
      return baseline::products(bf16{});
  }
}

}  // namespace engine
}  // namespace resnet_fused::cpu
