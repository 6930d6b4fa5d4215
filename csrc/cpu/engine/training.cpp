#include "training.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "../../block/integer_division.h"
#include "../isa.h"
#include "../merged_statistics.h"
#include "../share_out.h"
#include "caches.h"
#include "fill.h"
#include "memory.h"
#include "pack.h"
#include "rounding.h"
#include "schedule.h"
#include "weight_gradient.h"
#include "winograd_step.h"

namespace resnet_fused::cpu::engine {
namespace {

Window window_of(const at::Tensor& weight, const Stage& stage) {
  return {{weight.size(2), weight.size(3)}, stage.stride, stage.padding, stage.dilation};
}

// In one dimension, the gradient of those inputs that one phase of the stride gives: a convolution of stride 1 over the
// outputs' gradients by the taps of this phase, last one first. Its result u belongs to input first + stride u, if
// there is one.
struct Phase {
  std::vector<int64_t> taps;
  int64_t dilation, padding, first, stride;
};

std::vector<Phase> phases(const Window& w, int d, int64_t in, int64_t out) {
  const int64_t stride = w.stride[d], padding = w.padding[d], dilation = w.dilation[d];
  std::vector<Phase> all;
  for (int64_t c = 0; c < stride; ++c) {
    // input stride t + c - padding reads output t - m by the m-th tap of the phase, or t - m dilation without a stride
    Phase phase{{}, dilation, 0, 0, stride};
    for (int64_t k = w.kernel[d] - 1; k >= 0; --k)
      if (k % stride == c) phase.taps.push_back(k);
    const int64_t reach = dilation * (static_cast<int64_t>(phase.taps.size()) - 1);
    const int64_t begin = std::max<int64_t>(0, ceil_div(padding - c, stride)), last = in - 1 + padding - c;
    if (last < 0 || last / stride < begin) continue;
    phase.padding = std::max({int64_t{0}, reach - begin, last / stride + 1 - out});
    phase.first = stride * (reach - phase.padding) + c - padding;
    all.push_back(std::move(phase));
  }
  return all;
}

std::vector<Tap> all_taps(const Window& w) {
  std::vector<Tap> taps;
  for (int64_t r = 0; r < w.kernel[0]; ++r)
    for (int64_t s = 0; s < w.kernel[1]; ++s) taps.push_back({r, s});
  return taps;
}

// Of floats the engine convolves by Winograd alone, and padding of a pixel gives both directions the same window.
bool by_winograd(const at::Tensor& weight, const Stage& stage) {
  const Window window = window_of(weight, stage);
  return window.fits_winograd() && window.padding == std::array<int64_t, 2>{1, 1};
}

template <class T>
Shape shape_of(const Window& window, int64_t in, int64_t out, const Packed& packed) {
  const auto kind = window.is_pixel()                                ? Layout::Kind::pixels
                    : window.kernel[0] == 1 && window.kernel[1] == 1 ? Layout::Kind::columns
                                                                     : Layout::Kind::planes;
  return {window, 1, in, out, kind, packed.panels, packed.taps * packed.depth, std::is_same_v<T, float>};
}

// Schedules by everything that decides them. They are made anew when there are too many: sizes that do not recur must
// not be kept for ever.
template <class T>
std::shared_ptr<const Schedule> schedule_of(const Shape& shape, const Batch& batch, bool made) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, std::shared_ptr<const Schedule>> kept;
  const auto& w = shape.window;
  const int64_t threads = at::get_num_threads();
  const std::vector<int64_t> key{w.kernel[0],  w.kernel[1],       w.stride[0],      w.stride[1], w.padding[0],
                                 w.padding[1], w.dilation[0],     w.dilation[1],    shape.in,    shape.out,
                                 batch.images, batch.size.height, batch.size.width, made,        threads};
  const std::lock_guard lock(mutex);
  if (const auto found = kept.find(key); found != kept.end()) return found->second;
  if (kept.size() > 512) kept.clear();
  const Machine machine = machine_for<T>(threads);
  return kept[key] = std::make_shared<Schedule>(
             make_schedule({shape}, nullptr, nullptr, batch.images, batch.size, made, machine));
}

// One convolution of a whole batch.
template <class T>
class Pass {
 public:
  // The pointers of `epilogue` are those of the first image. gathered: floats for each step and output.
  Pass(
      const Shape& shape, const Batch& batch, const Operand<T>& from, const Packed& packed, const Epilogue<T>& epilogue,
      int64_t gathered)
      : shape_(shape),
        from_(from),
        packed_(packed),
        epilogue_(epilogue),
        schedule_(schedule_of<T>(shape, batch, !from.is_given() && !prepares())),
        s_(*schedule_),
        steps_(0),
        target_(s_.targets[0].data()),
        pixels_(s_.layouts[0].output.pixels()),
        width_(gathered * packed.panels * kPanel) {
    if constexpr (std::is_same_v<T, float>)
      if (s_.winograd[0]) windows_ = pack_winograd(packed, false);
    for (const Part& part : s_.parts) steps_ = std::max(steps_, static_cast<int64_t>(part.size()));
    const int64_t count = s_.items * static_cast<int64_t>(s_.parts.size()) * steps_;
    if (gathered > 0) {
      sums_.assign(count * width_, 0.0f);
      rows_.assign(count * packed.panels, 0);
    }
  }

