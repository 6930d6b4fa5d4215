// The convolution phase: an implicit matrix product over NHWC activations, forward and transposed (data gradient).
// `Convolution` (phase.h) has the shapes.
#pragma once

#include "epilogue.cuh"

namespace resnet_fused::cuda {

// The taps and blocks of source channels that a product walks, one step after the other.
//
// The transposed form walks only the taps that meet the grid of the class at `position`: every step-th from the first
// one that does. The source then lies (position + padding - tap dilation) / stride away, without a remainder.
template <bool TRANSPOSED>
struct Taps {
  const Geometry& g;
  int position[2], first[2], step[2], at[2];
  int depth = 0;

  DEVICE Taps(const Geometry& g, int row, int column) : g(g), position{row, column}, first{0, 0}, step{1, 1} {
    UNROLL for (int d = 0; d < 2; ++d) {
      if (TRANSPOSED && g.stride[d] > 1) {
        while (first[d] < g.kernel[d] && (position[d] + g.padding[d] - first[d] * g.dilation[d]) % g.stride[d] != 0)
          ++first[d];
        while (step[d] * g.dilation[d] % g.stride[d] != 0) ++step[d];
      }
      at[d] = first[d];
    }
  }
  DEVICE int count() const {
    const int rows = ceil_div(g.kernel[0] - first[0], step[0]), columns = ceil_div(g.kernel[1] - first[1], step[1]);
    return rows * columns;
  }
  DEVICE int index() const { return at[0] * g.kernel[1] + at[1]; }
  // Where the source lies for the tap: rows (d = 0) or columns from a result pixel's own place.
  DEVICE int shift(int d) const {
    const int away = at[d] * g.dilation[d] - g.padding[d];
    return TRANSPOSED ? (position[d] - away) / g.stride[d] : away;
  }
  DEVICE void next(int block, int channels) {
    depth += block;
    if (depth < channels) return;
    depth = 0;
    at[1] += step[1];
    if (at[1] < g.kernel[1]) return;
    at[1] = first[1];
    at[0] += step[0];
  }
};

// Operand A of a product, [ROWS, depth]: for each row of the tile the source pixel at the current tap. Operand B: the
// weights, [COLUMNS, depth], or [depth, COLUMNS] where TRANSPOSED.
template <class S, bool TRANSPOSED>
struct ConvolutionLoader {
  using T = typename S::Value;
  static constexpr int kEach = S::ROWS / 32;                     // rows of A that a thread copies, one chunk of each
  static constexpr int kWeightChunks = S::COLUMNS / kChunk<T>;   // of a row of a transposed B
  static constexpr int kWeightEach = S::COLUMNS * 8 / kThreads;  // chunks of B that a thread copies
  static constexpr int kNowhere = 0x40004000;

  const Product& p;
  int column;
  int64_t base;  // of the tile's first image
  Taps<TRANSPOSED> taps;
  int offset[kEach];    // of a row's own place from the first image
  int place[kEach];     // its row << 16 and column in the source, or kNowhere
  uint32_t inside = 0;  // which chunks lie inside, four bits per step
  int ahead = 0;        // steps loaded and not yet multiplied
  int channel = 0;      // first channel of the step that is multiplied next
  int depth = 0;        // its depth

  DEVICE ConvolutionLoader(const Product& p, int column, int64_t first_image, int row_class, int column_class)
      : p(p),
        column(column),
        base(first_image * p.source_height * p.source_width * p.source.channels),
        taps(p.geometry, row_class, column_class) {}

  // Row `i` of this thread: image from the tile's first, own place in the source; image -1: no pixel.
  DEVICE void set_row(int i, int image, int h, int w) {
    offset[i] = image < 0 ? 0 : ((image * p.source_height + h) * p.source_width + w) * p.source.channels;
    place[i] = image < 0 ? kNowhere : h * 65536 + w;
  }
  DEVICE static int row(int i) { return thread_index() / 8 + i * 32; }
  DEVICE int steps() const { return taps.count() * ceil_div(p.source.channels, kDepth<T>); }

