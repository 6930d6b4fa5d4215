#include "weight_gradient.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>

#include "../../block/integer_division.h"
#include "../../block/kernel_layout.h"
#include "../isa.h"
#include "../share_out.h"
#include "memory.h"
#include "training.h"

namespace resnet_fused::cpu::engine {
namespace {

// Packed operands and sums that are to stay in the second cache.
constexpr int64_t kPackBytes = 1 << 20, kSumBytes = 1 << 18;
// Packed parts of all threads; more are packed and multiplied in rounds.
constexpr int64_t kRoundBytes = int64_t{64} << 20;
// Sums that a slot may have for itself, and those of all slots where there are more than threads.
constexpr int64_t kApartBytes = 1 << 20, kAllApartBytes = 4 << 20;
// At most, for each thread: which thread has time for one shows while they run.
constexpr int64_t kSlots = 4;
// Images that lie side by side: fewer positions are padding than one behind the other.
constexpr int64_t kImages = 8;

// Memory that earlier calls have left; by powers of two, so that different convolutions share it.
at::Tensor working_memory(int64_t bytes) {
  return reused_empty(1, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes))), 1, 1, at::kByte);
}

// Few channels: whether a row's taps fit in a panel.
bool folds(const at::Tensor& weight, const Stage& stage) {
  const int64_t taps = weight.size(3);
  return stage.groups == 1 && stage.dilation[1] == 1 && taps > 1 && taps * weight.size(1) <= kPanel;
}

}  // namespace

WeightGradient::WeightGradient(
    const at::Tensor& weight, const Stage& stage, int64_t images, Size input, Size output, at::ScalarType result)
    : weight_(weight),
      groups_{stage.groups, weight.size(0) / stage.groups, weight.size(1)},
      layout_(
          {{weight.size(2), weight.size(3)}, stage.stride, stage.padding, stage.dilation}, input, output, images,
          folds(weight, stage)),
      threads_(at::in_parallel_region() ? 1 : at::get_num_threads()) {
  groups_.in *= layout_.fold().taps;
  const int64_t out = round_up(groups_.count * groups_.out, kPanel), in = round_up(groups_.count * groups_.in, kPanel);
  // transposing costs more than interleaving
  const bool transposes_gradient = out <= in * layout_.planes();
  format_ = {transposes_gradient, transposes_gradient ? out : in, transposes_gradient ? in : out};
  find_pairs();
  const int64_t pairs = static_cast<int64_t>(pairs_.size()),
                bytes = pair_floats() * static_cast<int64_t>(sizeof(float));
  apart_ = pairs * bytes <= kApartBytes;
  cut();
  if (apart_ && static_cast<int64_t>(parts_.size()) < threads_) {  // there is nothing for some threads
    apart_ = false;
    cut();
  }
  at_once_ = apart_ ? pairs : std::clamp<int64_t>(kSumBytes / bytes, 1, ceil_div(pairs, threads_));
  const int64_t parts = static_cast<int64_t>(parts_.size());
  slots_ = threads_;
  if (apart_ && threads_ > 1) slots_ *= std::clamp<int64_t>(kAllApartBytes / (threads_ * pairs * bytes), 1, kSlots);
  if (apart_) slots_ = std::min(slots_, parts);
  finite_.assign(threads_, 1);
  begun_.assign(slots_, 0);
  const int64_t pack_bytes = format_.elements() * static_cast<int64_t>(sizeof(bf16));
  round_ = std::clamp<int64_t>(kRoundBytes / pack_bytes, 1, parts);
  packs_ = working_memory((apart_ ? threads_ : round_) * pack_bytes);
  sums_ = working_memory((apart_ || round_ == parts ? slots_ * at_once_ : pairs) * bytes);
  TORCH_INTERNAL_ASSERT(result == at::kFloat || result == at::kBFloat16);
  result_ = at::empty_like(weight, weight.options().dtype(result), kLayout);
}