  // Results at (y, x) go to (first + stride (y, x)) of pictures of this size, or nowhere.
  void scatter(Size size, std::array<int64_t, 2> first, std::array<int64_t, 2> stride) {
    const Size own = layout().output;
    pixels_ = size.pixels();
    if (own.height == size.height && own.width == size.width && first == std::array<int64_t, 2>{} && stride[0] == 1 &&
        stride[1] == 1)
      return;
    scattered_ = layout().pixel;
    for (auto& at : scattered_) {
      if (at < 0) continue;
      const int64_t image = at / own.pixels(), pixel = at % own.pixels();
      const int64_t y = first[0] + stride[0] * (pixel / own.width), x = first[1] + stride[1] * (pixel % own.width);
      const bool within = y >= 0 && y < size.height && x >= 0 && x < size.width;
      at = within ? static_cast<int32_t>(image * pixels_ + y * size.width + x) : -1;
    }
    target_ = scattered_.data();
  }

  // Whether `made` will be given all rows that are made.
  bool hand_to(const Made<T>& made) {
    if (s_.reads_x || s_.splits_outputs || from_.kept() || !shape_.window.is_pixel()) return false;
    if (layout().pitch != layout().channels) return false;
    made_ = &made;
    return true;
  }

  void run() {
    // rows that two parts of an image read must not be made twice
    if (from_.kept() && !prepares() && s_.parts.size() > 1) make_all();
    if (s_.splits_outputs)
      together();
    else
      apart();
  }

  // Whether all results are to be used: by Winograd where all sums were finite.
  bool finite() const { return !wild_; }

  // body(rows, sums) for every step that has any, in order
  template <class Body>
  void each_gathered(const Body& body) const {
    const int64_t parts = static_cast<int64_t>(s_.parts.size());
    for (int64_t i = 0; i < s_.items * parts; ++i)
      for (size_t step = 0; step < s_.parts[i % parts].size(); ++step) {
        const int64_t at = i * steps_ + static_cast<int64_t>(step);
        body(rows_[at * packed_.panels], sums_.data() + at * width_);
      }
  }

 private:
  const Shape& shape_;
  Operand<T> from_;
  const Packed& packed_;
  const Epilogue<T>& epilogue_;
  std::shared_ptr<const Schedule> schedule_;
  const Schedule& s_;
  int64_t steps_;
  std::vector<int32_t> scattered_;
  const int32_t* target_;  // of each position
  int64_t pixels_;         // of a picture of results
  int64_t width_;
  const Made<T>* made_ = nullptr;
  std::vector<float> sums_;
  std::vector<int32_t> rows_;
  Packed windows_{};  // by Winograd
  std::atomic<bool> wild_{false};

  const Layout& layout() const { return s_.layouts[0]; }
  // Whether products read what is kept, just behind its making. A tile may read beyond it, but gives no results there.
  bool prepares() const { return from_.kept() && shape_.window.is_pixel(); }

  void make_all() {
    const Layout& l = layout();
    const int64_t rows = s_.items * l.images * l.input.height, width = l.input.width;
    for_each_job(rows, [&](int64_t row) { from_.pixels(row * width, width, nullptr); });
    from_ = Operand<T>(from_.kept(), from_.channels());
  }
  // A buffer of columns holds a band.
  int64_t origin(const Step& step) const {
    const Layout& l = layout();
    return l.kind == Layout::Kind::columns && l.images == 1 ? step.begin * l.row : 0;
  }

