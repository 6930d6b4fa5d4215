#include "schedule.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../../block/integer_division.h"

namespace resnet_fused::cpu::engine {
namespace {

constexpr int64_t kUnlimited = int64_t{1} << 40;
// Bytes per cycle from the third cache or memory, for one of several threads; cycles until all threads have met.
constexpr double kBytesPerCycle = 8, kMeeting = 6000;
// The part of the second cache in which a block's weights stay from image to image.
constexpr double kHeldWeights = 0.6;
// Cores that others use are not equally fast: of a thread's jobs the last one is waited for by this part of its time;
// where all threads meet behind each convolution, by this part of all.
constexpr double kWaiting = 0.3, kWaitingTogether = 0.2;

// Winograd (winograd.h): the part of the second cache for V and the sums of the patches that are multiplied at once,
// and how many they are at least, since weights are read again for the next ones. From 14 to 100 made no difference on
// Zen 4.
constexpr double kPatchesCache = 0.5;
constexpr int64_t kFewestPatches = 28;
// Cycles of a patch beside its products, for each panel and for each input channel.
constexpr double kPatchOfPanel = 100, kPatchOfChannel = 3;

std::pair<int64_t, int64_t> as_pair(std::array<int64_t, 2> range) { return {range[0], range[1]}; }

class Planner {
 public:
  Planner(
      const std::vector<Shape>& chain, const Shape* projection, const Window* pool, int64_t images, Size input,
      bool transforms_x, const Machine& machine)
      : chain_(chain),
        projection_(projection),
        pool_(pool),
        all_images_(images),
        input_(input),
        transforms_x_(transforms_x),
        m_(machine) {}

  Schedule plan(int64_t images, int64_t parts, bool splits_outputs) const {
    Schedule s{};
    s.images = images;
    s.items = all_images_ / images;
    s.splits_outputs = splits_outputs;
    lay_out_all(s);
    s.pooled = pool_ ? pool_->output(s.layouts[last()].output) : s.layouts[last()].output;
    const int64_t height = s.pooled.height;
    int64_t band = images > 1 || splits_outputs ? height : band_rows(s);
    if (s.any_winograd()) band = std::min(height, round_up(band, 2));  // a patch has two rows
    if (s.layouts[0].kind == Layout::Kind::folded) {
      // for the first convolution: as many rows as a band can ask for, and the rows that two of its windows share
      int64_t from = 0, to = band;
      if (pool_) std::tie(from, to) = as_pair(pool_->covers(from, to));
      for (int64_t i = last(); i > 0; --i) std::tie(from, to) = as_pair(chain_[i].window.covers(from, to));
      const int64_t most = std::min(to - from, s.layouts[0].output.height);
      s.layouts[0] = lay_out(Layout::Kind::folded, chain_[0].window, input_, chain_[0].in, s.images, m_.step, most);
    }
    for (int64_t p = 0; p < parts; ++p) s.parts.push_back(part(s, p * height / parts, (p + 1) * height / parts, band));
    place_buffers(s, band);
    place_patches(s);
    s.cost = cost(s);
    return s;
  }

  int64_t last() const { return static_cast<int64_t>(chain_.size()) - 1; }

 private:
  const std::vector<Shape>& chain_;
  const Shape* projection_;
  const Window* pool_;
  int64_t all_images_;
  Size input_;
  bool transforms_x_;
  Machine m_;

  bool crowds(int64_t pitch) const { return m_.crowding > 0 && pitch % m_.crowding == 0; }

  void lay_out_all(Schedule& s) const {
    Size size = input_;
    for (int64_t i = 0; i <= last(); ++i) {
      const Shape& shape = chain_[i];
      Layout::Kind kind = shape.kind;
      // a tile that reads whole must not read beyond x
      const bool fits = !m_.whole_tiles || s.images * input_.pixels() >= m_.tile_rows;
      if (i == 0)
        s.reads_x =
            kind == Layout::Kind::pixels && !transforms_x_ && shape.in % m_.step == 0 && fits && !crowds(shape.in);
      if (i == 0 && kind == Layout::Kind::pixels && !s.reads_x) kind = Layout::Kind::columns;
      s.layouts.push_back(lay_out(kind, shape.window, size, shape.in, s.images, m_.step, 0, m_.crowding));
      size = s.layouts.back().output;
      s.winograd.push_back(shape.winograd && is_faster_by_winograd(shape, size));
    }
    if (projection_) {
      const Layout& beside = s.layouts[last()];
      s.projection_reads_x = projection_->kind == Layout::Kind::pixels && beside.kind == Layout::Kind::pixels &&
                             !transforms_x_ && projection_->in % m_.step == 0 && !crowds(projection_->in) &&
                             (!m_.whole_tiles || s.images * input_.pixels() >= m_.tile_rows);
      s.layouts.push_back(
          s.projection_reads_x
              ? lay_out(Layout::Kind::pixels, projection_->window, input_, projection_->in, s.images, m_.step)
              : columns_like(beside, projection_->window, input_, projection_->in, m_.step, m_.crowding));
    }
    for (int64_t i = 0; i <= last(); ++i) {
      std::vector<int32_t> target = s.layouts[i].pixel;
      if (i < last() && s.layouts[i + 1].kind == Layout::Kind::planes)
        for (auto& t : target)
          if (t >= 0) t = s.layouts[i + 1].place[t];
      s.targets.push_back(std::move(target));
    }
  }

