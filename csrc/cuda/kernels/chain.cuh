// Evaluation in one piece: a worker computes all convolutions of a block for one tile of result pixels. The tensors
// between them stay in shared memory, with the halo that the next convolution reads, so no worker waits for another.
//
// The projection needs no result of its own: its product is added to the last convolution's, before the epilogue.
#pragma once

#include "convolution.cuh"

namespace resnet_fused::cuda {

// Chunks per row of a resident tensor [pixels of a region, channels padded to whole steps], laid out as a buffer is.
template <class T>
DEVICE int resident_chunks(int channels) {
  return ceil_div(channels, kDepth<T>) * 8;
}

// Operand A: a resident tensor, at the current tap. This lane's rows are those that its fragments take.
template <class S>
struct ResidentA {
  const char* base;
  const int (&rows)[S::M][2];
  int shift, chunk, chunks;

  DEVICE void fragment16(uint32_t (&a)[4], const Place<S>& place, int m, int k) const {
    ldmatrix(a, base + chunk_offset(rows[m][0] + shift, chunk + k * 2 + place.lane / 16, chunks));
  }
  DEVICE float value(const Place<S>& place, int m, int half, int depth) const {
    return *reinterpret_cast<const float*>(
        base + chunk_offset(rows[m][half] + shift, chunk + depth / 4, chunks) + depth % 4 * 4);
  }
};

// Loads weights only; A is resident.
template <class S>
struct ResidentLoader {
  using T = typename S::Value;
  static constexpr int kWeightEach = S::COLUMNS * 8 / kThreads;

  const Product& p;
  const char* resident;
  int region_width, column;  // of the source's region
  Taps<false> loading, multiplying;
  int rows[S::M][2];
  int shift = 0, chunk = 0, depth = 0;

  DEVICE ResidentLoader(const Product& p, const char* resident, int region_width, int column)
      : p(p),
        resident(resident),
        region_width(region_width),
        column(column),
        loading(p.geometry, 0, 0),
        multiplying(loading) {}

  // source_of(row): the row of the resident tensor under a result's first tap.
  template <class SourceOf>
  DEVICE void set_rows(const SourceOf& source_of) {
    const Place<S> place;
    UNROLL for (int m = 0; m < S::M; ++m) {
      const int row = place.row + m * 16;
      if constexpr (sizeof(T) == 2) {
        rows[m][0] = rows[m][1] = source_of(row + place.lane % 16);
      } else {
        rows[m][0] = source_of(row + place.lane / 4);
        rows[m][1] = source_of(row + place.lane / 4 + 8);
      }
    }
  }
  DEVICE int steps() const { return loading.count() * ceil_div(p.source.channels, kDepth<T>); }

