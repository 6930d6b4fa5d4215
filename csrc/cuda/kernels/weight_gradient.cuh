// The weight-gradient phase: dW[k, tap, c] = sum over pixels of dy[pixel, k] P[tap of pixel, c].
//
// The sum over pixels is split among workers. Each split writes a float32 partial; the worker that finishes a tile last
// adds the partials in the order of the splits, so the result is the same, bit for bit, in every run.
#pragma once

#include "barriers.cuh"
#include "operand.cuh"
#include "tile.cuh"

namespace resnet_fused::cuda {

// Operand A: dy, B: P, both [pixels, channels]; a step is kDepth pixels.
template <class S>
struct WeightGradientLoader {
  using T = typename S::Value;
  static constexpr int kDyChunks = S::ROWS / kChunk<T>, kDyEach = S::ROWS * 8 / kThreads;
  static constexpr int kChunks = S::COLUMNS / kChunk<T>, kEach = S::COLUMNS * 8 / kThreads;

  const WeightGradient& w;
  int row, column, tap[2];
  int64_t pixel;  // of the step that is loaded next
  int64_t end;
  int64_t multiplying;
  uint32_t inside = 0;  // which chunks of P lie inside, four bits per step
  int ahead = 0, depth = 0;

  DEVICE void load(char* buffer) {
    const Geometry& g = w.geometry;
    {
      const int chunk = thread_index() % kDyChunks, channel = row + chunk * kChunk<T>;
      UNROLL for (int i = 0; i < kDyEach; ++i) {
        const int r = thread_index() / kDyChunks + i * (kThreads / kDyChunks);
        const bool in = pixel + r < end && channel < w.dy.channels;
        const int64_t from = in ? (pixel + r) * w.dy.channels + channel : 0;
        char* to = buffer + chunk_offset(r, chunk, kDyChunks);
        cp_async_16(to, static_cast<const T*>(w.dy.x) + from, in);
        if (w.dy.y != nullptr) cp_async_16(to + S::STEP_BYTES, static_cast<const T*>(w.dy.y) + from, in);
      }
    }
    const int chunk = thread_index() % kChunks, channel = column + chunk * kChunk<T>;
    uint32_t bits = 0;
    UNROLL for (int i = 0; i < kEach; ++i) {
      const int r = thread_index() / kChunks + i * (kThreads / kChunks);
      bool in = pixel + r < end && channel < w.source.channels;
      int64_t from = 0;
      if (in) {
        const int p = static_cast<int>(pixel) + r, image = divide(p, w.per_image);
        const int in_image = p - image * (w.height * w.width), oh = divide(in_image, w.per_row);
        const int ow = in_image - oh * w.width;
        const int y = oh * g.stride[0] - g.padding[0] + tap[0] * g.dilation[0];
        const int x = ow * g.stride[1] - g.padding[1] + tap[1] * g.dilation[1];
        in = static_cast<unsigned>(y) < static_cast<unsigned>(w.source_height) &&
             static_cast<unsigned>(x) < static_cast<unsigned>(w.source_width);
        if (in)
          from =
              ((static_cast<int64_t>(image) * w.source_height + y) * w.source_width + x) * w.source.channels + channel;
      }
      cp_async_16(buffer + S::A_BYTES + chunk_offset(r, chunk, kChunks), static_cast<const T*>(w.source.x) + from, in);
      bits |= (in ? 1u : 0u) << i;
    }
    inside = inside << 4 | bits;
    pixel += kDepth<T>;
    ++ahead;
  }

  DEVICE void finish(char* buffer) {
    depth = end - multiplying < kDepth<T> ? static_cast<int>(end - multiplying) : kDepth<T>;
    --ahead;
    if (computed(w.dy)) {
      const int chunk = thread_index() % kDyChunks, channel = row + chunk * kChunk<T>;
      const auto at = [&](int i) { return thread_index() / kDyChunks + i * (kThreads / kDyChunks); };
      if (channel < w.dy.channels)
        compute_chunks<T, kDyEach>(
            w.dy, channel, S::STEP_BYTES, [&](int i) { return buffer + chunk_offset(at(i), chunk, kDyChunks); },
            [&](int i) { return multiplying + at(i) < end; });
    }
    if (computed(w.source)) {
      const int chunk = thread_index() % kChunks, channel = column + chunk * kChunk<T>;
      const uint32_t bits = inside >> (4 * ahead);
      if (channel < w.source.channels)
        compute_chunks<T, kEach>(
            w.source, channel, 0,
            [&](int i) {
              return buffer + S::A_BYTES +
                     chunk_offset(thread_index() / kChunks + i * (kThreads / kChunks), chunk, kChunks);
            },
            [&](int i) { return (bits >> i & 1u) != 0; });
    }
    multiplying += kDepth<T>;
  }