  DEVICE void load(char* buffer) {
    const T* const x = static_cast<const T*>(p.source.x);
    const T* const y = static_cast<const T*>(p.source.y);
    const int channels = p.source.channels, shift_h = taps.shift(0), shift_w = taps.shift(1);
    const int chunk = thread_index() % 8, c = taps.depth + chunk * kChunk<T>;
    const bool exists = c < channels;
    const int move = (shift_h * p.source_width + shift_w) * channels + c;
    uint32_t bits = 0;
    UNROLL for (int i = 0; i < kEach; ++i) {
      const int h = (place[i] >> 16) + shift_h, w = (place[i] & 0xffff) + shift_w;
      const bool in = static_cast<unsigned>(h) < static_cast<unsigned>(p.source_height) &&
                      static_cast<unsigned>(w) < static_cast<unsigned>(p.source_width) && exists;
      char* const to = buffer + chunk_offset(row(i), chunk, 8);
      const int64_t from = in ? base + (offset[i] + move) : 0;
      cp_async_16(to, x + from, in);
      if (y != nullptr) cp_async_16(to + S::STEP_BYTES, y + from, in);
      bits |= (in ? 1u : 0u) << i;
    }
    inside = inside << 4 | bits;
    const T* const weight = static_cast<const T*>(p.weight);
    char* const b = buffer + S::A_BYTES;
    const int all = p.geometry.kernel[0] * p.geometry.kernel[1], tap = taps.index();
    if constexpr (TRANSPOSED) {
      const int weight_chunk = thread_index() % kWeightChunks, result = column + weight_chunk * kChunk<T>;
      UNROLL for (int i = 0; i < kWeightEach; ++i) {
        const int k = thread_index() / kWeightChunks + i * (kThreads / kWeightChunks);
        const bool in = taps.depth + k < channels && result < p.result_channels;
        const int64_t from = (static_cast<int64_t>(taps.depth + k) * all + tap) * p.result_channels + result;
        cp_async_16(b + chunk_offset(k, weight_chunk, kWeightChunks), weight + (in ? from : 0), in);
      }
    } else {
      UNROLL for (int i = 0; i < kWeightEach; ++i) {
        const int n = row(i);
        const bool in = column + n < p.result_channels && exists;
        const int64_t from = (static_cast<int64_t>(column + n) * all + tap) * channels + c;
        cp_async_16(b + chunk_offset(n, chunk, 8), weight + (in ? from : 0), in);
      }
    }
    taps.next(kDepth<T>, channels);
    ++ahead;
  }

  DEVICE void finish(char* buffer) {
    const int channels = p.source.channels;
    --ahead;
    if (computed(p.source)) {
      const int chunk = thread_index() % 8, c = channel + chunk * kChunk<T>;
      const uint32_t bits = inside >> (4 * ahead);
      if (c < channels)
        compute_chunks<T, kEach>(
            p.source, c, S::STEP_BYTES, [&](int i) { return buffer + chunk_offset(row(i), chunk, 8); },
            [&](int i) { return (bits >> i & 1u) != 0; });
    }
    depth = least(kDepth<T>, channels - channel);
    channel = channel + kDepth<T> < channels ? channel + kDepth<T> : 0;
  }

