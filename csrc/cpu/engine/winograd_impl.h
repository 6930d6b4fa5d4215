// The steps of winograd.h; included once per instruction set.

#include "vector_tile_impl.h"
#include "winograd.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::OuterTask;
using engine::WinogradTask;

// values: a multiple of kPanel.
static void transform_windows(const float* windows, int64_t values, float* u) {
  const auto half = Vector::fill(0.5f), zero = Vector::zero();
  // G of three values
  const auto transform = [&](const Vector::Type* g, Vector::Type* to) __attribute__((always_inline)) {
    const auto outer = Vector::add(g[0], g[2]);
    to[0] = g[0];
    to[1] = Vector::multiply_add(Vector::add(outer, g[1]), half, zero);
    to[2] = Vector::multiply_add(Vector::subtract(outer, g[1]), half, zero);
    to[3] = g[2];
  };
  for (int64_t at = 0; at < values; at += Vector::lanes) {
    Vector::Type rows[3][4];
    _Pragma("GCC unroll 3") for (int r = 0; r < 3; ++r) {
      Vector::Type g[3];
      _Pragma("GCC unroll 3") for (int s = 0; s < 3; ++s) g[s] = Vector::load(windows + (3 * r + s) * values + at);
      transform(g, rows[r]);
    }
    _Pragma("GCC unroll 4") for (int s = 0; s < 4; ++s) {
      const Vector::Type column[3] = {rows[0][s], rows[1][s], rows[2][s]};
      Vector::Type to[4];
      transform(column, to);
      _Pragma("GCC unroll 4") for (int r = 0; r < 4; ++r) Vector::store(u + (4 * r + s) * values + at, to[r]);
    }
  }
}

static inline void transform_patch(
    const float* first, int64_t right, int64_t below, int64_t channels, float* to, int64_t plane) {
  for (int64_t at = 0; at < channels; at += Vector::lanes) {
    // the last vector may overlap the one before
    const int64_t c = at + Vector::lanes <= channels ? at : channels - Vector::lanes;
    Vector::Type rows[4][4];
    _Pragma("GCC unroll 4") for (int s = 0; s < 4; ++s) {
      const float* d = first + c + s * right;
      const auto d0 = Vector::load(d), d1 = Vector::load(d + below), d2 = Vector::load(d + 2 * below),
                 d3 = Vector::load(d + 3 * below);
      rows[0][s] = Vector::subtract(d0, d2);
      rows[1][s] = Vector::add(d1, d2);
      rows[2][s] = Vector::subtract(d2, d1);
      rows[3][s] = Vector::subtract(d1, d3);
    }
    float* v = to + c;
    _Pragma("GCC unroll 4") for (int r = 0; r < 4; ++r, v += 4 * plane) {
      const auto* d = rows[r];
      Vector::store(v, Vector::subtract(d[0], d[2]));
      Vector::store(v + plane, Vector::add(d[1], d[2]));
      Vector::store(v + 2 * plane, Vector::subtract(d[2], d[1]));
      Vector::store(v + 3 * plane, Vector::subtract(d[1], d[3]));
    }
  }
}

template <class Out>
static void transform_patches(const WinogradTask<Out>& task, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p)
    transform_patch(
        task.input + task.first[p] * task.pitch, task.right, task.below, task.channels,
        task.transformed + p * task.v_pitch, task.v_plane);
}