  void apart() {
    const int64_t parts = static_cast<int64_t>(s_.parts.size()), count = s_.items * parts;
    const int64_t jobs = made_ ? std::min(made_->slots, count) : count;
    share_out(jobs, [&](int64_t thread) {
      T* buffer = reinterpret_cast<T*>(scratch(s_.scratch));
      clear_padding(buffer);
      return [&, buffer, thread](int64_t job) {
        for (int64_t i = job * count / jobs; i < (job + 1) * count / jobs; ++i) {
          const Part& part = s_.parts[i % parts];
          for (size_t step = 0; step < part.size(); ++step) {
            fill(buffer, i / parts, part[step], part[step]);
            if (made_) hand(buffer, i / parts, part[step], thread, job);
            if (s_.winograd[0])
              multiply_patches(buffer, i / parts, part[step]);
            else
              multiply(buffer, i / parts, i * steps_ + static_cast<int64_t>(step), part[step], 0, packed_.panels);
          }
        }
      };
    });
  }

  void together() {
    T* buffer = reinterpret_cast<T*>(scratch(s_.scratch));
    clear_padding(buffer);
    const int64_t threads = at::get_num_threads(), shares = std::min(kShares * threads, packed_.panels);
    for (int64_t item = 0; item < s_.items; ++item) {
      const Part& part = s_.parts[0];
      for (size_t index = 0; index < part.size(); ++index) {
        const Step& step = part[index];
        if (!s_.reads_x || prepares())
          for_each_job(threads, [&](int64_t t) {
            const auto share = [&](int64_t begin, int64_t end, int64_t n) {
              return begin + n * (end - begin) / threads;
            };
            Step own = step;
            own.x_begin = share(step.x_begin, step.x_end, t);
            own.x_end = share(step.x_begin, step.x_end, t + 1);
            own.begin = share(step.begin, step.end, t);
            own.end = share(step.begin, step.end, t + 1);
            fill(buffer, item, own, step);
          });
        if (s_.winograd[0]) {
          multiply_patches(buffer, item, step);
          continue;
        }
        for_each_job(shares, [&](int64_t t) {
          multiply(
              buffer, item, item * steps_ + static_cast<int64_t>(index), step, t * packed_.panels / shares,
              (t + 1) * packed_.panels / shares);
        });
      }
    }
  }

  void clear_padding(T* buffer) const {
    for (const int32_t position : layout().zeros)
      std::memset(buffer + position * layout().pitch, 0, layout().pitch * sizeof(T));
  }

  // What the step reads of x, or a share of it.
  void fill(T* buffer, int64_t item, const Step& share, const Step& whole) const {
    const Layout& l = layout();
    if (prepares() && s_.reads_x)
      for (int64_t n = 0; n < l.images; ++n)
        from_.pixels(
            (item * l.images + n) * l.input.pixels() + share.begin * l.input.width,
            (share.end - share.begin) * l.input.width, nullptr);
    if (s_.reads_x) return;
    for (int64_t n = 0; n < l.images; ++n) {
      const int64_t image = item * l.images + n;
      if (l.kind == Layout::Kind::planes)
        fill_planes(from_, l, n, image, share.x_begin, share.x_end, buffer);
      else
        fill_columns(from_, l, l, n, image, share.begin, share.end, buffer, origin(whole));
    }
  }

  void hand(const T* buffer, int64_t item, const Step& step, int64_t thread, int64_t slot) const {
    const Layout& l = layout();
    const bool band = l.images == 1;
    const int64_t width = l.input.width, first = item * l.images * l.input.pixels() + (band ? step.begin * width : 0);
    const int64_t count = band ? (step.end - step.begin) * width : l.images * l.input.pixels();
    made_->take(thread, slot, first, count, buffer);
  }

  // That of pictures of results as large as the inputs, whose targets are the step's.
  void multiply_patches(T* buffer, int64_t item, const Step& step) {
    if constexpr (std::is_same_v<T, float>)
      if (!engine::multiply_patches(
              s_, 0, step, buffer, windows_, reinterpret_cast<unsigned char*>(buffer), epilogue(item)))
        wild_ = true;
  }

  Epilogue<T> epilogue(int64_t item) const {
    Epilogue<T> e = epilogue_;
    const int64_t shift = item * layout().images * pixels_ * shape_.out;
    e.out += shift;
    if (e.residual) e.residual += shift;
    if (e.behind.y) e.behind.y += shift;
    e.pitch = e.channels = shape_.out;
    if (e.residual) e.ahead = 2 * products<T>().tile_rows * e.pitch;
    e.target = target_;
    return e;
  }