// The pairs of panels that a group has channels in.
void WeightGradient::find_pairs() {
  const int64_t out = groups_.count * groups_.out, in = groups_.count * groups_.in;
  const auto meet = [&](int64_t o, int64_t c) {
    const int64_t last_o = std::min(o + kPanel, out) - 1, last_c = std::min(c + kPanel, in) - 1;
    return o / groups_.out <= last_c / groups_.in && c / groups_.in <= last_o / groups_.out;
  };
  for (int64_t i = 0; i < format_.interleaved_channels; i += kPanel)
    for (int64_t t = 0; t < format_.transposed_channels; t += kPanel)
      if (format_.transposes_gradient ? meet(t, i) : meet(i, t))
        pairs_.push_back({static_cast<int32_t>(t / kPanel), static_cast<int32_t>(i / kPanel)});
}

int64_t WeightGradient::longest() const {
  return apart_ || layout_.taps() > 1 ? gradient_kernels()->steps : gradient_kernels()->long_steps;
}

// Cuts all outputs into parts.
void WeightGradient::cut() {
  parts_.clear();
  int64_t images = 1, rows = std::max<int64_t>(1, longest() * kPositions / layout_.width());
  if (layout_.mixes_zeros()) {
    images = std::min({kImages, layout_.images(), apart_ ? ceil_div(layout_.images(), threads_) : kImages});
    images = ceil_div(layout_.images(), ceil_div(layout_.images(), images));
    const auto [t, i] = std::array{format_.transposed_channels, format_.interleaved_channels};
    const int64_t position = 2 * (format_.transposes_gradient ? t + layout_.planes() * i : layout_.planes() * t + i);
    rows = apart_ ? std::max<int64_t>(1, kPackBytes / (position * layout_.width() * images)) : layout_.rows();
  }
  rows = std::min(rows, layout_.rows());
  const int64_t bands = ceil_div(layout_.rows(), rows);
  for (int64_t first = 0; first < layout_.images(); first += images)
    for (int64_t band = 0; band < bands; ++band)
      parts_.push_back({first, images, band * layout_.rows() / bands, (band + 1) * layout_.rows() / bands});
  for (const Slab& part : parts_) format_.widen(layout_, part);
}

bf16* WeightGradient::pack_at(int64_t index) {
  return reinterpret_cast<bf16*>(packs_.mutable_data_ptr<uint8_t>()) + index * format_.elements();
}

float* WeightGradient::sums_of(int64_t slot) {
  return reinterpret_cast<float*>(sums_.mutable_data_ptr<uint8_t>()) + slot * at_once_ * pair_floats();
}

bool WeightGradient::is_sound() const {
  return !layout_.mixes_zeros() || std::all_of(finite_.begin(), finite_.end(), [](char finite) { return finite; });
}

// The products of pairs [from, to).
void WeightGradient::multiply(const Slab& part, const bf16* packed, int64_t from, int64_t to, float* sums, bool adds) {
  const std::vector<TapRun> runs = layout_.runs(part, format_.transposes_gradient);
  int64_t steps = 1;
  for (const TapRun& run : runs) steps = std::max(steps, run.steps);
  const int64_t chunks = ceil_div(steps, longest());
  std::vector<TapRun> some(runs.size());
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (size_t t = 0; t < runs.size(); ++t) {
      const int64_t begin = chunk * runs[t].steps / chunks, end = (chunk + 1) * runs[t].steps / chunks;
      some[t] = {runs[t].transposed + begin * kPositions, runs[t].interleaved + begin * kPositions, end - begin};
    }
    gradient_kernels()->multiply(
        {packed, packed + format_.interleaved(), format_.pitch, format_.panel(), some.data(), layout_.taps(),
         pairs_.data() + from, to - from, sums, adds || chunk > 0});
  }
}

void WeightGradient::add(
    int64_t thread, int64_t slot, const Slab& part, const Operand<bf16>& dy, const Operand<bf16>& p) {
  bf16* packed = pack_at(thread);
  finite_[thread] &= pack(layout_, part, Side::gradient, dy, format_, 0, 1, packed);
  finite_[thread] &= pack(layout_, part, Side::input, p, format_, 0, 1, packed);
  multiply(part, packed, 0, static_cast<int64_t>(pairs_.size()), sums_of(slot), begun_[slot]);
  begun_[slot] = 1;
}