  bool buffered(const Schedule& s, int64_t layout) const {
    if (layout == 0) return !s.reads_x;
    return layout <= last() || !s.projection_reads_x;
  }

  // The number of output rows for which a band's reads and writes fill half the second cache.
  int64_t band_rows(const Schedule& s) const {
    // Each band reads all weights. Vectors gain less from bands than weights cost that leave the cache between them.
    if (!m_.whole_tiles && weights(s) > kHeldWeights * static_cast<double>(m_.second_cache)) return s.pooled.height;
    double row = 0;  // bytes of one output row in everything that lives as long as the band
    const Layout& end = s.layouts[last()];
    const double height = static_cast<double>(s.pooled.height);
    row += static_cast<double>(input_.pixels() * chain_[0].in) / height;
    row += static_cast<double>(end.output.pixels() * chain_[last()].out) / height;
    for (size_t i = 0; i < s.layouts.size(); ++i)
      if (buffered(s, i)) row += static_cast<double>(s.layouts[i].positions * s.layouts[i].pitch) / height;
    const double rows = 0.5 * static_cast<double>(m_.second_cache) / (row * static_cast<double>(m_.element));
    const int64_t bands = std::max<int64_t>(1, static_cast<int64_t>(height / std::max(1.0, rows) + 0.999));
    return ceil_div(s.pooled.height, bands);
  }

  Part part(const Schedule& s, int64_t begin, int64_t end, int64_t band) const {
    Part steps;
    std::vector<int64_t> done(chain_.size(), 0);
    int64_t laid_out = 0;
    for (int64_t row = begin; row < end; row += band) {
      std::vector<Step> reversed;
      int64_t from = row, to = std::min(end, row + band);
      if (pool_) {
        const auto read = pool_->reads(from, to, s.layouts[last()].output.height);
        from = read[0];
        to = read[1];
      }
      for (int64_t i = last(); i >= 0; --i) {
        // what is pooled is kept for the band alone, and the rows that two bands read are computed twice
        if (row > begin && !(pool_ && i == last())) from = std::max(from, done[i]);
        if (from >= to) break;
        done[i] = to;
        const Layout& l = s.layouts[i];
        const bool reads_x = i == 0 && s.reads_x;
        const int64_t readable = reads_x ? s.images * input_.pixels() : kUnlimited;
        Step step{i, from, to, 0, 0, 0, 0, 0, {}, {}, {}};
        if (s.winograd[i]) add_patches(l, s.targets[i], step);
        if (!s.winograd[i] || (projection_ && i == last()))
          step.tiles = l.tiles(from, to, m_.tile_rows, m_.whole_tiles, readable);
        const auto [first, beyond] = l.window.reads(from, to, l.input.height);
        if (i == 0) {
          step.x_begin = row > begin ? std::max(first, laid_out) : first;
          step.x_end = beyond;
          laid_out = beyond;
          if (l.kind == Layout::Kind::folded) std::tie(step.x_begin, step.x_end) = as_pair(l.window.covers(from, to));
        }
        // pixels are kept for the band alone
        if (i < last() && s.layouts[i + 1].kind != Layout::Kind::planes) step.target_row = from;
        if (i == last() && pool_) {
          step.target_row = from;
          step.pool_begin = row;
          step.pool_end = std::min(end, row + band);
        }
        reversed.push_back(std::move(step));
        from = first;
        to = beyond;
      }
      for (auto each = reversed.rbegin(); each != reversed.rend(); ++each) steps.push_back(std::move(*each));
    }
    return steps;
  }

  static int64_t patches(Size output) { return ceil_div(output.height, 2) * ceil_div(output.width, 2); }

