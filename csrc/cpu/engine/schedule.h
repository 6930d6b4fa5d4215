// How one block is computed for one input size: the layout of every convolution's input, and which thread computes what
// in which order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "caches.h"
#include "layout.h"
#include "winograd.h"

namespace resnet_fused::cpu::engine {

// Jobs for each thread into which one piece of work is cut.
constexpr int64_t kShares = 4;

// What a schedule needs to know of a convolution.
struct Shape {
  Window window;
  int64_t groups;
  int64_t in, out;           // channels
  Layout::Kind kind;         // of its input; the projection's is columns, or pixels where the last one's is
  int64_t panels, products;  // of weights; channels that are multiplied for each output, padded
  bool winograd;             // whether it may be computed as winograd.h does
};

// One convolution of some output rows, after the input rows it reads have been laid out.
struct Step {
  int64_t conv;
  int64_t begin, end;            // output rows
  int64_t x_begin, x_end;        // x's rows to lay out first; of the first convolution
  int64_t target_row;            // the output buffer begins with this row
  int64_t pool_begin, pool_end;  // rows of the pooling behind the last convolution
  std::vector<Rows> tiles;
  // By Winograd (winograd.h); tiles are then of a projection alone.
  std::vector<int32_t> patches, patch_targets;
};

// What one thread computes without waiting for another: rows of some images, band by band through all convolutions, so
// that the tensors between them stay in its cache.
using Part = std::vector<Step>;

// How many patches of a convolution are multiplied at once, so that they stay in the second cache (winograd.h).
struct Patches {
  int64_t at_once, pitch;
  int64_t plane() const { return at_once * pitch + 16; }  // a line apart
  int64_t transformed() const { return kPatch * plane(); }
  int64_t sums() const { return kPatch * at_once * kPanel; }
};

struct Schedule {
  int64_t images;  // of an item, laid out side by side
  int64_t items;
  std::vector<Part> parts;  // of each item
  bool splits_outputs;      // one item after another, of one part: the threads share each convolution's outputs
  bool reads_x;             // the first convolution reads x itself
  bool projection_reads_x;
  std::vector<Layout> layouts;                // of each convolution of the chain, then the projection
  std::vector<bool> winograd;                 // which convolutions of the chain are computed so
  std::vector<std::vector<int32_t>> targets;  // of each convolution of the chain: where its positions go
  std::vector<int64_t> buffers;  // byte offset of each layout's buffer in a thread's scratch; of x itself: -1
  Size pooled;                   // the result's size
  int64_t pool_buffer;           // byte offset of what is pooled
  std::vector<Patches> patches;  // of each convolution of the chain
  int64_t projected_buffer;      // byte offset of the projection's product beside a last convolution by Winograd
  int64_t winograd_buffer;  // byte offset of all V of a step where outputs are split, else of one; then of the sums
  int64_t scratch;          // bytes
  double cost;              // cycles of the slowest thread, estimated

  bool any_winograd() const { return std::find(winograd.begin(), winograd.end(), true) != winograd.end(); }
};

struct Machine {
  int64_t threads;
  int64_t second_cache;  // bytes of each core
  int64_t tile_rows;
  bool whole_tiles;
  int64_t element, step;  // bytes; what depth is a multiple of
  int64_t crowding;       // elements from a row of a tile to the next at which rows leave the first cache to each other
};

// This machine, where `threads` multiply P.
template <class P>
Machine machine_for(int64_t threads) {
  const auto& p = products<P>();
  constexpr int64_t page = 4096;  // the distance of lines that share a set
  // Measured on Zen 4, whose sets have 8 lines, 1,024 to 256 channels of float32: 80 GFLOP/s on one core, and 109 with
  // such rows a line further apart. Tiles have not been measured.
  const bool crowds = !p.reads_whole_tiles && p.tile_rows > first_cache_ways();
  return {
      threads,
      second_cache(),
      p.tile_rows,
      p.reads_whole_tiles,
      static_cast<int64_t>(sizeof(P)),
      kDepthStep<P>,
      crowds ? page / static_cast<int64_t>(sizeof(P)) : 0};
}

// chain: without the projection; projection, pool: nullptr for none. Pooling takes a block without a skip path.
// transforms_x: x has to pass through a norm or an activation before the first convolution.
Schedule make_schedule(
    const std::vector<Shape>& chain, const Shape* projection, const Window* pool, int64_t images, Size input,
    bool transforms_x, const Machine& machine);

}  // namespace resnet_fused::cpu::engine