  void multiply(T* buffer, int64_t item, int64_t at, const Step& step, int64_t panel_begin, int64_t panel_end) {
    const Layout& l = layout();
    Task<T> task{};
    auto& f = task.factors[0];
    f.pitch = l.pitch;
    f.taps = l.taps.data();
    f.tap_count = packed_.taps;
    f.depth = packed_.depth;
    f.weights = reinterpret_cast<const T*>(packed_.memory.get());
    const int64_t first = item * l.images * l.input.pixels();
    f.input = !s_.reads_x  ? buffer - origin(step) * l.pitch
              : prepares() ? from_.kept() + first * l.channels
                           : from_.pixels(first, 0, nullptr);
    task.rows = step.tiles.data();
    task.row_count = static_cast<int64_t>(step.tiles.size());
    task.panel_begin = panel_begin;
    task.panel_end = panel_end;
    task.panels_inner = shape_.products * kPanel * (panel_end - panel_begin) * static_cast<int64_t>(sizeof(T)) <=
                        second_cache() * 3 / 4;
    task.prefetches = s_.reads_x && !prepares();
    auto& e = task.epilogue = epilogue(item);
    if (width_ > 0) {
      e.sums = sums_.data() + at * width_;
      e.rows = rows_.data() + at * packed_.panels;
    }
    products<T>().multiply(task);
  }
};

template <class T>
std::vector<float> padded_bias(const std::optional<at::Tensor>& bias, int64_t length) {
  std::vector<float> values(length, 0.0f);
  if (bias) {
    const auto flat = bias->to(at::kFloat).contiguous();
    std::copy_n(flat.template const_data_ptr<float>(), flat.numel(), values.begin());
  }
  return values;
}

}  // namespace

std::optional<std::string> reason_against_convolving(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  if (dtype != at::kFloat || !by_winograd(weight, stage))
    if (const auto reason = reason_against_training(weight, dtype)) return reason;
  if (weight.scalar_type() != dtype || weight.layout() != at::kStrided)
    return std::string("the weight is no ") + c10::toString(dtype) + " tensor";
  if (stage.groups != 1) return "groups";
  if (stage.pads_values()) return "the engine pads with zeros only";
  if (weight.size(0) % kPanel != 0 || weight.size(1) % kPanel != 0)
    return std::to_string(weight.size(1)) + " to " + std::to_string(weight.size(0)) + " channels, no multiples of 32";
  return std::nullopt;
}

std::optional<std::string> reason_against_data_gradient(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  for (int d = 0; d < 2; ++d)
    if (stage.stride[d] > 1 && stage.dilation[d] > 1 && weight.size(2 + d) > 1) {
      const auto reason = reason_against_convolving(weight, stage, dtype);
      return reason ? reason : "a stride and a dilation";
    }
  return reason_against_convolving(weight, stage, dtype);
}

bool is_small(const Batch& batch, int64_t channels) {
  return batch.images == 0 || std::min(batch.size.height, batch.size.width) < 4 ||
         (batch.images == 1 && channels * batch.size.pixels() <= 20480);
}

Batch batch_of(const at::Tensor& p) { return {p.size(0), {p.size(2), p.size(3)}}; }