// The outputs of one panel, from the sums of its products.
template <class Finish, class Out>
static void transform_sums(const WinogradTask<Out>& task, int64_t channel) {
  constexpr int64_t at_once = 8;
  const int64_t plane = task.count * kPanel;
  typename Vector::Type wild = Vector::zero();
  const auto zero = Vector::zero();
  alignas(64) float out[at_once * engine::kOutputs][kPanel];
  for (int64_t first = 0; first < task.count; first += at_once) {
    const int64_t rest = task.count - first, count = rest < at_once ? rest : at_once;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < kPanel; c += Vector::lanes) {
        const float* sums = task.sums + (first + p) * kPanel + c;
        typename Vector::Type rows[2][4];
        _Pragma("GCC unroll 4") for (int s = 0; s < 4; ++s) {
          const auto m0 = Vector::load(sums + s * plane), m1 = Vector::load(sums + (4 + s) * plane),
                     m2 = Vector::load(sums + (8 + s) * plane), m3 = Vector::load(sums + (12 + s) * plane);
          rows[0][s] = Vector::add(m0, Vector::add(m1, m2));
          rows[1][s] = Vector::subtract(Vector::subtract(m1, m2), m3);
        }
        _Pragma("GCC unroll 2") for (int r = 0; r < 2; ++r) {
          const auto* m = rows[r];
          const auto left = Vector::add(m[0], Vector::add(m[1], m[2])),
                     right = Vector::subtract(Vector::subtract(m[1], m[2]), m[3]);
          Vector::store(out[4 * p + 2 * r] + c, left);
          Vector::store(out[4 * p + 2 * r + 1] + c, right);
          const int32_t* target = task.targets + 4 * (first + p) + 2 * r;
          if (target[0] >= 0) wild = Vector::multiply_add(left, zero, wild);
          if (target[1] >= 0) wild = Vector::multiply_add(right, zero, wild);
        }
      }
    const int rows = static_cast<int>(engine::kOutputs * count);
    finish_rows<Finish>(out[0], task.epilogue, channel, task.targets + engine::kOutputs * first, 0, rows);
  }
  if (!Vector::all_finite(wild)) *task.not_finite = true;
}

template <class Out>
static void multiply_patches(const WinogradTask<Out>& task) {
  with_finish(task.epilogue, [&](auto finish) {
    using Finish = decltype(finish);
    constexpr int64_t passes = kPanel / kColumns;
    const int64_t tiles = (task.count + kVectorRows - 1) / kVectorRows;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
      for (int64_t i = 0; i < engine::kPatch; ++i) {
        const float* weights = task.weights + (panel * engine::kPatch + i) * task.channels * kPanel;
        for (int64_t c = 0; c < task.channels; c += kChunk<float>) {
          const int64_t rest = task.channels - c, channels = rest < kChunk<float> ? rest : kChunk<float>;
          const Run<float> run{task.transformed + i * task.v_plane + c, task.v_pitch, weights + c * kPanel, channels};
          // all tiles pass these weights, and meanwhile the next ones are fetched
          const char* next = reinterpret_cast<const char*>(run.weights + channels * kPanel);
          const int64_t stride = (kBytesOfStep + tiles * passes - 1) / (tiles * passes);
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * task.count / tiles, rows = (t + 1) * task.count / tiles - first;
            Tile tile{0, c > 0, task.sums + (i * task.count + first) * kPanel};
            for (; tile.column < kPanel; tile.column += kColumns, next += stride * channels)
              kMultiplyTile<float, Unfinished>[rows](&run, & run + 1, first, tile, next, stride);
          }
        }
      }
      transform_sums<Finish>(task, panel * kPanel);
    }
  });
}

// channels: a multiple of 32; panel: from one panel of them to the next.
static void transform_outputs(
    const float* first, int64_t right, int64_t below, int64_t channels, float* to, int64_t panel, int64_t plane) {
  for (int64_t c = 0; c < channels; c += Vector::lanes) {
    Vector::Type rows[4][2];
    _Pragma("GCC unroll 2") for (int s = 0; s < 2; ++s) {
      const auto upper = Vector::load(first + c + s * right), lower = Vector::load(first + c + s * right + below);
      rows[0][s] = upper;
      rows[1][s] = Vector::add(upper, lower);
      rows[2][s] = Vector::subtract(upper, lower);
      rows[3][s] = Vector::subtract(Vector::zero(), lower);
    }
    float* e = to + c / kPanel * panel + c % kPanel;
    _Pragma("GCC unroll 4") for (int r = 0; r < 4; ++r, e += 4 * plane) {
      const auto left = rows[r][0], right_value = rows[r][1];
      Vector::store(e, left);
      Vector::store(e + plane, Vector::add(left, right_value));
      Vector::store(e + 2 * plane, Vector::subtract(left, right_value));
      Vector::store(e + 3 * plane, Vector::subtract(Vector::zero(), right_value));
    }
  }
}