void WeightGradient::add_rows(
    int64_t thread, int64_t slot, int64_t begin, int64_t end, const Operand<bf16>& dy, const Operand<bf16>& p) {
  int64_t most = 1;  // rows that the packed operands have room for
  for (const Slab& part : parts_) most = std::max(most, part.end - part.begin);
  for (int64_t row = begin; row < end; row += most) add(thread, slot, {0, 1, row, std::min(end, row + most)}, dy, p);
}

at::Tensor WeightGradient::finish() {
  if (!is_sound()) return {};
  for (int64_t slot = 0; slot < slots_; ++slot)
    if (!begun_[slot]) std::fill_n(sums_of(slot), at_once_ * pair_floats(), 0.0f);
  const int64_t pairs = static_cast<int64_t>(pairs_.size());
  for_each_job(pairs, [&](int64_t pair) { write(pair, sums_of(0) + pair * pair_floats(), slots_); });
  return result();
}

at::Tensor WeightGradient::compute(const Operand<bf16>& dy, const Operand<bf16>& p) {
  const int64_t parts = static_cast<int64_t>(parts_.size());
  if (apart_) {
    share_out(slots_, [&](int64_t thread) {
      return [&, thread](int64_t slot) {
        for (int64_t i = slot * parts / slots_; i < (slot + 1) * parts / slots_; ++i)
          add(thread, slot, parts_[i], dy, p);
      };
    });
    return finish();
  }
  for (int64_t first = 0; first < parts; first += round_) {
    const int64_t count = std::min(round_, parts - first);
    if (!pack_together(first, count, dy, p)) return {};
    multiply_together(first, count);
  }
  return result();
}

bool WeightGradient::pack_together(int64_t first, int64_t count, const Operand<bf16>& dy, const Operand<bf16>& p) {
  const int64_t shares = ceil_div(4 * threads_, count);
  share_out(count * shares, [&](int64_t thread) {
    return [&, thread](int64_t job) {
      const int64_t i = job / shares, share = job % shares;
      for (const auto& [side, operand] : {std::pair(Side::gradient, &dy), std::pair(Side::input, &p)})
        finite_[thread] &= pack(layout_, parts_[first + i], side, *operand, format_, share, shares, pack_at(i));
    };
  });
  return is_sound();
}

void WeightGradient::multiply_together(int64_t first, int64_t count) {
  const int64_t pairs = static_cast<int64_t>(pairs_.size());
  const bool begins = first == 0, ends = first + count == static_cast<int64_t>(parts_.size());
  const int64_t jobs = round_up(ceil_div(pairs, at_once_), threads_);
  share_out(jobs, [&](int64_t thread) {
    return [&, thread](int64_t job) {
      const int64_t from = job * pairs / jobs, to = (job + 1) * pairs / jobs;
      float* sums = begins && ends ? sums_of(thread) : sums_of(0) + from * pair_floats();
      for (int64_t i = 0; i < count; ++i) multiply(parts_[first + i], pack_at(i), from, to, sums, !begins || i > 0);
      for (int64_t pair = from; ends && pair < to; ++pair) write(pair, sums + (pair - from) * pair_floats(), 1);
    };
  });
}

void WeightGradient::write(int64_t pair, const float* sums, int64_t partials) {
  if (result_.scalar_type() == at::kFloat)
    write_to(result_.mutable_data_ptr<float>(), gradient_kernels()->store_float, pair, sums, partials);
  else
    write_to(
        reinterpret_cast<bf16*>(result_.mutable_data_ptr<at::BFloat16>()), gradient_kernels()->store, pair, sums,
        partials);
}

// [out][taps][in of the group]
template <class T, class Store>
void WeightGradient::write_to(T* dw, const Store& store, int64_t pair, const float* sums, int64_t partials) const {
  const auto [t, i] = std::array<int64_t, 2>{pairs_[pair].transposed * kPanel, pairs_[pair].interleaved * kPanel};
  const int64_t o = format_.transposes_gradient ? t : i, c = format_.transposes_gradient ? i : t;
  const auto within = [](int64_t channel, int64_t panel) { return std::clamp<int64_t>(channel - panel, 0, kPanel); };
  const int64_t taps = layout_.taps();
  std::vector<const float*> blocks(partials);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t b = 0; b < partials; ++b) blocks[b] = sums + b * at_once_ * pair_floats() + tap * kBlock;
    for (int64_t group = o / groups_.out; group < groups_.count && group * groups_.out < o + kPanel; ++group) {
      const int64_t first_o = group * groups_.out, first_c = group * groups_.in;
      const BlockSums part{
          blocks.data(),
          partials,
          !format_.transposes_gradient,
          within(first_o, o),
          within(first_o + groups_.out, o),
          within(first_c, c),
          within(first_c + groups_.in, c),
          taps * groups_.in};
      if (part.column < part.column_end)
        store(part, dw + ((o + part.row) * taps + tap) * groups_.in + c + part.column - first_c);
    }
  }
}