template <class T>
Convolved convolve(
    const Operand<T>& p, const Batch& batch, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const Stage& stage, bool statistics) {
  if (std::is_same_v<T, float> && is_small(batch, weight.size(1))) return {};
  if (std::is_same_v<T, float>) statistics = false;  // of sums in float they would be less exact than eager's
  const Window window = window_of(weight, stage);
  const Packed packed = pack_taps<T>(weight, all_taps(window), false);
  if (!packed.finite) return {};
  const int64_t out = weight.size(0);
  const Shape shape = shape_of<T>(window, weight.size(1), out, packed);
  const Size size = shape.window.output(batch.size);
  Convolved result;
  result.y = reused_empty(batch.images, out, size.height, size.width, scalar_type(T{}));
  const auto shift = padded_bias<T>(bias, packed.panels * kPanel);
  const std::vector<float> ones(packed.panels * kPanel, 1.0f);
  Epilogue<T> e;
  e.scale = ones.data();
  e.shift = shift.data();
  e.out = static_cast<T*>(result.y.mutable_data_ptr());
  if (statistics) e.gathers = Gathers::statistics;
  Pass<T> pass(shape, batch, p, packed, e, statistics ? 3 : 0);
  pass.run();
  if (!pass.finite()) return {};
  if (!statistics) return result;
  MergedStatistics merged(out);
  pass.each_gathered([&](int64_t rows, const float* sums) {
    merged.add(static_cast<double>(rows), [&](int64_t c) {
      const float* s = sums + c / kPanel * 3 * kPanel + c % kPanel;
      const double sum = s[kPanel], offset = sum / static_cast<double>(rows);
      return std::pair(s[0] + offset, std::max(0.0, s[2 * kPanel] - sum * offset));
    });
  });
  result.statistics =
      at::empty({2, out}, weight.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  float* mean = result.statistics.template mutable_data_ptr<float>();
  merged.write(mean, mean + out);
  return result;
}

namespace {

template <class T>
NormGradient backward(
    const Operand<T>& dy, const Batch& batch, const at::Tensor& weight, const Stage& stage,
    const at::Tensor& accumulated, const Differentiated<T>* behind, const Made<T>& made) {
  const int64_t in = weight.size(0), out = weight.size(1), padded = round_up(out, kPanel);
  if (std::is_same_v<T, float> && is_small(batch, out)) return {};
  const Window window = window_of(weight, stage);
  const Size size = window.output(batch.size);
  const auto lines = phases(window, 0, batch.size.height, size.height),
             columns = phases(window, 1, batch.size.width, size.width);
  struct OfPhase {
    const Phase &line, &column;
    Packed packed;
  };
  std::vector<OfPhase> products;
  bool reaches_all = lines.size() == static_cast<size_t>(std::min(window.stride[0], batch.size.height)) &&
                     columns.size() == static_cast<size_t>(std::min(window.stride[1], batch.size.width));
  for (const Phase& line : lines)
    for (const Phase& column : columns) {
      std::vector<Tap> taps;
      for (const int64_t r : line.taps)
        for (const int64_t s : column.taps) taps.push_back({r, s});
      if (taps.empty()) {
        reaches_all = false;
        continue;
      }
      products.push_back({line, column, pack_taps<T>(weight, taps, true)});
      if (!products.back().packed.finite) return {};
    }
  if (!reaches_all && behind) return {};
  NormGradient result;
  result.dz = accumulated.defined()
                  ? accumulated
                  : reused_empty(batch.images, out, batch.size.height, batch.size.width, scalar_type(T{}));
  if (!reaches_all && !accumulated.defined()) result.dz.zero_();
  const std::vector<float> zeros(padded, 0.0f), ones(padded, 1.0f);
  Epilogue<T> e;
  e.scale = ones.data();
  e.shift = zeros.data();
  e.out = static_cast<T*>(result.dz.mutable_data_ptr());
  if (accumulated.defined()) e.residual = e.out;
  if (behind) {
    e.gathers = Gathers::gradient;
    e.behind = *behind;
    result.sum.assign(out, 0.0);
    result.sum_y.assign(out, 0.0);
  }
  Operand<T> from = dy;
  for (const auto& [line, column, packed] : products) {
    const Window own{
        {static_cast<int64_t>(line.taps.size()), static_cast<int64_t>(column.taps.size())},
        {1, 1},
        {line.padding, column.padding},
        {line.dilation, column.dilation}};
    const Shape shape = shape_of<T>(own, in, out, packed);
    Pass<T> pass(shape, {batch.images, size}, from, packed, e, behind ? 2 : 0);
    pass.scatter(batch.size, {line.first, column.first}, {line.stride, column.stride});
    if (made.take && products.size() == 1) result.handed = pass.hand_to(made);
    pass.run();
    if (!pass.finite()) return {};
    if (from.kept()) from = Operand<T>(from.kept(), in);
    if (behind)
      pass.each_gathered([&](int64_t, const float* sums) {
        for (int64_t c = 0; c < out; ++c) {
          const float* s = sums + c / kPanel * 2 * kPanel + c % kPanel;
          result.sum[c] += s[0];
          result.sum_y[c] += s[kPanel];
        }
      });
  }
  return result;
}

}  // namespace

template <class T>
at::Tensor convolve_backward(
    const Operand<T>& dy, const Batch& batch, const at::Tensor& weight, const Stage& stage,
    const at::Tensor& accumulated) {
  return backward<T>(dy, batch, weight, stage, accumulated, nullptr, {}).dz;
}

template <class T>
NormGradient convolve_backward_norm(
    const Operand<T>& dy, const Batch& batch, const at::Tensor& weight, const Stage& stage,
    const Differentiated<T>& behind, const Made<T>& made) {
  return backward<T>(dy, batch, weight, stage, {}, &behind, made);
}

#define INSTANTIATE(T)                                                                                           \
  template Convolved convolve<T>(                                                                                \
      const Operand<T>&, const Batch&, const at::Tensor&, const std::optional<at::Tensor>&, const Stage&, bool); \
  template at::Tensor convolve_backward<T>(                                                                      \
      const Operand<T>&, const Batch&, const at::Tensor&, const Stage&, const at::Tensor&);
INSTANTIATE(bf16)
INSTANTIATE(float)
#undef INSTANTIATE
template NormGradient convolve_backward_norm<bf16>(
    const Operand<bf16>&, const Batch&, const at::Tensor&, const Stage&, const Differentiated<bf16>&,
    const Made<bf16>&);

}  // namespace resnet_fused::cpu::engine