template <int rows>
static void multiply_outer_tile(const OuterTask& task, int64_t channel, int64_t column) {
  Vector::Type sum[rows][kVectors];
  EACH_ROW for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector::zero();
  const float *x = task.v + channel, *e = task.e + column;
  for (int64_t p = 0; p < task.count; ++p, x += task.v_pitch, e += kPanel) {
    Vector::Type b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = Vector::load(e + v * Vector::lanes);
    EACH_ROW multiply_row(r, x + r, b, sum[r]);
  }
  float* to = task.du + channel * kPanel + column;
  EACH_ROW for (int v = 0; v < kVectors; ++v) {
    float* at = to + r * kPanel + v * Vector::lanes;
    Vector::store(at, Vector::add(Vector::load(at), sum[r][v]));
  }
}

constexpr void (*kMultiplyOuter[])(const OuterTask&, int64_t, int64_t) = {
    nullptr,
    multiply_outer_tile<1>,
    multiply_outer_tile<2>,
    multiply_outer_tile<3>,
    multiply_outer_tile<4>,
    multiply_outer_tile<5>,
    multiply_outer_tile<6>,
#if VECTOR_BYTES == 64
    multiply_outer_tile<7>,
    multiply_outer_tile<8>,
    multiply_outer_tile<9>,
    multiply_outer_tile<10>,
    multiply_outer_tile<11>,
    multiply_outer_tile<12>,
    multiply_outer_tile<13>,
    multiply_outer_tile<14>
#endif
};

static void multiply_outer(const OuterTask& task) {
  const int64_t count = (task.channels + kVectorRows - 1) / kVectorRows;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t first = t * task.channels / count, rows = (t + 1) * task.channels / count - first;
    for (int64_t column = 0; column < kPanel; column += kColumns) kMultiplyOuter[rows](task, first, column);
  }
}

static void transform_gradient(const float* du, int64_t plane, int64_t values, float* windows) {
  const auto half = Vector::fill(0.5f), zero = Vector::zero();
  // G' of four values
  const auto transform = [&](const Vector::Type* u, Vector::Type* to) __attribute__((always_inline)) {
    const auto sum = Vector::multiply_add(Vector::add(u[1], u[2]), half, zero);
    to[0] = Vector::add(u[0], sum);
    to[1] = Vector::multiply_add(Vector::subtract(u[1], u[2]), half, zero);
    to[2] = Vector::add(sum, u[3]);
  };
  for (int64_t at = 0; at < values; at += Vector::lanes) {
    Vector::Type columns[4][3];
    _Pragma("GCC unroll 4") for (int s = 0; s < 4; ++s) {
      Vector::Type u[4];
      _Pragma("GCC unroll 4") for (int r = 0; r < 4; ++r) u[r] = Vector::load(du + (4 * r + s) * plane + at);
      transform(u, columns[s]);
    }
    _Pragma("GCC unroll 3") for (int r = 0; r < 3; ++r) {
      const Vector::Type row[4] = {columns[0][r], columns[1][r], columns[2][r], columns[3][r]};
      Vector::Type to[3];
      transform(row, to);
      _Pragma("GCC unroll 3") for (int s = 0; s < 3; ++s) Vector::store(windows + (3 * r + s) * values + at, to[s]);
    }
  }
}

template <class Out>
static constexpr engine::Winograd<Out> kWinograd{&transform_windows, &transform_patches<Out>, &multiply_patches<Out>,
                                                 &transform_patch,   &transform_outputs,      &multiply_outer,
                                                 &transform_gradient};

}  // namespace resnet_fused::cpu::KERNELS_ISA