  DEVICE void load(char* memory) {
    const int channels = p.source.channels, all = p.geometry.kernel[0] * p.geometry.kernel[1];
    const int c = loading.depth + thread_index() % 8 * kChunk<T>;
    UNROLL for (int i = 0; i < kWeightEach; ++i) {
      const int n = thread_index() / 8 + i * 32;
      const bool in = column + n < p.result_channels && c < channels;
      const int64_t from = (static_cast<int64_t>(column + n) * all + loading.index()) * channels + c;
      cp_async_16(
          memory + S::A_BYTES + chunk_offset(n, thread_index() % 8, 8),
          static_cast<const T*>(p.weight) + (in ? from : 0), in);
    }
    loading.next(kDepth<T>, channels);
  }
  DEVICE void finish(char*) {
    const Geometry& g = p.geometry;
    shift = multiplying.at[0] * g.dilation[0] * region_width + multiplying.at[1] * g.dilation[1];
    chunk = multiplying.depth / kChunk<T>;
    depth = least(kDepth<T>, p.source.channels - multiplying.depth);
    multiplying.next(kDepth<T>, p.source.channels);
  }
  DEVICE int substeps() const { return ceil_div(depth * static_cast<int>(sizeof(T)), 32); }
  DEVICE ResidentA<S> a(const char*) const {
    return {resident, rows, shift, chunk, resident_chunks<T>(p.source.channels)};
  }
  DEVICE BufferedB<S, false> b(const char* memory) const { return {memory + S::A_BYTES}; }
};

// Applies bias and activation to a tile of results and writes it to a resident tensor. Outside the picture it writes
// zero, as padding is; likewise beyond the last channel, where an infinity times an absent weight has made NaN.
// inside(row): whether a row of the region is a pixel of the picture.
template <class S, class Inside>
DEVICE void keep_results(const ChainStage& stage, char* resident, int first_row, int column, const Inside& inside) {
  using T = typename S::Value;
  constexpr int chunks = S::COLUMNS / kChunk<T>;
  const int at = thread_index() % chunks * kChunk<T>, to = (column + at) / kChunk<T>;
  float bias[kChunk<T>];
  UNROLL for (int i = 0; i < kChunk<T>; ++i) bias[i] = column + at + i < stage.product.result_channels
                                                           ? static_cast<float>(load(stage.bias, column + at + i, 0.0))
                                                           : 0.0f;
  const auto* results = reinterpret_cast<const float*>(work_memory());
  const int all = stage.rows[0] * stage.rows[1], width = resident_chunks<T>(stage.product.result_channels);
  sync_threads();  // the results are complete
  for (int row = thread_index() / chunks; row < S::ROWS && to < width; row += kThreads / chunks) {
    if (first_row + row >= all) break;
    Chunk<T> chunk;
    chunk.clear();
    if (inside(first_row + row) && column + at < stage.product.result_channels) {
      float v[kChunk<T>];
      UNROLL for (int i = 0; i < kChunk<T>; ++i) {
        v[i] = results[row * S::PITCH + at + i] + bias[i];
        if (stage.act.kind == ActivationKind::relu) v[i] = relu(v[i]);
      }
      if (!is_simple(stage.act)) {
        UNROLL for (int i = 0; i < kChunk<T>; ++i) {
          const double slope = load(stage.slopes, column + at + i, stage.act.parameter);
          v[i] = activate(stage.act.kind, v[i], static_cast<float>(slope));
        }
      }
      chunk.set(v);
    }
    chunk.store_shared(reinterpret_cast<T*>(resident + chunk_offset(first_row + row, to, width)));
  }
  sync_threads();  // the results' place is free, and the resident rows can be read
}

// Shared memory: buffers or results; the epilogue's constants; the resident tensors. Sets their places and returns the
// size in bytes.
template <class T>
inline int place_chain(Chain& c) {
  int end = products_bytes<Small<T>>(c.buffers, c.stage[0].product.source.y != nullptr);
  c.shared_constants = end;
  end += constant_bytes(Small<T>::COLUMNS);
  for (int j = 0; j + 1 < c.count; ++j) {
    ChainStage& stage = c.stage[j];
    stage.shared_offset = end = (end + 127) / 128 * 128;
    end += stage.rows[0] * stage.rows[1] * ((stage.product.result_channels + kDepth<T> - 1) / kDepth<T>)*128;
  }
  return end;
}

template <class T>
NOINLINE_DEVICE void chain() {
  const Chain& c = current_phase().chain;
  using S = Small<T>;
  auto* const constants = reinterpret_cast<float*>(work_memory() + c.shared_constants);
  const bool with_y = c.stage[0].product.source.y != nullptr;
  const int tiles = c.tiles[0] * c.tiles[1];
  for (int tile = worker_index(); tile < c.batch * tiles; tile += worker_count()) {
    const int image = divide(tile, c.tiles_per_image), in_image = tile - image * tiles;
    const int tile_row = divide(in_image, c.tiles_per_row);
    const ChainStage& last = c.stage[c.count - 1];
    // the first pixel of each stage's region, from the last back to the first
    int origin[Chain::kMost][2];
    int next[2] = {tile_row * last.rows[0], (in_image - tile_row * c.tiles[1]) * last.rows[1]};
    for (int j = Chain::kMost - 1; j >= 0; --j) {
      if (j >= c.count) continue;
      UNROLL for (int d = 0; d < 2; ++d) {
        origin[j][d] = next[d];
        next[d] = next[d] * c.stage[j].product.geometry.stride[d] - c.stage[j].product.geometry.padding[d];
      }
    }
    ROLLED for (int j = 0; j < c.count; ++j) {
      const ChainStage& stage = c.stage[j];
      const bool ends = j == c.count - 1;
      const int rows = stage.rows[0] * stage.rows[1];
      // the place of a region's row in its picture; false outside
      const auto locate = [&](int row, int& h, int& w) {
        const int in_region = divide(row, stage.per_row);
        h = origin[j][0] + in_region;
        w = origin[j][1] + row - in_region * stage.rows[1];
        return row < rows && h >= 0 && h < stage.size[0] && w >= 0 && w < stage.size[1];
      };
      for (int column = 0; column < stage.product.result_channels; column += S::COLUMNS) {
        if (ends) write_constants(c.epilogue, constants, column, S::COLUMNS);
        for (int first = 0; first < rows; first += S::ROWS) {
          Accumulators<S> acc;
          acc.clear();
          const auto from_memory = [&](const Product& p) {
            ConvolutionLoader<S, false> loader(p, column, image, 0, 0);
            UNROLL for (int i = 0; i < loader.kEach; ++i) {
              int h, w;
              const bool in = locate(first + loader.row(i), h, w);
              loader.set_row(i, in ? 0 : -1, h * p.geometry.stride[0], w * p.geometry.stride[1]);
            }
            multiply<S>(acc, loader, loader.steps(), c.buffers, buffer_bytes<S>(with_y), c.tf32);
          };
          if (j > 0) {
            const ChainStage& before = c.stage[j - 1];
            const Geometry& g = stage.product.geometry;
            ResidentLoader<S> loader(stage.product, work_memory() + before.shared_offset, before.rows[1], column);
            loader.set_rows([&](int row) {
              const int at = first + row < rows ? first + row : 0, h = divide(at, stage.per_row);
              return h * g.stride[0] * before.rows[1] + (at - h * stage.rows[1]) * g.stride[1];
            });
            multiply<S>(acc, loader, loader.steps(), c.buffers, buffer_bytes<S>(with_y), c.tf32);
          }
          // the same code for what comes from memory: the first convolution, and beside the last the projection
          if (j == 0) from_memory(stage.product);
          if (ends && c.projection.weight != nullptr) from_memory(c.projection);
          store_results(acc);
          if (ends) {
            finish_tile<S>(c.epilogue, constants, column, {}, [&](int row) -> int64_t {
              int h, w;
              if (!locate(first + row, h, w)) return -1;
              return (static_cast<int64_t>(image) * stage.size[0] + h) * stage.size[1] + w;
            });
          } else {
            keep_results<S>(stage, work_memory() + stage.shared_offset, first, column, [&](int row) {
              int h, w;
              return locate(row, h, w);
            });
          }
        }
      }
    }
  }
}

}  // namespace resnet_fused::cuda
