#include "prepared_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>

#include "../../block/integer_division.h"
#include "../../block/kernel_layout.h"
#include "../../block/result_format.h"
#include "../convolution.h"
#include "../isa.h"
#include "../kernels/row_kernels.h"
#include "../share_out.h"
#include "caches.h"
#include "fill.h"
#include "memory.h"
#include "pack.h"
#include "rounding.h"
#include "schedule.h"
#include "winograd_step.h"

namespace resnet_fused::cpu::engine {
namespace {

Window window_of(const Stage& stage, int64_t height, int64_t width) {
  return {{height, width}, stage.stride, stage.padding, stage.dilation};
}

// transformed: the first convolution's input first passes through a norm or an activation, which folding cannot do.
Layout::Kind kind_of(const Window& window, int64_t channels, int64_t groups, bool first, bool transformed) {
  if (window.is_pixel()) return Layout::Kind::pixels;
  const bool few = window.kernel[1] > 1 && window.kernel[1] * channels <= 32;
  if (first && !transformed && groups == 1 && few) return Layout::Kind::folded;
  if (first && groups == 1 && window.kernel[0] * window.kernel[1] == 1) return Layout::Kind::columns;
  return Layout::Kind::planes;
}

std::vector<float> to_floats(const at::Tensor& values, int64_t length, float beyond) {
  const auto flat = values.to(at::kFloat).reshape(-1).contiguous();
  std::vector<float> floats(length, beyond);
  std::copy_n(flat.const_data_ptr<float>(), std::min<int64_t>(length, flat.numel()), floats.begin());
  return floats;
}

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

struct Conv {
  Shape shape;
  Packed packed;
  Packed winograd{};  // made when a schedule first asks for it
  std::vector<float> scale, shift, slope;
  Activation act;
};

// Whether winograd.h computes it. Narrow convolutions have too few products for what surrounds them.
bool may_be_winograd(const Shape& shape) {
  return shape.kind == Layout::Kind::planes && shape.groups == 1 && shape.window.fits_winograd() && shape.in >= kPanel;
}

// T: of tensors, to which weights are rounded. P: of what is multiplied, and of values between convolutions.
template <class T, class P = T>
class Prepared final : public PreparedBlock {
 public:
  Prepared(Ingredients given, BlockSpec spec) : spec_(std::move(spec)) {
    const int64_t last = spec_.last();
    for (int64_t i = 0; i <= last; ++i) {
      processes_.push_back(spec_.convs[i].processes());
      circular_.push_back(spec_.convs[i].padding_mode == PaddingMode::circular);
      weight_is_last_.push_back(given.weights[i].suggest_memory_format() == kLayout);
    }
    for (size_t i = 0; i < spec_.convs.size(); ++i) {
      const auto& weight = given.weights[i];
      const auto& stage = spec_.convs[i];
      const int64_t out = weight.size(0), in = weight.size(1) * stage.groups;
      const bool projects = spec_.has_projection() && static_cast<int64_t>(i) == spec_.projection();
      Conv conv;
      conv.shape = {window_of(stage, weight.size(2), weight.size(3)), stage.groups, in, out};
      conv.shape.kind = projects ? (conv.shape.window.is_pixel() ? Layout::Kind::pixels : Layout::Kind::columns)
                                 : kind_of(conv.shape.window, in, stage.groups, i == 0, stage.input_stage != kNone);
      const auto factor = given.factors[i] ? to_floats(*given.factors[i], out, 1.0f) : std::vector<float>();
      conv.packed = pack<T, P>(weight, factor.empty() ? nullptr : factor.data(), conv.shape.kind, stage.groups);
      conv.shape.panels = conv.packed.panels;
      conv.shape.products = conv.packed.taps * conv.packed.depth;
      // a projection's product is kept apart in the results' type, which must not round it
      const bool joins = spec_.has_projection() && static_cast<int64_t>(i) == last;
      conv.shape.winograd =
          std::is_same_v<P, float> && !projects && (!joins || std::is_same_v<T, float>) && may_be_winograd(conv.shape);
      const int64_t padded = conv.packed.panels * kPanel;
      finite_ = finite_ && conv.packed.finite;
      if (!projects) {
        conv.scale = to_floats(given.scales[i], padded, 0.0f);
        conv.shift = to_floats(given.shifts[i], padded, 0.0f);
        finite_ = finite_ && all_finite(conv.scale) && all_finite(conv.shift);
        const int64_t behind =
            spec_.order == Order::pre && static_cast<int64_t>(i) == last ? kNone : stage.output_stage;
        if (behind != kNone) {
          conv.act = spec_.convs[behind].act;
          conv.slope = slopes(given.slopes[behind], conv.act, out, padded);
        }
      }
      convs_.push_back(std::move(conv));
    }
    const int64_t out = convs_[last].shape.out, padded = convs_[last].shape.panels * kPanel;
    zeros_.assign(padded, 0.0f);
    if (given.branch_scale)
      branch_scale_ = per_channel(*given.branch_scale, out, padded);
    else if (spec_.join == JoinReads::branch)
      branch_scale_.assign(padded, 1.0f);  // marks that the activation stands before the addition
    if (given.skip_scale) skip_scale_ = per_channel(*given.skip_scale, out, padded);
    const int64_t leading = spec_.convs[0].input_stage;
    if (leading != kNone) {
      const int64_t in = convs_[0].shape.in;
      pre_act_ = spec_.convs[leading].act;
      transforms_x_ = given.pre_scale.has_value() || !pre_act_.is(ActivationKind::identity);
      pre_center_.assign(in, 0.0f);
      pre_scale_ = given.pre_scale ? to_floats(*given.pre_scale, in, 1.0f) : std::vector<float>(in, 1.0f);
      pre_shift_ = given.pre_shift ? to_floats(*given.pre_shift, in, 0.0f) : std::vector<float>(in, 0.0f);
      pre_slope_ = slopes(given.slopes[leading], pre_act_, in, in);
      finite_ = finite_ && all_finite(pre_scale_) && all_finite(pre_shift_);
    }
    if (!given.pool.empty()) {
      const int64_t kernel = given.pool[0], stride = given.pool[1], padding = given.pool[2];
      pool_ = Window{{kernel, kernel}, {stride, stride}, {padding, padding}, {1, 1}};
    }
    for (int64_t i = 0; i <= last; ++i) chain_.push_back(convs_[i].shape);
  }

