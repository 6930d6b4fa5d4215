#include "gradient_layout.h"

#include <algorithm>
#include <limits>

#include "../../block/integer_division.h"

namespace resnet_fused::cpu::engine {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

}  // namespace

GradientLayout::GradientLayout(const Window& given, Size input, Size output, int64_t images, bool folds)
    : window_(given), input_(input), output_(output), memory_width_(input.width), given_images_(images) {
  if (folds) {
    fold_ = {given.kernel[1], given.stride[1], given.padding[1]};
    window_ = {{given.kernel[0], 1}, {given.stride[0], 1}, {given.padding[0], 0}, {given.dilation[0], 1}};
    input_.width = output.width;
  }
  const Window& window = window_;
  stacked_ = window.kernel[0] == 1 && window.kernel[1] == 1 && window.padding[0] == 0 && window.padding[1] == 0;
  images_ = stacked_ ? 1 : images;
  rows_ = stacked_ ? images * output.height : output.height;
  rows_of_image_ = stacked_ ? output.height : std::numeric_limits<int64_t>::max();
  reach_ = top_ = bottom_ = 0;
  for (int64_t r = 0; r < window.kernel[0]; ++r)
    for (int64_t s = 0; s < window.kernel[1]; ++s) {
      const std::array<int64_t, 2> at{
          r * window.dilation[0] - window.padding[0], s * window.dilation[1] - window.padding[1]};
      Tap tap{0, floor_div(at[0], window.stride[0]), floor_div(at[1], window.stride[1])};
      const std::array<int64_t, 2> phase{at[0] - tap.y * window.stride[0], at[1] - tap.x * window.stride[1]};
      tap.plane = std::find(phases_.begin(), phases_.end(), phase) - phases_.begin();
      if (tap.plane == static_cast<int64_t>(phases_.size())) phases_.push_back(phase);
      taps_.push_back(tap);
      reach_ = std::max({reach_, tap.x, -tap.x});
      top_ = std::min(top_, tap.y);
      bottom_ = std::max(bottom_, tap.y);
    }
  // A shifted pixel meets a pixel of its own row or a zero: there are as many zeros as it goes beyond the row.
  width_ = output.width;
  for (const Tap& tap : taps_)
    width_ = std::max({width_, plane_columns(tap.plane) + std::max<int64_t>(0, -tap.x), output.width + tap.x});
}

int64_t GradientLayout::plane_rows(int64_t plane) const {
  if (stacked_) return rows_;
  return std::max<int64_t>(0, ceil_div(input_.height - phases_[plane][0], window_.stride[0]));
}

int64_t GradientLayout::plane_columns(int64_t plane) const {
  return std::max<int64_t>(0, ceil_div(input_.width - phases_[plane][1], window_.stride[1]));
}

Positions GradientLayout::positions(const Slab& part, Side side) const {
  Positions p{{}, {1, 1}, 0, 0, width_, part.first, part.images, 0};
  if (side == Side::gradient) {
    p.planes.push_back({{0, 0}, output_.width, part.begin, part.end});
  } else {
    p.stride = window_.stride;
    const int64_t begin = std::max<int64_t>(0, part.begin + top_);
    for (int64_t plane = 0; plane < planes(); ++plane) {
      const int64_t end = std::max(begin, std::min(plane_rows(plane), part.end + bottom_));
      p.planes.push_back({phases_[plane], plane_columns(plane), begin, end});
    }
  }
  int64_t rows = 0;
  for (const auto& plane : p.planes) rows = std::max(rows, plane.end - plane.begin);
  // products begin up to a shift and one position early and end within kPositions and a shift
  const int64_t shift = reach_ * part.images;
  p.lead = round_up(shift + 1, kPositions);
  p.distance = round_up(rows * p.row() + shift + kPositions, kPositions);
  p.count = p.lead + static_cast<int64_t>(p.planes.size()) * p.distance;
  return p;
}

std::vector<TapRun> GradientLayout::runs(const Slab& part, bool transposes_gradient) const {
  const Positions dy = positions(part, Side::gradient), p = positions(part, Side::input);
  std::vector<TapRun> runs;
  for (const Tap& tap : taps_) {
    const auto& plane = p.planes[tap.plane];
    // the part's rows for which the tap reads a row of the plane
    const int64_t begin = std::max(part.begin, plane.begin - tap.y);
    const int64_t end = std::min(part.end, plane.end - tap.y);
    const int64_t of_dy = dy.lead + (begin - part.begin) * dy.row();
    const int64_t of_p =
        p.lead + tap.plane * p.distance + (begin + tap.y - plane.begin) * p.row() + tap.x * part.images;
    const int64_t early = (transposes_gradient ? of_p : of_dy) % 2;
    const int64_t transposed = (transposes_gradient ? of_dy : of_p) - early;
    const int64_t interleaved = (transposes_gradient ? of_p : of_dy) - early;
    runs.push_back(
        {transposed, interleaved, end <= begin ? 0 : ceil_div((end - begin) * dy.row() + early, kPositions)});
  }
  return runs;
}

int64_t GradientLayout::row(Side side, const Positions::Plane& plane, int64_t image, int64_t row) const {
  if (!stacked_ && image >= given_images_) return -1;
  if (side == Side::gradient) return (image * output_.height + row) * output_.width;
  const int64_t inside = row % rows_of_image_ * window_.stride[0] + plane.phase[0];
  return ((image + row / rows_of_image_) * input_.height + inside) * memory_width_;
}

}  // namespace resnet_fused::cpu::engine