  // Cycles of all panels.
  static double winograd_cycles(const Shape& shape, int64_t patches) {
    const double of_panel = kPatch * static_cast<double>(shape.in + 8) + kPatchOfPanel;
    return static_cast<double>(patches) *
           (of_panel * static_cast<double>(shape.panels) + kPatchOfChannel * static_cast<double>(shape.in));
  }

  // Only the sizes decide, not the threads, so that these do not change a bit. Patches of smaller pictures would be
  // mostly padding; their sums are then no more exact than plain ones.
  bool is_faster_by_winograd(const Shape& shape, Size output) const {
    if (std::min(output.height, output.width) < 4) return false;
    const double direct = static_cast<double>(output.pixels() * (shape.products + 8) * shape.panels);
    return winograd_cycles(shape, patches(output)) < direct;
  }

  // Patches begin with even rows and columns, wherever the step does: so it does not change a bit.
  static void add_patches(const Layout& l, const std::vector<int32_t>& targets, Step& step) {
    for (int64_t y = step.begin / 2 * 2; y < step.end; y += 2)
      for (int64_t x = 0; x < l.output.width; x += 2)
        for (int64_t n = 0; n < l.images; ++n) {
          step.patches.push_back(static_cast<int32_t>(l.position(n, y, x)));
          for (int64_t i = 0; i < kOutputs; ++i) {
            const int64_t row = y + i / 2, column = x + i % 2;
            const bool exists = row >= step.begin && row < step.end && column < l.output.width;
            step.patch_targets.push_back(exists ? targets[l.position(n, row, column)] : -1);
          }
        }
  }

  void place_patches(Schedule& s) const {
    s.projected_buffer = s.scratch = round_up(s.scratch, 64);
    if (projection_ && s.winograd[last()]) {
      int64_t rows = 0;
      for (const Part& part : s.parts)
        for (const Step& step : part)
          if (step.conv == last()) rows = std::max(rows, step.end - step.begin);
      s.scratch += s.images * rows * s.layouts[last()].output.width * chain_[last()].out * 4;
    }
    s.winograd_buffer = s.scratch = round_up(s.scratch, 64);
    int64_t floats = 0;
    for (int64_t i = 0; i <= last(); ++i) {
      Patches& patches = s.patches.emplace_back();
      if (!s.winograd[i]) continue;
      const int64_t channels = s.layouts[i].pitch, bytes = (kPatch * channels + kPatch * kPanel) * 4;
      int64_t count = 0;
      for (const Part& part : s.parts)
        for (const Step& step : part)
          if (step.conv == i) count = std::max(count, static_cast<int64_t>(step.patches.size()));
      const int64_t most = std::max(kFewestPatches, static_cast<int64_t>(kPatchesCache * m_.second_cache) / bytes);
      const int64_t chunks = ceil_div(count, most);
      patches = {ceil_div(count, chunks), crowds(channels) ? channels + 16 : channels};
      const int64_t jobs = s.splits_outputs ? std::min(kShares * m_.threads, chain_[i].panels) : 1;
      floats = std::max(floats, (s.splits_outputs ? chunks : 1) * patches.transformed() + jobs * patches.sums());
    }
    s.scratch += floats * 4;
  }

  void place_buffers(Schedule& s, int64_t band) const {
    for (int64_t i = 0; i < static_cast<int64_t>(s.layouts.size()); ++i) {
      Layout& l = s.layouts[i];
      if (!buffered(s, i)) {
        s.buffers.push_back(-1);
        continue;
      }
      s.buffers.push_back(s.scratch);
      int64_t bytes = l.bytes(m_.element);
      if (l.kind == Layout::Kind::pixels && s.images == 1) {
        // the rows of the largest step that writes it
        int64_t rows = band;
        for (const Part& part : s.parts)
          for (const Step& step : part)
            if (step.conv == i - 1) rows = std::max(rows, step.end - step.begin);
        bytes = (rows * l.output.width + kTileRows) * l.pitch * m_.element;
      }
      // an odd number of cache lines apart, so that buffers do not meet in the same sets
      s.scratch += round_up(bytes + 64, 128) + 64;
    }
    if (!pool_) return;
    int64_t rows = 0;
    for (const Part& part : s.parts)
      for (const Step& step : part)
        if (step.conv == last()) rows = std::max(rows, step.end - step.begin);
    s.pool_buffer = s.scratch;
    s.scratch += s.images * rows * s.layouts[last()].output.width * chain_[last()].out * m_.element;
  }