  bool finite() const override { return finite_; }

  std::string describe(int64_t images, int64_t height, int64_t width) override {
    const auto s = schedule(images, {height, width});
    std::string text = kWidens ? "products of float32, " : "";
    if (s->any_winograd()) text += "3x3 by Winograd, ";
    if (s->splits_outputs) return text + "threads share the outputs of each convolution";
    text += s->images > 1 ? "groups of " + std::to_string(s->images) + " images" : "image by image";
    if (s->parts.size() > 1) text += ", each in " + std::to_string(s->parts.size()) + " parts";
    return text;
  }

  at::Tensor run(const at::Tensor& given, const std::optional<at::Tensor>& residual) override {
    const auto& first = convs_[0].shape;
    TORCH_CHECK_VALUE(
        given.dim() == 4 && given.size(1) == first.in, "x must be [N, ", first.in, ", H, W], got ", given.sizes());
    const bool converts = first.kind == Layout::Kind::folded && given.scalar_type() == at::kFloat;
    TORCH_CHECK_TYPE(
        converts || given.scalar_type() == scalar_type(T{}), "x must be ", scalar_type(T{}), ", got ",
        given.scalar_type());
    const bool keeps = first.kind == Layout::Kind::folded && spec_.skip == Skip::none;
    const at::Tensor x = keeps ? given : given.contiguous(kLayout);
    const auto s = schedule(x.size(0), {x.size(2), x.size(3)});
    const Size size = s->pooled;
    auto out = reused_empty(x.size(0), convs_[spec_.last()].shape.out, size.height, size.width, scalar_type(T{}));
    Call call{*s, x, out};
    if (residual) {
      TORCH_CHECK_VALUE(
          residual->sizes() == out.sizes() && spec_.skip == Skip::none && !pool_, "residual must be ", out.sizes(),
          " beside a block without a skip path and without pooling, got ", residual->sizes());
      TORCH_CHECK_TYPE(
          residual->scalar_type() == scalar_type(T{}), "residual must be ", scalar_type(T{}), ", got ",
          residual->scalar_type());
      call.residual = residual->contiguous(kLayout);
    } else if (spec_.skip == Skip::identity) {
      call.residual = x;
    }
    if (watches_x() && (s->reads_x || s->projection_reads_x)) watch(call);
    if (!call.wild) {
      if (s->splits_outputs)
        run_together(call);
      else
        run_apart(call);
    }
    if (call.wild) return {};
    return is_result_last(given, *s) ? out : out.contiguous();
  }