  DEVICE int substeps() const { return ceil_div(depth * static_cast<int>(sizeof(T)), 32); }
  DEVICE BufferedA<S, false> a(const char* buffer) const { return {buffer}; }
  DEVICE BufferedB<S, TRANSPOSED> b(const char* buffer) const { return {buffer + S::A_BYTES}; }
};

template <class S>
DEVICE constexpr int buffer_bytes(bool with_y) {
  return S::STEP_BYTES + (with_y ? S::A_BYTES : 0);
}
constexpr int greater(int a, int b) { return a > b ? a : b; }

// Shared memory of a convolution: buffers, results or meeting threads; then the constants; then the running sums.
template <class S>
constexpr int products_bytes(int buffers, bool with_y) {
  return greater(
      greater(buffers * (S::STEP_BYTES + (with_y ? S::A_BYTES : 0)), S::RESULT_BYTES),
      kMeetingBytes<typename S::Value>);
}
template <class S>
constexpr int convolution_bytes(int buffers, bool with_y) {
  return products_bytes<S>(buffers, with_y) + constant_bytes(S::COLUMNS) + running_bytes(S::COLUMNS);
}

template <class S, bool TRANSPOSED>
NOINLINE_DEVICE void convolution() {
  using T = typename S::Value;
  const Convolution& c = current_phase().convolution;
  const bool with_y = c.product.source.y != nullptr;
  const int products = products_bytes<S>(c.buffers, with_y);
  auto* const constants = reinterpret_cast<float*>(work_memory() + products);
  auto* const running = reinterpret_cast<double*>(work_memory() + products + constant_bytes(S::COLUMNS));
  const WorkerSums<T> sums{
      running, reinterpret_cast<sum_t<T>*>(work_memory()), reinterpret_cast<int32_t*>(running + 3 * S::COLUMNS),
      constants + kNear * S::COLUMNS};
  const int blocks = ceil_div(c.product.result_channels, S::COLUMNS);
  const Share share(blocks);
  for (int block = share.first; block < blocks; block += share.step) {
    const int column = block * S::COLUMNS;
    write_constants(c.epilogue, constants, column, S::COLUMNS);
    if (c.epilogue.reduce != Reduce::none) clear_running(sums, S::COLUMNS);
    for (int tile = share.lane; tile < c.class_tiles * c.classes[0] * c.classes[1]; tile += share.lanes) {
      const int kind = tile / c.class_tiles, start = tile % c.class_tiles * S::ROWS;
      const int row_class = kind / c.classes[1], column_class = kind % c.classes[1];
      const int image0 = divide(start, c.per_image), before = image0 * c.class_height * c.class_width;
      // a row's image from the tile's first and its place within the class; image -1: no pixel of the result
      const auto locate = [&](int row, int& image, int& h, int& w) {
        const int in_tile = start - before + row;
        image = divide(in_tile, c.per_image);
        const int in_image = in_tile - image * c.class_height * c.class_width;
        h = divide(in_image, c.per_row);
        w = in_image - h * c.class_width;
        if (image0 + image >= c.batch || h * c.classes[0] + row_class >= c.height ||
            w * c.classes[1] + column_class >= c.width)
          image = -1;
      };
      {
        ConvolutionLoader<S, TRANSPOSED> loader(c.product, column, image0, row_class, column_class);
        const Geometry& g = c.product.geometry;
        UNROLL for (int i = 0; i < loader.kEach; ++i) {
          int image, h, w;
          locate(loader.row(i), image, h, w);
          loader.set_row(i, image, TRANSPOSED ? h : h * g.stride[0], TRANSPOSED ? w : w * g.stride[1]);
        }
        Accumulators<S> acc;
        acc.clear();
        multiply<S>(acc, loader, loader.steps(), c.buffers, buffer_bytes<S>(with_y), c.tf32);
        store_results(acc);
      }
      finish_tile<S>(c.epilogue, constants, column, sums, [&](int row) -> int64_t {
        int image, h, w;
        locate(row, image, h, w);
        if (image < 0) return -1;
        return (static_cast<int64_t>(image0 + image) * c.height + h * c.classes[0] + row_class) * c.width +
               w * c.classes[1] + column_class;
      });
    }
    if (c.epilogue.reduce != Reduce::none)
      merge_workers(
          sums, c.epilogue.reduction, c.epilogue.reduce, block, share.lane, share.lanes, column, S::COLUMNS,
          c.product.result_channels);
  }
}

}  // namespace resnet_fused::cuda