  // Bytes of all weights.
  double weights(const Schedule& s) const {
    int64_t count = 0;
    for (size_t i = 0; i < chain_.size(); ++i) {
      const Shape& shape = chain_[i];
      count += (s.winograd[i] ? kPatch * shape.in : shape.products) * shape.panels * kPanel;
    }
    if (projection_) count += projection_->products * projection_->panels * kPanel;
    return static_cast<double>(count * m_.element);
  }

  double cost(const Schedule& s) const {
    const int64_t threads = m_.threads;
    double products = 0, streamed = 0;
    for (const Part& part : s.parts)
      for (const Step& step : part) {
        const Shape& shape = chain_[step.conv];
        double depth = static_cast<double>(shape.products);
        if (step.conv == last() && projection_) depth += static_cast<double>(projection_->products);
        double panels = static_cast<double>(shape.panels);
        if (s.splits_outputs) panels = static_cast<double>(ceil_div(shape.panels, threads));
        // a pair of tiles takes 64 cycles for 32 channels; a vector kernel one for each row and channel; and an
        // epilogue
        double cycles = 0;
        if (s.winograd[step.conv]) {
          cycles =
              winograd_cycles(shape, static_cast<int64_t>(step.patches.size())) / static_cast<double>(shape.panels);
          depth -= static_cast<double>(shape.products);  // of a projection; else there are no tiles
        }
        if (m_.whole_tiles)
          cycles += static_cast<double>((step.tiles.size() + 1) / 2) * (2 * depth + 100);
        else
          for (const Rows& t : step.tiles) cycles += (t.end - t.begin + 1) * (depth + 8);
        products += cycles * panels;
      }
    const double cache = static_cast<double>(m_.second_cache), weights = this->weights(s);
    const auto count = static_cast<double>(s.items * static_cast<int64_t>(s.parts.size()));
    const double each = std::max(1.0, static_cast<double>(ceil_div(static_cast<int64_t>(count), threads)));
    double inside = 0;  // bytes between the convolutions of one item
    for (size_t i = 0; i < s.layouts.size(); ++i)
      if (buffered(s, i)) inside += static_cast<double>(s.layouts[i].bytes(m_.element));
    // Tensors between convolutions that outgrow the cache are fetched again for every panel. Tiles are fetched whole,
    // and the processor has several of them in flight; vectors are fetched one value after the other.
    const bool fits = s.images == 1 || inside <= (m_.whole_tiles ? 0.7 : 0.3) * cache;
    const double again = fits ? 0 : inside * (m_.whole_tiles ? 2 : 16);
    if (s.splits_outputs) {
      // each thread reads its share of the weights once, and from the other cores everything that they have written
      streamed = weights / static_cast<double>(threads) + 3 * inside + (m_.whole_tiles ? 0 : again);
      const double item = products + streamed / kBytesPerCycle + static_cast<double>(chain_.size()) * kMeeting;
      return item * static_cast<double>(s.items) * (1 + kWaitingTogether);
    }
    streamed = weights * (weights > kHeldWeights * cache ? each : 1.0);
    streamed += again * each;
    const double cycles = products / static_cast<double>(s.parts.size()) * each + streamed / kBytesPerCycle;
    return cycles * (threads > 1 ? 1 + kWaiting / each : 1) + kMeeting;
  }
};

}  // namespace

Schedule make_schedule(
    const std::vector<Shape>& chain, const Shape* projection, const Window* pool, int64_t images, Size input,
    bool transforms_x, const Machine& machine) {
  const Planner planner(chain, projection, pool, images, input, transforms_x, machine);
  std::optional<Schedule> best;
  const auto consider = [&](Schedule found) {
    if (!best || found.cost < best->cost) best = std::move(found);
  };
  Size output = input;
  for (const Shape& shape : chain) output = shape.window.output(output);
  if (pool) output = pool->output(output);
  const bool folds = chain[0].kind == Layout::Kind::folded;  // its buffer is laid out for one image
  for (int64_t side = 1; side <= std::min<int64_t>(images, kTileRows); ++side) {
    if (images % side != 0 || (side > 1 && (pool || folds || output.pixels() > 400))) continue;
    consider(planner.plan(side, 1, false));
    if (machine.threads > 1 && !pool) consider(planner.plan(side, 1, true));
  }
  for (int64_t parts = 2; parts <= std::min(output.height, 2 * machine.threads); ++parts)
    if (images < 4 * machine.threads) consider(planner.plan(1, parts, false));
  return std::move(*best);
}

}  // namespace resnet_fused::cpu::engine
