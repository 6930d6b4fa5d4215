// Products by vector instructions: a tile of positions times a panel, or a part of one, stays in registers while a
// chunk of the depth is multiplied. Included once per instruction set.
//
// All tiles of a block pass before the next chunk, so that the chunk's weights come from the first cache, and the next
// chunk's arrive in the second meanwhile.

#include "vector_tile_impl.h"
#include "winograd_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Factor;
using engine::Task;

constexpr int64_t kBlockTiles = 16;         // at most, so that their sums stay in the first cache
constexpr int64_t kBlockBytes = 768 << 10;  // of their input, which stays in the second

// The depth of a panel's products, chunk by chunk.
template <class T>
class Chunks {
 public:
  Chunks(const Factor<T>* two, int64_t panel) : factors_(two), panel_(panel) { skip_ends(); }

  bool more() const { return factor_ < 2; }
  void take() {
    count_ = steps_ = 0;
    for (int64_t left = kChunk<T>; left > 0 && more(); skip_ends()) {
      const Factor<T>& f = factors_[factor_];
      const int64_t rest = f.depth - channel_, channels = rest < left ? rest : left;
      runs_[count_++] = {
          f.input + (f.first_channel ? f.first_channel[panel_] : 0) + f.taps[tap_] + channel_, f.pitch,
          f.weights + ((panel_ * f.tap_count + tap_) * f.depth + channel_) * kPanel, channels};
      left -= channels;
      channel_ += channels;
      steps_ += channels / kStep<T>;
    }
  }
  int64_t steps() const { return steps_; }
  const Run<T>* begin() const { return runs_; }
  const Run<T>* end() const { return runs_ + count_; }

 private:
  // Turns the end of a tap or factor into the beginning of the next.
  void skip_ends() {
    if (more() && channel_ == factors_[factor_].depth) {
      ++tap_;
      channel_ = 0;
    }
    for (; more() && tap_ == factors_[factor_].tap_count; ++factor_) tap_ = 0;
  }

  const Factor<T>* factors_;
  int64_t panel_, tap_ = 0, channel_ = 0;
  int factor_ = 0;
  Run<T> runs_[kChunk<T> / engine::kDepthStep<T>];
  int64_t count_ = 0, steps_ = 0;
};

// How many tiles pass each chunk of weights.
template <class T, class Out>
static int64_t tiles_at_once(const Task<T, Out>& task) {
  int64_t depth = 0;
  for (const Factor<T>& f : task.factors) depth += f.tap_count * f.depth;
  if (depth < kChunk<T> && task.panels_inner) return 1;  // weights wait in the second cache, the tile in the first
  const int64_t bytes = kVectorRows * task.factors[0].pitch * static_cast<int64_t>(sizeof(T));
  const int64_t most = kBlockBytes / bytes, held = most < 1 ? 1 : most > kBlockTiles ? kBlockTiles : most;
  const int64_t blocks = (task.row_count + held - 1) / held;
  return (task.row_count + blocks - 1) / blocks;
}

template <class T, class Out>
static void multiply(const Task<T, Out>& task) {
  const Epilogue<Out>& e = task.epilogue;
  with_finish(e, [&](auto finish) {
    using Finish = decltype(finish);
    alignas(64) float sums[kBlockTiles][kVectorRows * kPanel];
    const int64_t at_once = tiles_at_once(task);
    const engine::Rows* end = task.rows + task.row_count;
    for (const engine::Rows* block = task.rows; block < end; block += at_once) {
      const int64_t rest = end - block, count = rest < at_once ? rest : at_once;
      constexpr int64_t passes = kPanel / kColumns;  // of a tile
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        const int64_t channel = panel * kPanel;
        // The first panel meanwhile fetches the next block's input, or the next band's, where few channels of it lie in
        // memory; the others the weights that come next.
        const Factor<T>& f = task.factors[0];
        const bool fetches_input = task.prefetches && f.depth <= kChunk<T> && panel == task.panel_begin;
        const char* next =
            reinterpret_cast<const char*>(f.input + (block[count - 1].first + block[count - 1].end) * f.pitch);
        int64_t stride = kVectorRows * kStep<T> * static_cast<int64_t>(sizeof(T)) / passes;
        bool adds = false;
        for (Chunks<T> chunks(task.factors, panel); chunks.more(); adds = true) {
          chunks.take();
          if (!fetches_input) {
            next = reinterpret_cast<const char*>(chunks.begin()->weights) + chunks.steps() * kBytesOfStep;
            stride = (kBytesOfStep + count * passes - 1) / (count * passes);
          }
          const MultiplyTile<T>* multiply_tile = kMultiplyTile<T, Unfinished>;
          bool finishes = !chunks.more();
          if constexpr (kFinishesTile<Finish>)
            if (finishes && channel + kPanel <= e.channels) {
              multiply_tile = kMultiplyTile<T, Finish>;
              finishes = false;
            }
          for (int64_t i = 0; i < count; ++i) {
            const int height = block[i].end - block[i].begin, first = block[i].first + block[i].begin;
            FinishedTile<Out> tile{{0, adds, sums[i]}, e, channel, e.target + first};
            for (; tile.column < kPanel; tile.column += kColumns, next += stride * chunks.steps())
              multiply_tile[height](chunks.begin(), chunks.end(), first, tile, next, stride);
            if (finishes) finish_rows<Finish>(sums[i], e, channel, tile.target, 0, height);
          }
        }
      }
    }
  });
}

template <class T, class Out>
static constexpr const engine::Winograd<Out>* kWinogradOf = nullptr;
template <class Out>
static constexpr const engine::Winograd<Out>* kWinogradOf<float, Out> = &kWinograd<Out>;

template <class T, class Out = T>
static constexpr engine::Products<T, Out> kVectorProducts{kVectorRows, false, &multiply<T, Out>, kWinogradOf<T, Out>};

}  // namespace resnet_fused::cpu::KERNELS_ISA