  DEVICE int substeps() const { return ceil_div(depth * static_cast<int>(sizeof(T)), 32); }
  DEVICE BufferedA<S, true> a(const char* buffer) const { return {buffer}; }
  DEVICE BufferedB<S, true> b(const char* buffer) const { return {buffer + S::A_BYTES}; }
};

template <class S>
constexpr int weight_gradient_bytes(int buffers, bool with_y) {
  const int products = buffers * (S::STEP_BYTES + (with_y ? S::A_BYTES : 0));
  return (products > S::RESULT_BYTES ? products : S::RESULT_BYTES) + 16;
}

template <class S>
NOINLINE_DEVICE void weight_gradient() {
  const WeightGradient& w = current_phase().weight_gradient;
  using T = typename S::Value;
  const bool with_y = w.dy.y != nullptr;
  auto* const flag = reinterpret_cast<int32_t*>(work_memory() + weight_gradient_bytes<S>(w.buffers, with_y) - 16);
  const int taps = w.geometry.kernel[0] * w.geometry.kernel[1];
  const int row_blocks = ceil_div(w.dy.channels, S::ROWS), column_blocks = ceil_div(w.source.channels, S::COLUMNS);
  const int tiles = row_blocks * taps * column_blocks;
  const int64_t pixels = static_cast<int64_t>(w.batch) * w.height * w.width;
  const int64_t steps_all = (pixels + kDepth<T> - 1) / kDepth<T>;
  const int64_t split_pixels = (steps_all + w.splits - 1) / w.splits * kDepth<T>;
  const int64_t size = static_cast<int64_t>(w.dy.channels) * taps * w.source.channels;
  // neighbouring workers take the tiles of the same pixels, which they find in the cache
  for (int item = worker_index(); item < tiles * w.splits; item += worker_count()) {
    const int split = item / tiles, tile = item % tiles;
    const int column = tile % column_blocks * S::COLUMNS, tap = tile / column_blocks % taps;
    const int row = tile / column_blocks / taps * S::ROWS;
    const int64_t begin = split * split_pixels;
    const int64_t end = begin + split_pixels < pixels ? begin + split_pixels : pixels;
    WeightGradientLoader<S> loader{w,     row, column, {tap / w.geometry.kernel[1], tap % w.geometry.kernel[1]},
                                   begin, end, begin};
    Accumulators<S> acc;
    acc.clear();
    const int steps = end > begin ? static_cast<int>((end - begin + kDepth<T> - 1) / kDepth<T>) : 0;
    multiply<S>(acc, loader, steps, w.buffers, S::STEP_BYTES + (with_y ? S::A_BYTES : 0), w.tf32);
    store_results(acc);
    sync_threads();
    // a warp's lanes take neighbouring columns; partials and results have the same layout
    const auto* results = reinterpret_cast<const float*>(work_memory());
    const auto each = [&](const auto& visit) {
      const int c = column + thread_index() % S::COLUMNS;
      for (int r = thread_index() / S::COLUMNS; r < S::ROWS; r += kThreads / S::COLUMNS)
        if (row + r < w.dy.channels && c < w.source.channels)
          visit(
              (static_cast<int64_t>(row + r) * taps + tap) * w.source.channels + c,
              results[r * S::PITCH + thread_index() % S::COLUMNS]);
    };
    T* const out = static_cast<T*>(w.dweight);
    if (w.splits == 1) {
      each([&](int64_t at, float v) { out[at] = from_float<T>(v); });
    } else {
      each([&](int64_t at, float v) { w.partials[split * size + at] = v; });
      if (arrives_last(w.tickets + tile, w.splits, flag))
        each([&](int64_t at, float) {
          float total = 0.0f;
          UNROLL_4 for (int i = 0; i < w.splits; ++i) total += w.partials[i * size + at];
          out[at] = from_float<T>(total);
        });
    }
    sync_threads();  // the results' place is free
  }
}

}  // namespace resnet_fused::cuda