 private:
  struct Call {
    const Schedule& schedule;
    const at::Tensor& x;
    at::Tensor& out;
    at::Tensor residual{};  // what the last convolution adds: x, or what is given; undefined: nothing
    std::atomic<bool> wild{false};
  };

  // The weights of other groups' channels are zeros here, and a zero times a value that is not finite is NaN; Winograd
  // subtracts infinities. Where there is such a value PyTorch computes the block.
  bool watches(int64_t conv) const { return convs_[conv].shape.groups > 1; }
  bool watches_x() const { return watches(0) || (spec_.has_projection() && watches(spec_.projection())); }
  void watch(Call& call) const {
    const int64_t images = call.x.size(0), each = call.x.numel() / images;
    for_each_job(images, [&](int64_t n) {
      if (!row_kernels<T>().all_finite(data(call.x) + n * each, each)) call.wild = true;
    });
  }

  bool is_result_last(const at::Tensor& x, const Schedule& s) const {
    std::vector<int64_t> widths;
    std::vector<bool> one_pixel;
    for (int64_t i = 0; i <= spec_.last(); ++i) {
      widths.push_back(convs_[i].shape.out);
      one_pixel.push_back(s.layouts[i].output.pixels() == 1);
    }
    const bool x_is_last = x.suggest_memory_format() == kLayout;
    return is_channels_last(
        spec_.order == Order::pre, x_is_last, x.size(1), processes_, circular_, weight_is_last_, widths, one_pixel);
  }

