// Weight gradients of random convolutions through layouts, packing and products, each buffer alone on the
// heap and exactly as large as its format says; compiled by `make sanitize` as sanitize.cpp is. Operands lie in memory
// or are made by the row kernels while they are packed. Torch-free; the tables are chosen here, not by isa.cpp.
#include "../../../csrc/cpu/x86.h"
#if defined(RESNET_FUSED_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../../csrc/cpu/engine/gradient_pack.h"

namespace resnet_fused::cpu {

namespace baseline {
const RowKernels<bf16>& kernels(bf16);
}
template <>
const RowKernels<bf16>& row_kernels<bf16>() {
  return baseline::kernels(bf16{});
}
namespace amx_portable {
const engine::GradientKernels& gradient_kernels();
}
#if defined(RESNET_FUSED_X86)
namespace amx {
const engine::GradientKernels& gradient_kernels();
}
namespace avx512_bf16 {
const engine::GradientKernels& gradient_kernels();
}
#endif

namespace engine {
namespace {

const GradientKernels* chosen = nullptr;
std::mt19937 generator(1);
int64_t any(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(generator); }

bf16 small(int64_t v) {  // exact, and so are sums of them
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A tensor [pixel][channel], alone on the heap.
struct Pixels {
  int64_t channels;
  std::unique_ptr<bf16[]> values;
  Pixels(int64_t pixels, int64_t given) : channels(given), values(new bf16[pixels * given]) {
    for (int64_t i = 0; i < pixels * given; ++i) values[i] = small(any(-2, 2));
  }
  float at(int64_t pixel, int64_t channel) const { return to_float(values[pixel * channels + channel]); }
};

void check(const char* isa) {
  Window window;
  Size input, output;
  do {
    for (int d = 0; d < 2; ++d) {
      window.kernel[d] = any(1, 4);
      window.stride[d] = any(1, 3);
      window.padding[d] = any(0, 3);
      window.dilation[d] = any(1, 2);
    }
    if (any(0, 3) == 0) window.kernel = {1, 1}, window.padding = {0, 0};
    input = {any(1, 12), any(1, 12)};
    output = window.output(input);
  } while (output.height < 1 || output.width < 1);
  const int64_t images = any(1, 6), in = any(0, 2) ? any(1, 70) : any(1, 8), out = any(1, 70);
  const bool folds = window.dilation[1] == 1 && window.kernel[1] > 1 && window.kernel[1] * in <= kPanel;
  const Pixels x(images * input.pixels(), in), gradient(images * output.pixels(), out);

  // p = max(x + 1, 0) and dy = 2 gradient, where they are made
  const bool makes_p = any(0, 1), makes_dy = any(0, 1);
  const std::vector<float> zeros(std::max(in, out), 0.0f), ones(in, 1.0f), twos(out, 2.0f);
  NormalizeArgs<bf16> normalize{};
  normalize.y = x.values.get();
  normalize.norm = {zeros.data(), ones.data(), ones.data()};
  normalize.act.act.kind = ActivationKind::relu;
  BackwardApplyArgs<bf16> apply{};
  apply.dz = gradient.values.get();
  apply.k_dz = twos.data();
  apply.k_y = apply.k = zeros.data();
  apply.norm = {zeros.data(), zeros.data(), zeros.data()};
  const Operand<bf16> p = makes_p ? Operand<bf16>(normalize, in) : Operand<bf16>(x.values.get(), in);
  const Operand<bf16> dy = makes_dy ? Operand<bf16>(apply, out) : Operand<bf16>(gradient.values.get(), out);

  const GradientLayout layout(window, input, output, images, folds);
  const int64_t depth = in * layout.fold().taps, taps = layout.taps();
  const auto panels = [](int64_t channels) { return (channels + kPanel - 1) / kPanel; };
  const bool transposes_gradient = any(0, 1);
  const int64_t transposed = transposes_gradient ? out : depth, interleaved = transposes_gradient ? depth : out;
  PackFormat format{transposes_gradient, panels(transposed) * kPanel, panels(interleaved) * kPanel};
  std::vector<Slab> parts;
  const int64_t together = any(1, layout.images()), rows = any(1, layout.rows());
  for (int64_t first = 0; first < layout.images(); first += together)
    for (int64_t begin = 0; begin < layout.rows(); begin += rows)
      parts.push_back({first, together, begin, std::min(begin + rows, layout.rows())});
  for (const Slab& part : parts) format.widen(layout, part);

  std::vector<PanelPair> pairs;
  for (int32_t t = 0; t < panels(transposed); ++t)
    for (int32_t i = 0; i < panels(interleaved); ++i) pairs.push_back({t, i});
  const int64_t pair_count = static_cast<int64_t>(pairs.size());
  const std::unique_ptr<float[]> sums(new float[pair_count * taps * kBlock]);
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::unique_ptr<bf16[]> packed(new bf16[format.elements()]);
    for (int64_t share = 0; share < 2; ++share) {
      pack(layout, parts[i], Side::gradient, dy, format, share, 2, packed.get());
      pack(layout, parts[i], Side::input, p, format, share, 2, packed.get());
    }
    const auto runs = layout.runs(parts[i], transposes_gradient);
    chosen->multiply(
        {packed.get(), packed.get() + format.interleaved(), format.pitch, format.panel(), runs.data(), taps,
         pairs.data(), pair_count, sums.get(), i > 0});
  }

  const int64_t count = out * taps * depth;
  const std::unique_ptr<float[]> dw(new float[count]);
  for (int64_t pair = 0; pair < pair_count; ++pair)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t o = kPanel * (transposes_gradient ? pairs[pair].transposed : pairs[pair].interleaved);
      const int64_t c = kPanel * (transposes_gradient ? pairs[pair].interleaved : pairs[pair].transposed);
      const float* block = sums.get() + (pair * taps + tap) * kBlock;
      chosen->store_float(
          {&block, 1, !transposes_gradient, 0, std::min(kPanel, out - o), 0, std::min(kPanel, depth - c), taps * depth},
          dw.get() + (o * taps + tap) * depth + c);
    }

