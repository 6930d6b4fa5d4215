#include "gradient_pack.h"

#include <algorithm>

namespace resnet_fused::cpu::engine {
namespace {

// Gives the pixels at an operand's positions.
class Reader {
 public:
  Reader(const GradientLayout& layout, const Slab& part, Side side, const Operand<bf16>& operand)
      : layout_(layout),
        operand_(operand),
        positions_(layout.positions(part, side)),
        side_(side),
        fold_(side == Side::input ? layout.fold() : Fold{}) {
    zeros_.resize(channels());
    rows_.resize(part.images);
    const int64_t width = layout.memory_width(side), end = (positions_.planes[0].columns - 1) * fold_.step + fold_.taps;
    row_elements_ = (fold_.padding + std::max(width, end - fold_.padding)) * operand.channels();
    if (copies()) copies_.resize((kPositions / positions_.row() + 2) * part.images * row_elements_);
  }

  int64_t blocks() const { return positions_.count / kPositions; }
  int64_t channels() const { return fold_.taps * operand_.channels(); }

  // Of kPositions positions.
  void pixels(int64_t block, const bf16** out) {
    const auto& p = positions_;
    std::fill_n(out, kPositions, zeros_.data());
    const int64_t first = block * kPositions - p.lead;
    if (first < 0) return;
    const auto& plane = p.planes[first / p.distance];
    const int64_t step = p.stride[1] * fold_.step * operand_.channels(), start = plane.phase[1] * operand_.channels();
    const int64_t within = first % p.distance;
    int64_t y = plane.begin + within / p.row(), x = within % p.row() / p.images, i = within % p.images;
    for (int64_t j = 0; j < kPositions && y < plane.end; ++y, x = 0) {
      find_row(plane, y);
      for (; j < kPositions && x < p.width; ++x, i = 0)
        for (; j < kPositions && i < p.images; ++i, ++j)
          if (x < plane.columns && rows_[i]) out[j] = rows_[i] + start + x * step;
    }
  }

 private:
  const GradientLayout& layout_;
  const Operand<bf16>& operand_;
  const Positions positions_;
  const Side side_;
  const Fold fold_;
  int64_t row_elements_;
  // A ring of as many rows as kPositions positions touch, which are made there or padded with zeros.
  std::vector<bf16> copies_;
  std::vector<bf16> zeros_;
  std::vector<const bf16*> rows_;  // of each image
  const Positions::Plane* plane_ = nullptr;
  int64_t row_ = -1, turn_ = 0;

  bool copies() const { return !operand_.is_given() || fold_.taps > 1; }

  void find_row(const Positions::Plane& plane, int64_t row) {
    if (plane_ == &plane && row_ == row) return;
    plane_ = &plane;
    row_ = row;
    const int64_t width = layout_.memory_width(side_), padding = fold_.padding * operand_.channels();
    for (int64_t i = 0; i < positions_.images; ++i) {
      const int64_t pixel = layout_.row(side_, plane, positions_.first + i, row);
      rows_[i] = nullptr;
      if (pixel < 0) continue;
      if (!copies()) {
        rows_[i] = operand_.pixels(pixel, width, nullptr);
        continue;
      }
      bf16* copy = copies_.data() + turn_;
      turn_ = (turn_ + row_elements_) % static_cast<int64_t>(copies_.size());
      const bf16* made = operand_.pixels(pixel, width, copy + padding);
      if (operand_.is_given()) std::copy_n(made, width * operand_.channels(), copy + padding);
      rows_[i] = copy;
    }
  }
};

}  // namespace

void PackFormat::widen(const GradientLayout& layout, const Slab& part) {
  const int64_t dy = layout.positions(part, Side::gradient).count, p = layout.positions(part, Side::input).count;
  pitch = std::max(pitch, transposes_gradient ? dy : p);
  // an odd number of lines: the rows of a tile lie in different sets of the first cache
  if (pitch / kPositions % 2 == 0) pitch += kPositions;
  positions = std::max(positions, transposes_gradient ? p : dy);
}

bool pack(
    const GradientLayout& layout, const Slab& part, Side side, const Operand<bf16>& operand, const PackFormat& format,
    int64_t share, int64_t shares, bf16* to) {
  const auto& kernels = *gradient_kernels();
  const bool transposes = format.transposes_gradient == (side == Side::gradient);
  Reader reader(layout, part, side, operand);
  const bf16* pixels[kPositions];
  bool finite = true;
  for (int64_t block = share * reader.blocks() / shares; block < (share + 1) * reader.blocks() / shares; ++block) {
    reader.pixels(block, pixels);
    const int64_t at = block * kPositions;
    finite &= transposes ? kernels.transpose(pixels, reader.channels(), format.pitch, to + at)
                         : kernels.interleave(
                               pixels, reader.channels(), format.panel(), to + format.interleaved() + at * kPanel);
  }
  return finite;
}

}  // namespace resnet_fused::cpu::engine