  static const T* data(const at::Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

  static std::vector<float> slopes(
      const std::optional<at::Tensor>& learned, const Activation& act, int64_t channels, int64_t padded) {
    if (learned) return per_channel(*learned, channels, padded);
    return std::vector<float>(padded, static_cast<float>(act.parameter));
  }
  static std::vector<float> per_channel(const at::Tensor& values, int64_t channels, int64_t padded) {
    return to_floats(values.numel() == 1 ? values.reshape(-1).expand({channels}) : values, padded, 0.0f);
  }

  std::shared_ptr<const Schedule> schedule(int64_t images, Size input) {
    const std::array<int64_t, 4> key{images, input.height, input.width, at::get_num_threads()};
    const std::lock_guard lock(mutex_);
    auto& kept = schedules_[key];
    if (!kept) {
      if (schedules_.size() > 16) {  // sizes that do not recur must not be kept for ever
        schedules_.clear();
        return schedules_[key] = make(images, input);
      }
      kept = make(images, input);
    }
    return kept;
  }
  std::shared_ptr<const Schedule> make(int64_t images, Size input) {
    const Machine machine = machine_for<P>(at::get_num_threads());
    const Shape* projection = spec_.has_projection() ? &convs_[spec_.projection()].shape : nullptr;
    auto made = std::make_shared<Schedule>(
        make_schedule(chain_, projection, pool_ ? &*pool_ : nullptr, images, input, transforms_x_ || kWidens, machine));
    for (size_t i = 0; i < chain_.size(); ++i)
      if (made->winograd[i] && !convs_[i].winograd.memory) convs_[i].winograd = pack_winograd(convs_[i].packed, true);
    return made;
  }

  void run_apart(Call& call) const {
    const Schedule& s = call.schedule;
    const int64_t parts = static_cast<int64_t>(s.parts.size());
    share_out(s.items * parts, [&](int64_t) {
      unsigned char* buffers = scratch(s.scratch);
      clear_padding(s, buffers);
      return [&, buffers](int64_t i) {
        for (const Step& step : s.parts[i % parts]) {
          lay_out_input(call, buffers, i / parts, step, step.begin);
          if (s.winograd[step.conv])
            multiply_patches(call, buffers, i / parts, step);
          else
            multiply(call, buffers, i / parts, step, 0, convs_[step.conv].shape.panels);
          if (step.pool_end > 0) pool(call, buffers, i / parts, step);
        }
      };
    });
  }

  void run_together(Call& call) const {
    const Schedule& s = call.schedule;
    unsigned char* buffers = scratch(s.scratch);
    clear_padding(s, buffers);
    const int64_t threads = at::get_num_threads();
    for (int64_t item = 0; item < s.items; ++item)
      for (const Step& step : s.parts[0]) {
        const int64_t height = step.conv == 0 ? step.x_end - step.x_begin : 0;
        if ((step.conv == 0 && !s.reads_x) ||
            (step.conv == spec_.last() && spec_.has_projection() && !s.projection_reads_x))
          for_each_job(threads, [&](int64_t t) {
            Step share = step;
            share.x_begin = step.x_begin + t * height / threads;
            share.x_end = step.x_begin + (t + 1) * height / threads;
            share.begin = step.begin + t * (step.end - step.begin) / threads;
            share.end = step.begin + (t + 1) * (step.end - step.begin) / threads;
            lay_out_input(call, buffers, item, share, step.begin);
          });
        if (s.winograd[step.conv]) {
          multiply_patches(call, buffers, item, step);
          continue;
        }
        const int64_t panels = convs_[step.conv].shape.panels;
        const int64_t shares = std::min(kShares * threads, panels);
        for_each_job(shares, [&](int64_t t) {
          multiply(call, buffers, item, step, t * panels / shares, (t + 1) * panels / shares);
        });
      }
  }

  P* buffer(const Schedule& s, unsigned char* buffers, int64_t layout) const {
    return reinterpret_cast<P*>(buffers + s.buffers[layout]);
  }

  void clear_padding(const Schedule& s, unsigned char* buffers) const {
    for (size_t i = 0; i < s.layouts.size(); ++i) {
      const Layout& l = s.layouts[i];
      for (const int32_t position : l.zeros)
        std::memset(buffer(s, buffers, i) + position * l.pitch, 0, l.pitch * sizeof(P));
    }
  }

  // Pools the rows that the step has computed.
  void pool(Call& call, unsigned char* buffers, int64_t item, const Step& step) const {
    const Schedule& s = call.schedule;
    const Size in = s.layouts[spec_.last()].output, out = s.pooled;
    const int64_t channels = convs_[spec_.last()].shape.out, kernel = pool_->kernel[0];
    const T* from = reinterpret_cast<const T*>(buffers + s.pool_buffer);
    T* to = static_cast<T*>(call.out.mutable_data_ptr()) + item * out.pixels() * channels;
    std::vector<const T*> rows(kernel * kernel);
    for (int64_t y = step.pool_begin; y < step.pool_end; ++y)
      for (int64_t x = 0; x < out.width; ++x) {
        int64_t count = 0;
        const int64_t top = y * pool_->stride[0] - pool_->padding[0], left = x * pool_->stride[1] - pool_->padding[1];
        for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + kernel, in.height); ++h)
          for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + kernel, in.width); ++w)
            rows[count++] = from + ((h - step.target_row) * in.width + w) * channels;
        row_kernels<T>().max_of(rows.data(), count, channels, to + (y * out.width + x) * channels);
      }
  }

  // Lays out what the step, or a share of it, reads of x and cannot read in place. first_row: of the whole step's
  // outputs.
  void lay_out_input(Call& call, unsigned char* buffers, int64_t item, const Step& step, int64_t first_row) const {
    const Schedule& s = call.schedule;
    if (step.conv == 0 && !s.reads_x) {
      const Layout& l = s.layouts[0];
      for (int64_t n = 0; n < l.images; ++n) {
        const int64_t image = item * l.images + n;
        if (l.kind == Layout::Kind::folded)
          fold_rows(call, l, image, step.x_begin, step.x_end, first_row, buffer(s, buffers, 0));
        else if (l.kind == Layout::Kind::planes)
          fill_planes(operand(call), l, n, image, step.x_begin, step.x_end, buffer(s, buffers, 0));
        else
          fill_columns(operand(call), l, l, n, image, step.begin, step.end, buffer(s, buffers, 0));
      }
    }
    if (step.conv == spec_.last() && spec_.has_projection() && !s.projection_reads_x) {
      const int64_t at = spec_.projection();
      const Layout &l = s.layouts[at], &main = s.layouts[spec_.last()];
      for (int64_t n = 0; n < l.images; ++n)
        fill_columns(operand(call), l, main, n, item * l.images + n, step.begin, step.end, buffer(s, buffers, at));
    }
  }

  // x behind the leading norm and activation.
  Operand<T> operand(Call& call) const {
    const int64_t channels = convs_[0].shape.in;
    Operand<T> from(data(call.x), channels);
    if (transforms_x_)
      from = Operand<T>(
          {data(call.x),
           {pre_center_.data(), pre_scale_.data(), pre_shift_.data()},
           nullptr,
           {},
           {pre_act_, pre_slope_.data()},
           nullptr},
          channels);
    if (watches_x()) from.not_finite = &call.wild;
    return from;
  }

  // A row's taps side by side: row y of x with zeros at its ends, from which each output copies its window.
  // The buffer begins with what output row `first_row` reads.
  void fold_rows(
      Call& call, const Layout& l, int64_t image, int64_t x_begin, int64_t x_end, int64_t first_row, P* to) const {
    const auto& w = l.window;
    const int64_t width = l.input.width, channels = l.channels, taps = w.kernel[1], dilation = w.dilation[1];
    const auto strides = call.x.strides();
    // zeros at both ends, and room for whole pitches to be read
    std::vector<P> padded((width + 2 * w.padding[1] + dilation * taps) * channels + l.pitch, P{});
    P* inside = padded.data() + w.padding[1] * channels;
    const auto read_row = [&](const auto* x) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < width; ++i) inside[i * channels + c] = convert(x[c * strides[1] + i * strides[3]]);
    };
    const bool is_row = call.x.scalar_type() == scalar_type(T{}) && strides[1] == 1 && strides[3] == channels;
    for (int64_t y = x_begin; y < x_end; ++y) {
      const int64_t phase = (y + w.padding[0]) % w.stride[0], coordinate = (y + w.padding[0]) / w.stride[0];
      P* row = to + (phase * l.plane + (coordinate - first_row) * l.row) * l.pitch;
      if (y < 0 || y >= l.input.height) {
        std::memset(row, 0, l.row * l.pitch * sizeof(P));
        continue;
      }
      const int64_t at = image * strides[0] + y * strides[2];
      if (is_row)
        copy(data(call.x) + at, width * channels, inside);
      else if (call.x.scalar_type() == at::kFloat)
        read_row(call.x.template const_data_ptr<float>() + at);
      else
        read_row(data(call.x) + at);
      const int64_t step = w.stride[1] * channels;
      if (dilation == 1) {
        row_kernels<P>().windows(padded.data(), step, taps * channels, l.pitch, l.output.width, row);
        continue;
      }
      for (int64_t o = 0; o < l.output.width; ++o) {
        P* out = row + o * l.pitch;
        for (int64_t s = 0; s < taps; ++s)
          std::memcpy(out + s * channels, padded.data() + o * step + s * dilation * channels, channels * sizeof(P));
        std::memset(out + taps * channels, 0, (l.pitch - taps * channels) * sizeof(P));
      }
    }
  }

  static P convert(float v) { return exactly<P>(rounded<T>(v)); }
  static P convert(T v)
    requires(!std::is_same_v<T, float>)
  {
    return exactly<P>(v);
  }

  Factor<P> factor(const Call& call, unsigned char* buffers, int64_t item, const Step& step, int64_t conv) const {
    const Schedule& s = call.schedule;
    const Layout& l = s.layouts[conv];
    const Conv& c = convs_[conv];
    Factor<P> f;
    f.pitch = l.pitch;
    f.taps = l.taps.data();
    f.tap_count = c.packed.taps;
    f.depth = c.packed.depth;
    f.first_channel = c.packed.first_channel.empty() ? nullptr : c.packed.first_channel.data();
    f.weights = reinterpret_cast<const P*>(c.packed.memory.get());
    if constexpr (!kWidens)
      if (s.buffers[conv] < 0) f.input = data(call.x) + item * l.images * l.input.pixels() * l.channels;
    if (s.buffers[conv] >= 0) f.input = buffer(s, buffers, conv);
    // a buffer that holds a band begins with it
    const bool pixels = conv > 0 && conv <= spec_.last() && l.kind == Layout::Kind::pixels && l.images == 1;
    if (s.buffers[conv] >= 0 && (pixels || l.kind == Layout::Kind::folded))
      f.input -= step.begin * l.output.width * l.pitch;
    return f;
  }

  void multiply(
      Call& call, unsigned char* buffers, int64_t item, const Step& step, int64_t panel_begin,
      int64_t panel_end) const {
    if (step.conv == spec_.last())
      multiply_to<T, true>(call, buffers, item, step, panel_begin, panel_end);
    else
      multiply_to<P, false>(call, buffers, item, step, panel_begin, panel_end);
  }

  // The step by patches of 4×4 inputs: by this thread or, where the outputs are split, by all.
  void multiply_patches(Call& call, unsigned char* buffers, int64_t item, const Step& step) const {
    if constexpr (std::is_same_v<P, float>) {
      if (step.conv == spec_.last())
        multiply_patches_to<T, true>(call, buffers, item, step);
      else
        multiply_patches_to<P, false>(call, buffers, item, step);
    }
  }

  template <class Out, bool last>
  void multiply_patches_to(Call& call, unsigned char* buffers, int64_t item, const Step& step) const {
    const Schedule& s = call.schedule;
    bool wild = false;
    auto e = epilogue<Out, last>(call, buffers, item, step, wild);
    if constexpr (last && !kWidens)
      if (spec_.has_projection()) e.residual = project(call, buffers, item, step, e);
    const bool finite = engine::multiply_patches(
        s, step.conv, step, buffer(s, buffers, step.conv), convs_[step.conv].winograd, buffers, e);
    if (!finite) call.wild = true;
  }

  // The projection's product, scaled as `e` says and laid out as its results, for those of the step.
  const T* project(Call& call, unsigned char* buffers, int64_t item, const Step& step, const Epilogue<T>& e) const {
    const Schedule& s = call.schedule;
    const Layout& l = s.layouts[step.conv];
    Task<P, T> task{};
    task.factors[0] = factor(call, buffers, item, step, spec_.projection());
    task.rows = step.tiles.data();
    task.row_count = static_cast<int64_t>(step.tiles.size());
    task.epilogue.scale = e.scale;
    task.epilogue.shift = zeros_.data();
    task.epilogue.target = e.target;
    task.epilogue.pitch = task.epilogue.channels = e.pitch;
    task.epilogue.out = reinterpret_cast<T*>(buffers + s.projected_buffer);
    if (l.images == 1) task.epilogue.out -= step.begin * l.output.width * e.pitch;
    const int64_t panels = convs_[step.conv].shape.panels;
    const int64_t shares = s.splits_outputs ? std::min(kShares * at::get_num_threads(), panels) : 1;
    const auto share = [&](int64_t t) {
      Task<P, T> own = task;
      own.panel_begin = t * panels / shares;
      own.panel_end = (t + 1) * panels / shares;
      products<P, T>().multiply(own);
    };
    if (shares == 1)
      share(0);
    else
      for_each_job(shares, share);
    return task.epilogue.out;
  }

  // Out: the element type of the results. last: whether they are the block's.
  template <class Out, bool last>
  void multiply_to(
      Call& call, unsigned char* buffers, int64_t item, const Step& step, int64_t panel_begin,
      int64_t panel_end) const {
    const Schedule& s = call.schedule;
    bool wild = false;
    Task<P, Out> task{};
    task.factors[0] = factor(call, buffers, item, step, step.conv);
    if (last && spec_.has_projection()) task.factors[1] = factor(call, buffers, item, step, spec_.projection());
    task.rows = step.tiles.data();
    task.row_count = static_cast<int64_t>(step.tiles.size());
    task.panel_begin = panel_begin;
    task.panel_end = panel_end;
    int64_t depth = 0;
    for (const auto& f : task.factors) depth += f.tap_count * f.depth;
    task.panels_inner =
        depth * kPanel * (panel_end - panel_begin) * static_cast<int64_t>(sizeof(P)) <= second_cache() * 3 / 4;
    task.prefetches = s.buffers[step.conv] < 0;
    task.epilogue = epilogue<Out, last>(call, buffers, item, step, wild);
    products<P, Out>().multiply(task);
    if (wild) call.wild = true;
  }

  template <class Out, bool last>
  Epilogue<Out> epilogue(Call& call, unsigned char* buffers, int64_t item, const Step& step, bool& wild) const {
    const Schedule& s = call.schedule;
    const Conv& conv = convs_[step.conv];
    Epilogue<Out> e;
    e.scale = conv.scale.data();
    e.shift = conv.shift.data();
    e.act = conv.act;
    e.slope = conv.slope.empty() ? nullptr : conv.slope.data();
    e.target = s.targets[step.conv].data();
    if constexpr (last) {
      const int64_t outputs = s.layouts[step.conv].output.pixels() * s.images;
      if (pool_)
        e.out = reinterpret_cast<T*>(buffers + s.pool_buffer) -
                step.target_row * s.layouts[step.conv].output.width * conv.shape.out;
      else
        e.out = static_cast<T*>(call.out.mutable_data_ptr()) + item * outputs * conv.shape.out;
      e.pitch = e.channels = conv.shape.out;
      if (!pool_) e.ahead = 2 * products<P>().tile_rows * e.pitch;
      if (call.residual.defined()) e.residual = data(call.residual) + item * outputs * conv.shape.out;
      if (e.residual && !skip_scale_.empty()) e.residual_scale = skip_scale_.data();
      if (!branch_scale_.empty()) e.branch_scale = branch_scale_.data();
    } else {
      const Layout& next = s.layouts[step.conv + 1];
      e.out = buffer(s, buffers, step.conv + 1);
      if (next.kind == Layout::Kind::pixels && next.images == 1)
        e.out -= step.target_row * next.output.width * next.pitch;
      e.pitch = next.pitch;
      e.channels = next.pitch;
      // padded channels are sums of zeros times the input: an infinity would make them NaN
      if (watches(step.conv + 1) || next.pitch > conv.shape.out) e.not_finite = &wild;
    }
    return e;
  }

  static constexpr bool kWidens = !std::is_same_v<T, P>;

  BlockSpec spec_;
  std::vector<Conv> convs_;
  std::vector<Shape> chain_;
  std::optional<Window> pool_;
  std::vector<float> branch_scale_, skip_scale_, zeros_;
  std::vector<bool> processes_, circular_, weight_is_last_;  // for the result's memory format
  Activation pre_act_;
  std::vector<float> pre_center_, pre_scale_, pre_shift_, pre_slope_;
  bool transforms_x_ = false;
  bool finite_ = true;
  std::mutex mutex_;
  std::map<std::array<int64_t, 4>, std::shared_ptr<const Schedule>> schedules_;
};

}  // namespace