  for (int64_t o = 0; o < out; ++o)
    for (int64_t r = 0; r < window.kernel[0]; ++r)
      for (int64_t s = 0; s < window.kernel[1]; ++s)
        for (int64_t c = 0; c < in; ++c) {
          float expected = 0;
          for (int64_t n = 0; n < images; ++n)
            for (int64_t pixel = 0; pixel < output.pixels(); ++pixel) {
              const int64_t y = pixel / output.width * window.stride[0] - window.padding[0] + r * window.dilation[0];
              const int64_t q = pixel % output.width * window.stride[1] - window.padding[1] + s * window.dilation[1];
              if (y < 0 || q < 0 || y >= input.height || q >= input.width) continue;
              const float value = x.at((n * input.height + y) * input.width + q, c);
              const float g = gradient.at(n * output.pixels() + pixel, o);
              expected += (makes_p ? std::max(value + 1, 0.0f) : value) * (makes_dy ? 2 * g : g);
            }
          const float got = dw[((o * window.kernel[0] + r) * window.kernel[1] + s) * in + c];
          if (got == expected) continue;  // false for NaN
          std::printf("%s: got %g instead of %g\n", isa, got, expected);
          std::exit(1);
        }
}

#if defined(RESNET_FUSED_X86)
bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }
bool has_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return has_pairs() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

const GradientKernels* gradient_kernels() { return chosen; }

}  // namespace engine
}  // namespace resnet_fused::cpu

int main(int argc, char** argv) {
  using namespace resnet_fused::cpu;
  for (int64_t i = argc > 1 ? std::atoll(argv[1]) : 40; i > 0; --i) {
    engine::chosen = &amx_portable::gradient_kernels();
    engine::check("amx_portable");
#if defined(RESNET_FUSED_X86)
    if (engine::has_pairs()) {
      engine::chosen = &avx512_bf16::gradient_kernels();
      engine::check("avx512_bf16");
    }
    if (!engine::has_tiles()) continue;
    engine::chosen = &amx::gradient_kernels();
    engine::check("amx");
#endif
  }
  std::puts("clean");
}