at::Tensor WeightGradient::result() const { return result_.contiguous(weight_.suggest_memory_format()); }

// By vectors, on a Zen 4, 2 threads, bfloat16 autocast, a block's training step, its time with oneDNN's convolutions /
// with the engine's: ResNet-50's layer4 1.17 to 1.22, its other layers 0.91 to 1.04 (docs/performance.md).
std::optional<std::string> reason_against_training(const at::Tensor& weight, at::ScalarType dtype) {
  constexpr int64_t many = int64_t{1} << 20;
  if (dtype != at::kBFloat16)
    return std::string(
               "the engine trains in bfloat16, and convolves 3x3 of float32 with stride 1 and padding 1; x is ") +
           c10::toString(dtype);
  if (!gradient_kernels()) return "the engine trains by AMX or AVX512-BF16, which this processor lacks";
  if (is_forced() || isa() != Isa::avx512_bf16) return std::nullopt;
  if (has_slow_pairs()) return "this processor multiplies pairs of bfloat16 slowly";
  if (weight.numel() < many) return "without AMX oneDNN's are as fast for fewer than a million weights";
  return std::nullopt;
}

// Measured on one core of a Sapphire Rapids with AMX, oneDNN's time over ours: ResNet-50's convolutions 1.1 to 5.0;
// ResNeXt-50's groups of 4 to 32 channels 1.03 to 19.7; 32 to 64 channels, 3x3, 1.15; 4 to 64, 3x3, folded, 1.10. Fewer
// channels fill tiles with zeros: 16 to 96 channels, 1x1, 0.79; 32 to 32, 1x1, 0.78; 16 to 16, 3x3, 0.64.
std::optional<std::string> reason_against_weight_gradient(
    const at::Tensor& weight, const Stage& stage, at::ScalarType dtype) {
  if (dtype == at::kFloat) return reason_against_convolving(weight, stage, dtype);  // by Winograd as well
  if (const auto reason = reason_against_training(weight, dtype)) return reason;
  if (weight.scalar_type() != at::kFloat && weight.scalar_type() != at::kBFloat16)
    return std::string("the weight is ") + c10::toString(weight.scalar_type());
  if (stage.pads_values()) return "the engine pads with zeros only";
  if (is_forced()) return std::nullopt;
  const int64_t out = weight.size(0), in = weight.size(1) * stage.groups;
  // Zen 4, 2 threads, oneDNN's time over ours by vectors: the stem 0.65
  if (isa() == Isa::avx512_bf16 && (stage.groups > 1 || folds(weight, stage)))
    return std::string(stage.groups > 1 ? "groups" : "few channels") + " leave its vectors half empty";
  const bool fills_groups = stage.groups == 1 || (out / stage.groups >= 4 && weight.size(1) >= 4);
  const bool fills_tiles = folds(weight, stage) ? out >= 64 && in * weight.size(3) >= 12
                                                : std::min(out, in) >= 32 && std::max(out, in) >= 64 && fills_groups;
  if (fills_tiles) return std::nullopt;
  return std::to_string(in) + " to " + std::to_string(out) + " channels" +
         (stage.groups == 1 ? "" : " in " + std::to_string(stage.groups) + " groups") + " do not fill its tiles";
}

at::Tensor weight_gradient(
    const Operand<bf16>& dy, const Operand<bf16>& p, int64_t images, Size input, Size output, const at::Tensor& weight,
    const Stage& stage, at::ScalarType result) {
  return WeightGradient(weight, stage, images, input, output, result).compute(dy, p);
}

}  // namespace resnet_fused::cpu::engine