std::optional<std::string> reason_against(
    const BlockSpec& spec, const std::vector<std::vector<int64_t>>& weights, at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)
    return std::string("the CPU engine computes float32, bfloat16 and float16, x is ") + c10::toString(dtype);
  if (spec.join == JoinReads::branch && spec.has_projection())
    return "the CPU engine has no activation before the addition of a projection";
  for (size_t i = 0; i < spec.convs.size(); ++i) {
    const bool projects = spec.has_projection() && static_cast<int64_t>(i) == spec.projection();
    if (spec.convs[i].pads_values()) return "the CPU engine pads with zeros only";
    if (projects && spec.convs[i].groups > 1 && weights[i][2] * weights[i][3] > 1)
      return "the CPU engine has no projection of groups with a window";
  }
  return std::nullopt;
}

namespace {

// Channels that are no multiples of 32 (basic blocks and bottlenecks of 8 to 176, Zen 4, one thread, batch 2), oneDNN's
// time / ours by how much they are padded: bfloat16 1.01 to 1.12 not at all, 0.81 to 1.06 from 1.14 to 1.33, 0.24 to
// 0.95 beyond; float32 0.47 to 0.99 from 1.7 on but for a bottleneck of 16 (1.20), 0.94 to 1.8 below. Groups of 48, 56
// and 120: the networks (regnetx_032, 064, 080) in float32 0.78, 0.88 and 0.81 of the time with oneDNN.
constexpr double kMostPaddingOfPairs = 1.1, kMostPadding = 1.7;

// Products of the block with panels of 32 outputs and depths of whole steps / those that are asked for; Winograd's are
// 16 of 36. Groups are of whole panels.
double padding_of(const BlockSpec& spec, const std::vector<std::vector<int64_t>>& weights, bool pairs) {
  double all = 0, asked = 0, pixels = 1;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& w = weights[i];
    const auto& stage = spec.convs[i];
    const bool projects = spec.has_projection() && static_cast<int64_t>(i) == spec.projection();
    const Window window = window_of(stage, w[2], w[3]);
    if (!projects) pixels /= static_cast<double>(stage.stride[0] * stage.stride[1]);  // else as many as the last one's
    Shape shape{window, stage.groups, w[1] * stage.groups, w[0]};
    shape.kind = kind_of(window, shape.in, stage.groups, i == 0, stage.input_stage != kNone);
    // a row's few channels side by side are padded by all
    const int64_t side = shape.kind == Layout::Kind::folded ? w[3] : 1;
    const int64_t depth = round_up(w[1] * side, pairs ? kDepthStep<bf16> : kDepthStep<float>);
    const auto taps = static_cast<double>(w[2] * w[3] / side);
    const double products = !pairs && may_be_winograd(shape) ? taps * 16 / 36 : taps;
    all += pixels * products * static_cast<double>(depth * round_up(w[0], kPanel));
    asked += pixels * taps * static_cast<double>((side > 1 ? depth : w[1]) * w[0]);
  }
  return all / asked;
}

}  // namespace

