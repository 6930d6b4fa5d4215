// Random convolutions through layouts, schedules and the products of every instruction set that this machine has, each
// buffer alone on the heap and exactly as large as its layout says: `make sanitize` compiles this with AddressSanitizer
// and UndefinedBehaviorSanitizer, and again with ThreadSanitizer. Torch-free; the tables are chosen here, not by
// isa.cpp.
//
// What AMX loads is not seen by a sanitizer; amx_portable reads the same in C++.
#include "../../../csrc/cpu/x86.h"
#if defined(RESNET_FUSED_X86)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../../csrc/cpu/engine/schedule.h"

namespace resnet_fused::cpu {

#define TABLE(isa, type)                        \
  namespace isa {                               \
  const engine::Products<type>& products(type); \
  }
#define HALF_TABLE(isa)                                     \
  namespace isa {                                           \
  const engine::Products<float, f16>& products(float, f16); \
  }
TABLE(baseline, float)
TABLE(baseline, bf16)
HALF_TABLE(baseline)
TABLE(amx_portable, bf16)
#if defined(RESNET_FUSED_X86)
TABLE(avx2, float)
TABLE(avx2, bf16)
HALF_TABLE(avx2)
TABLE(avx512, float)
TABLE(avx512, bf16)
HALF_TABLE(avx512)
TABLE(avx512_bf16, bf16)
TABLE(amx, bf16)
#endif
#undef TABLE
#undef HALF_TABLE

namespace engine {
namespace {

std::mt19937 generator(1);
int64_t by_winograd = 0;  // convolutions
int64_t any(int64_t from, int64_t to) { return std::uniform_int_distribution<int64_t>(from, to)(generator); }

float to_float(float v) { return v; }
float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float to_float(f16 v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  const float size = exponent == 31  ? (mantissa ? std::nanf("") : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return v.bits & 0x8000 ? -size : size;
}
template <class T>
T small(int64_t v) {  // exact in all types, and so are sums of them
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if constexpr (std::is_same_v<T, float>)
    return f;
  else if constexpr (std::is_same_v<T, bf16>)
    return {static_cast<uint16_t>(bits >> 16)};
  else
    return {static_cast<uint16_t>(v == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13)};
}

template <class T>
std::unique_ptr<T[]> exactly(int64_t count) {  // not filled: what is read without having been written shows as garbage
  std::unique_ptr<T[]> memory(new T[count]);
  std::memset(memory.get(), 0xff, count * sizeof(T));  // NaN
  return memory;
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T, class Out>
struct Convolution {
  Window window;
  Size input, output;
  int64_t images, in, out;
  Gathers gathers = Gathers::nothing;
  bool relu = true, winograd = false;
  std::unique_ptr<T[]> x, weight;  // [N, H, W, C], [O, R, S, C]
  std::unique_ptr<Out[]> u;        // where gradients are gathered, laid out as the output

  Convolution() {
    do {
      for (int d = 0; d < 2; ++d) {
        window.kernel[d] = any(1, 5);
        window.stride[d] = any(1, 3);
        window.padding[d] = any(0, 3);
        window.dilation[d] = any(1, 2);
      }
      if (any(0, 3) == 0) window = {{1, 1}, {1, 1}, {0, 0}, {1, 1}};
      input = {any(1, 9), any(1, 12)};
      output = window.output(input);
    } while (output.height < 1 || output.width < 1);
    images = any(1, 6);
    in = any(0, 2) == 0 ? 32 * any(1, 2) : any(1, 40);
    out = any(1, 70);
    winograd = std::is_same_v<T, float> && any(0, 2) == 0;
    if (winograd) {
      window = {{3, 3}, {1, 1}, {any(0, 2), any(0, 2)}, {1, 1}};
      input = {any(3, 9), any(3, 12)};
      output = window.output(input);
      in = any(kPanel, 50);
    } else if (any(0, 1)) {
      out = 32 * any(1, 3);
      gathers = any(0, 1) ? Gathers::statistics : Gathers::gradient;
      relu = gathers == Gathers::gradient && any(0, 1);
    }
    const int64_t values = images * input.pixels() * in, weights = out * window.kernel[0] * window.kernel[1] * in;
    x = exactly<T>(values);
    weight = exactly<T>(weights);
    for (int64_t i = 0; i < values; ++i) x[i] = small<T>(any(-2, 2));
    for (int64_t i = 0; i < weights; ++i) weight[i] = small<T>(any(-1, 1));
    if (gathers == Gathers::gradient) u = exactly<Out>(outputs());
    for (int64_t i = 0; u && i < outputs(); ++i) u[i] = small<Out>(any(-2, 2));
  }

  int64_t outputs() const { return images * output.pixels() * out; }

  const T* pixel(int64_t n, int64_t y, int64_t c) const {
    if (y < 0 || c < 0 || y >= input.height || c >= input.width) return nullptr;
    return x.get() + ((n * input.height + y) * input.width + c) * in;
  }

  Layout::Kind kind() const {
    if (winograd) return Layout::Kind::planes;
    if (window.is_pixel()) return Layout::Kind::pixels;
    if (window.kernel[1] > 1 && window.kernel[1] * in <= 32) return Layout::Kind::folded;
    return any(0, 1) ? Layout::Kind::planes : Layout::Kind::columns;
  }

  float expected(int64_t n, int64_t o, int64_t y, int64_t c) const {
    float sum = 0;
    for (int64_t r = 0; r < window.kernel[0]; ++r)
      for (int64_t s = 0; s < window.kernel[1]; ++s) {
        const T* at = pixel(
            n, y * window.stride[0] - window.padding[0] + r * window.dilation[0],
            c * window.stride[1] - window.padding[1] + s * window.dilation[1]);
        const T* w = weight.get() + ((o * window.kernel[0] + r) * window.kernel[1] + s) * in;
        for (int64_t k = 0; at && k < in; ++k) sum += to_float(at[k]) * to_float(w[k]);
      }
    if (!relu) return sum;
    if (gathers == Gathers::nothing) return std::max(sum, 0.0f);
    return to_float(u[((n * output.height + y) * output.width + c) * out + o]) > 1 ? sum : 0;  // 2 (u + 1) - 4 > 0
  }
};

template <class T>
int64_t offset_in_panel(int64_t channel, int64_t output) {  // as in pack.cpp
  if (sizeof(T) == 4) return channel * kPanel + output;
  return channel / 32 * 1024 + output / 16 * 512 + channel % 32 / 2 * 32 + output % 16 * 2 + channel % 2;
}

// [panel][tap][depth][32], as pack.cpp has it.
template <class T, class Out>
std::unique_ptr<T[]> pack(const Convolution<T, Out>& c, const Layout& l, int64_t taps, int64_t panels) {
  auto packed = exactly<T>(panels * taps * l.depth * kPanel);
  std::memset(packed.get(), 0, panels * taps * l.depth * kPanel * sizeof(T));
  const auto [height, width] = c.window.kernel;
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t r = 0; r < height; ++r)
      for (int64_t s = 0; s < width; ++s)
        for (int64_t k = 0; k < c.in; ++k) {
          const bool rows = l.kind == Layout::Kind::columns, columns = rows || l.kind == Layout::Kind::folded;
          const int64_t tap = (rows ? 0 : r) * (columns ? 1 : width) + (columns ? 0 : s);
          const int64_t channel = ((rows ? r : 0) * width + (columns ? s : 0)) * c.in + k;
          packed[(o / kPanel * taps + tap) * l.depth * kPanel + offset_in_panel<T>(channel, o % kPanel)] =
              c.weight[((o * height + r) * width + s) * c.in + k];
        }
  return packed;
}

// What is gathered of all steps, added up, is what the results are.
template <class T, class Out>
void check_gathered(
    const char* isa, const Convolution<T, Out>& c, const Out* out, const std::vector<float>& sums,
    const std::vector<int32_t>& rows, int64_t steps) {
  const bool statistics = c.gathers == Gathers::statistics;
  const int64_t width = statistics ? 3 : 2, panels = c.out / kPanel;
  for (int64_t o = 0; o < c.out; ++o) {
    double one = 0, other = 0, expected_one = 0, expected_other = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t panel = step * panels + o / kPanel;
      const float* s = sums.data() + panel * width * kPanel + o % kPanel;
      const double count = rows[panel];
      if (!statistics) {
        one += s[0];
        other += s[kPanel];
      } else if (count > 0) {
        one += s[0] * count + s[kPanel];
        other += s[2 * kPanel] + 2.0 * s[0] * s[kPanel] + count * s[0] * s[0];
      }
    }
    for (int64_t p = 0; p < c.images * c.output.pixels(); ++p) {
      const double z = to_float(out[p * c.out + o]);
      expected_one += z;
      expected_other += statistics ? z * z : z * (to_float(c.u[p * c.out + o]) + 1);
    }
    if (one == expected_one && std::fabs(other - expected_other) <= 1e-6 * expected_other * statistics) continue;
    std::printf("%s: gathered %g and %g, not %g and %g\n", isa, one, other, expected_one, expected_other);
    std::exit(1);
  }
}

// What a step reads of the images of an item, in a buffer of the layout's size.
template <class T, class Out>
std::unique_ptr<T[]> lay_out_input(const Convolution<T, Out>& c, const Layout& l, int64_t first, const Step& step) {
  auto buffer = exactly<T>(l.positions * l.pitch);
  const auto& w = c.window;
  const auto put = [&](T* to, const T* from, int64_t count) {
    if (from)
      std::memcpy(to, from, count * sizeof(T));
    else
      std::memset(to, 0, count * sizeof(T));
  };
  for (const int32_t position : l.zeros) put(buffer.get() + position * l.pitch, nullptr, l.pitch);
  for (int64_t n = 0; n < l.images; ++n) {
    if (l.kind == Layout::Kind::planes) {
      for (int64_t p = 0; p < l.input.pixels(); ++p) {
        const int64_t place = l.place[n * l.input.pixels() + p];
        if (place < 0) continue;
        put(buffer.get() + place * l.pitch, nullptr, l.pitch);
        put(buffer.get() + place * l.pitch, c.pixel(first + n, p / l.input.width, p % l.input.width), c.in);
      }
    } else if (l.kind == Layout::Kind::folded) {
      for (int64_t y = step.x_begin; y < step.x_end; ++y) {
        const int64_t phase = (y + w.padding[0]) % w.stride[0], row = (y + w.padding[0]) / w.stride[0] - step.begin;
        for (int64_t o = 0; o < l.output.width; ++o) {
          T* to = buffer.get() + (phase * l.plane + row * l.row + o) * l.pitch;
          put(to, nullptr, l.pitch);
          for (int64_t s = 0; s < w.kernel[1]; ++s)
            put(to + s * c.in, c.pixel(first + n, y, o * w.stride[1] - w.padding[1] + s * w.dilation[1]), c.in);
        }
      }
    } else {
      for (int64_t y = 0; y < l.output.height; ++y)
        for (int64_t o = 0; o < l.output.width; ++o) {
          T* to = buffer.get() + l.position(n, y, o) * l.pitch;
          put(to, nullptr, l.pitch);
          for (int64_t tap = 0; tap < w.kernel[0] * w.kernel[1]; ++tap)
            put(to + tap * c.in,
                c.pixel(
                    first + n, y * w.stride[0] - w.padding[0] + tap / w.kernel[1] * w.dilation[0],
                    o * w.stride[1] - w.padding[1] + tap % w.kernel[1] * w.dilation[1]),
                c.in);
        }
    }
  }
  return buffer;
}

template <class T, class Out>
void check(const char* isa, const Products<T, Out>& products) {
  const Convolution<T, Out> c;
  const int64_t threads = any(1, 3), panels = (c.out + kPanel - 1) / kPanel;
  const auto kind = c.kind();
  const Machine machine{threads,   any(1, 64) * 1024, products.tile_rows, products.reads_whole_tiles,
                        sizeof(T), kDepthStep<T>};
  const bool columns = kind == Layout::Kind::columns;
  const int64_t all_taps = c.window.kernel[0] * c.window.kernel[1];
  const Shape shape{c.window, 1, c.in, c.out, kind, panels, round_up(all_taps * c.in, kDepthStep<T>), c.winograd};
  const Schedule s = make_schedule({shape}, nullptr, nullptr, c.images, c.input, false, machine);
  const Layout& l = s.layouts[0];
  const int64_t taps = columns ? 1 : static_cast<int64_t>(l.taps.size());
  const auto weights = pack(c, l, taps, panels);
  std::unique_ptr<float[]> u;
  if constexpr (std::is_same_v<T, float>)
    if (s.winograd[0]) {
      const int64_t plane = l.depth * kPanel;
      u = exactly<float>(panels * kPatch * plane);
      for (int64_t panel = 0; panel < panels; ++panel)
        products.winograd->transform_windows(
            weights.get() + panel * taps * plane, plane, u.get() + panel * kPatch * plane);
    }
  by_winograd += s.winograd[0];
  auto out = exactly<Out>(c.images * c.output.pixels() * c.out);
  const std::vector<float> scale(panels * kPanel, 1.0f), shift(panels * kPanel, 0.0f);
  const std::vector<float> center(panels * kPanel, -1.0f), twice(panels * kPanel, 2.0f), less(panels * kPanel, -4.0f);
  size_t most = 0;  // steps of a part
  for (const Part& part : s.parts) most = std::max(most, part.size());
  const int64_t steps = s.items * static_cast<int64_t>(s.parts.size() * most);
  // statistics begin with their first row, whatever was there
  std::vector<float> sums(steps * panels * 3 * kPanel, c.gathers == Gathers::statistics ? std::nanf("") : 0.0f);
  std::vector<int32_t> rows(steps * panels, 0);

  const auto epilogue = [&](int64_t item, int64_t at) {
    Epilogue<Out> e;
    e.scale = scale.data();
    e.shift = shift.data();
    if (c.gathers == Gathers::nothing) e.act.kind = ActivationKind::relu;
    e.gathers = c.gathers;
    e.sums = sums.data() + at * panels * (c.gathers == Gathers::statistics ? 3 : 2) * kPanel;
    e.rows = rows.data() + at * panels;
    if (c.u)
      e.behind = {
          c.u.get() + item * s.images * c.output.pixels() * c.out, center.data(), twice.data(), less.data(), c.relu};
    e.target = s.targets[0].data();
    e.out = out.get() + item * s.images * c.output.pixels() * c.out;
    e.pitch = e.channels = c.out;
    return e;
  };
  const auto run_patches = [&](int64_t item, const Step& step, const T* input, int64_t begin, int64_t end) {
    const Patches& patches = s.patches[0];
    const auto v = exactly<float>(patches.transformed()), patch_sums = exactly<float>(patches.sums());
    const int64_t all = static_cast<int64_t>(step.patches.size());
    for (int64_t first = 0; first < all; first += patches.at_once) {
      bool not_finite = false;
      WinogradTask<Out> task{};
      if constexpr (std::is_same_v<T, float>) task.input = input;
      task.pitch = l.pitch;
      task.right = l.images * l.pitch;
      task.below = l.row * task.right;
      task.channels = l.depth;
      task.weights = u.get();
      task.first = step.patches.data() + first;
      task.targets = step.patch_targets.data() + kOutputs * first;
      task.count = std::min(patches.at_once, all - first);
      task.panel_begin = begin;
      task.panel_end = end;
      task.transformed = v.get();
      task.v_pitch = patches.pitch;
      task.v_plane = patches.plane();
      task.sums = patch_sums.get();
      task.epilogue = epilogue(item, 0);
      task.not_finite = &not_finite;
      products.winograd->transform_patches(task, 0, task.count);
      products.winograd->multiply(task);
      if (!not_finite) continue;
      std::printf("%s: a sum by Winograd is not finite\n", isa);
      std::exit(1);
    }
  };
  const auto run = [&](int64_t item, int64_t at, const Step& step, const T* input, int64_t begin, int64_t end) {
    if (s.winograd[0]) return run_patches(item, step, input, begin, end);
    Task<T, Out> task{};
    auto& f = task.factors[0];
    f.input = input;
    f.pitch = l.pitch;
    f.taps = l.taps.data();
    f.tap_count = taps;
    f.depth = l.depth;
    f.weights = weights.get();
    task.rows = step.tiles.data();
    task.row_count = static_cast<int64_t>(step.tiles.size());
    task.panel_begin = begin;
    task.panel_end = end;
    task.panels_inner = item % 2 == 0;
    task.epilogue = epilogue(item, at);
    products.multiply(task);
  };
  // a thread for each part, or for each share of the outputs: none waits for another
  for (int64_t item = 0; item < s.items; ++item)
    for (size_t first = 0; first < s.parts.size(); first += threads) {
      std::vector<std::thread> running;
      const size_t beyond = std::min(s.parts.size(), first + threads);
      for (size_t p = first; p < beyond; ++p)
        running.emplace_back([&, p] {
          for (size_t index = 0; index < s.parts[p].size(); ++index) {
            const Step& step = s.parts[p][index];
            const int64_t at = (item * s.parts.size() + p) * most + index;
            const auto buffer = s.reads_x ? nullptr : lay_out_input(c, l, item * s.images, step);
            const T* input = s.reads_x ? c.x.get() + item * s.images * c.input.pixels() * c.in : buffer.get();
            if (l.kind == Layout::Kind::folded) input -= step.begin * l.output.width * l.pitch;
            std::vector<std::thread> sharing;
            const int64_t shares = s.splits_outputs ? std::min(threads, panels) : 1;
            for (int64_t t = 0; t < shares; ++t)
              sharing.emplace_back(
                  [&, t] { run(item, at, step, input, t * panels / shares, (t + 1) * panels / shares); });
            for (auto& thread : sharing) thread.join();
          }
        });
      for (auto& thread : running) thread.join();
    }

  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t p = 0; p < c.output.pixels(); ++p)
      for (int64_t o = 0; o < c.out; ++o) {
        const float got = to_float(out[(n * c.output.pixels() + p) * c.out + o]);
        const float expected = c.expected(n, o, p / c.output.width, p % c.output.width);
        if (std::fabs(got - expected) <= std::fabs(expected) / 256 * (sizeof(Out) == 2)) continue;  // false for NaN
        std::printf("%s: got %g instead of %g, layout %d\n", isa, got, expected, static_cast<int>(l.kind));
        std::exit(1);
      }
  if (c.gathers != Gathers::nothing) check_gathered(isa, c, out.get(), sums, rows, steps);
}

// The weight gradient of a picture by Winograd, every patch copied out with its padding, against plain sums.
void check_winograd_gradient(const char* isa, const Winograd<float>& kernels) {
  const int64_t height = any(1, 7), width = any(1, 7), in = any(kPanel, 50), out = kPanel * any(1, 2);
  const int64_t columns = (width + 1) / 2, count = (height + 1) / 2 * columns;
  const auto x = exactly<float>(height * width * in), dy = exactly<float>(height * width * out);
  for (int64_t i = 0; i < height * width * in; ++i) x[i] = static_cast<float>(any(-2, 2));
  for (int64_t i = 0; i < height * width * out; ++i) dy[i] = static_cast<float>(any(-2, 2));
  const auto copy = [&](const float* from, int64_t channels, int64_t y, int64_t c, int64_t side, float* to) {
    for (int64_t i = 0; i < side * side; ++i, to += channels) {
      const int64_t row = y + i / side, column = c + i % side;
      const bool within = row >= 0 && column >= 0 && row < height && column < width;
      for (int64_t k = 0; k < channels; ++k) to[k] = within ? from[(row * width + column) * channels + k] : 0;
    }
  };
  const auto v = exactly<float>(kPatch * count * in), e = exactly<float>(kPatch * count * out);
  for (int64_t p = 0; p < count; ++p) {
    const auto inputs = exactly<float>(16 * in), gradients = exactly<float>(4 * out);
    copy(x.get(), in, p / columns * 2 - 1, p % columns * 2 - 1, 4, inputs.get());
    copy(dy.get(), out, p / columns * 2, p % columns * 2, 2, gradients.get());
    kernels.transform_patch(inputs.get(), in, 4 * in, in, v.get() + p * in, count * in);
    kernels.transform_outputs(gradients.get(), out, 2 * out, out, e.get() + p * kPanel, count * kPanel, count * out);
  }
  const int64_t panels = out / kPanel, values = in * kPanel;
  const auto du = exactly<float>(kPatch * panels * values), windows = exactly<float>(9 * values);
  std::memset(du.get(), 0, kPatch * panels * values * sizeof(float));
  for (int64_t i = 0; i < kPatch; ++i)
    for (int64_t o = 0; o < panels; ++o)
      kernels.multiply_outer(
          {v.get() + i * count * in, e.get() + i * count * out + o * count * kPanel, in, count, in,
           du.get() + (i * panels + o) * values});
  for (int64_t o = 0; o < out; ++o) {
    if (o % kPanel == 0) kernels.transform_gradient(du.get() + o * in, panels * values, values, windows.get());
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t k = 0; k < in; ++k) {
        float expected = 0;
        for (int64_t y = 0; y < height; ++y)
          for (int64_t c = 0; c < width; ++c) {
            const int64_t row = y + tap / 3 - 1, column = c + tap % 3 - 1;
            if (row >= 0 && column >= 0 && row < height && column < width)
              expected += dy[(y * width + c) * out + o] * x[(row * width + column) * in + k];
          }
        const float got = windows[tap * values + k * kPanel + o % kPanel];
        if (got == expected) continue;
        std::printf("%s: a weight gradient is %g instead of %g\n", isa, got, expected);
        std::exit(1);
      }
  }
}

#if defined(RESNET_FUSED_X86)
bool has_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

int main_of(int64_t each) {
  for (int64_t i = 0; i < each; ++i) {
    check("baseline", baseline::products(float{}));
    check_winograd_gradient("baseline", *baseline::products(float{}).winograd);
    check("baseline to half", baseline::products(float{}, f16{}));
    check("baseline", baseline::products(bf16{}));
    if (i % 4 == 0) check("amx_portable", amx_portable::products(bf16{}));
#if defined(RESNET_FUSED_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      check("avx2", avx2::products(float{}));
      check_winograd_gradient("avx2", *avx2::products(float{}).winograd);
      check("avx2 to half", avx2::products(float{}, f16{}));
      check("avx2", avx2::products(bf16{}));
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      check("avx512", avx512::products(float{}));
      check_winograd_gradient("avx512", *avx512::products(float{}).winograd);
      check("avx512 to half", avx512::products(float{}, f16{}));
      check("avx512", avx512::products(bf16{}));
      if (__builtin_cpu_supports("avx512bf16")) check("avx512_bf16", avx512_bf16::products(bf16{}));
    }
    if (has_tiles()) check("amx", amx::products(bf16{}));
#endif
  }
  if (by_winograd < each / 2) {
    std::printf("only %ld convolutions were computed by Winograd\n", static_cast<long>(by_winograd));
    return 1;
  }
  std::puts("clean");
  return 0;
}

}  // namespace
}  // namespace engine
}  // namespace resnet_fused::cpu

int main(int argc, char** argv) { return resnet_fused::cpu::engine::main_of(argc > 1 ? std::atoll(argv[1]) : 40); }