// Measured with torch 2.13 on a Sapphire Rapids processor, 2 threads, ResNet-50 at 224 x 224 (oneDNN's time / ours, the
// range of its blocks): AMX 1.2 to 2.1 at batch 16, 1.3 to 1.8 at batch 1. float32 by AVX-512 1.0 to 1.6 at batch
// 16, 1.06 to 1.21 at batch 1. bfloat16 by AVX512-BF16 0.94 to 1.10 at batch 16; its products as floats (products.cpp)
// take 0.83 of that time. By AVX512-BF16 on Zen 4, where it multiplies at twice float32's rate: the network 1.11 at
// batch 16 and 1, the worst block beside eager 1.03 to 1.13. A pointwise convolution on its own has nothing to keep in
// a cache: with those of timm's efficientnet_b0 in oneDNN its evaluation takes 0.82 of the time (float32, median of 60
// in turns, batch 4, torch 2.13 on Zen 5, 2 threads).
std::optional<std::string> faster_elsewhere(
    const BlockSpec& spec, const std::vector<std::vector<int64_t>>& weights, at::ScalarType dtype) {
  if (is_forced() || !has_post_ops(dtype)) return std::nullopt;
  if (dtype == at::kHalf)
    return "this processor multiplies float16 itself, which oneDNN's convolutions use and the engine does not";
  const bool pairs = dtype == at::kBFloat16;
  if (pairs && isa() == Isa::amx) return std::nullopt;
  if (pairs && isa() != Isa::avx512_bf16) return "without AVX512-BF16 oneDNN's bfloat16 convolutions are as fast";
  if (weights.size() == 1 && weights[0][2] * weights[0][3] == 1)
    return "a pointwise convolution on its own is faster in oneDNN";
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t width = weights[i][0] / spec.convs[i].groups;  // of a group's outputs
    if (spec.convs[i].groups > 1 && width % kPanel != 0)
      return "convolutions of groups of " + std::to_string(width) + " channels are faster in oneDNN";
  }
  if (padding_of(spec, weights, pairs) > (pairs ? kMostPaddingOfPairs : kMostPadding))
    return "its channels, padded to multiples of 32, are faster in oneDNN";
  return std::nullopt;
}

c10::intrusive_ptr<PreparedBlock> PreparedBlock::prepare(
    Ingredients ingredients, BlockSpec spec, at::ScalarType dtype) {
  std::vector<std::vector<int64_t>> sizes;
  for (const auto& w : ingredients.weights) sizes.push_back(w.sizes().vec());
  const auto reason = reason_against(spec, sizes, dtype);
  TORCH_CHECK_VALUE(!reason, *reason);
  if (dtype == at::kFloat) return c10::make_intrusive<Prepared<float>>(std::move(ingredients), std::move(spec));
  if (dtype == at::kHalf) return c10::make_intrusive<Prepared<f16, float>>(std::move(ingredients), std::move(spec));
  if (widens_bfloat16()) return c10::make_intrusive<Prepared<bf16, float>>(std::move(ingredients), std::move(spec));
  return c10::make_intrusive<Prepared<bf16>>(std::move(ingredients), std::move(spec));
}

}  // namespace resnet_fused::cpu::engine
