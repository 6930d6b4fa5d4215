// How both operands of a weight gradient lie in positions, so that a tap of the window is one shift for all products.
//
// A part of the outputs is a raster: rows of pixels and of the zeros that the window reaches beside them, the same for
// both operands. Rows that the window reaches above and below are left out of a tap's products. Strides are undone by
// planes, one for each phase of the input's coordinates that a tap reads. Several images may lie side by side, pixel by
// pixel. A window of one pixel knows no neighbours: all rows of all images are those of one. Few channels fill tiles as
// windows of one row do: the values of a row's taps are the channels, and what is left is a window of one column.
#pragma once

#include <vector>

#include "gradient_products.h"
#include "layout.h"

namespace resnet_fused::cpu::engine {

// The operands: the gradient of the convolution's output, and its input.
enum class Side { gradient, input };

// Output rows [begin, end) of `images` images from `first` on.
struct Slab {
  int64_t first, images, begin, end;
};

// The positions of one operand in a part: zeros, then planes with zeros between them.
struct Positions {
  struct Plane {
    std::array<int64_t, 2> phase;
    int64_t columns, begin, end;  // rows
  };
  std::vector<Plane> planes;
  std::array<int64_t, 2> stride;
  int64_t lead, distance;  // zeros before the first plane; from one plane to the next
  int64_t width;           // of a row, with zeros
  int64_t first, images;
  int64_t count;  // of all, a multiple of kPositions

  int64_t row() const { return width * images; }
};

// A row of the input whose pixels, `step` apart, are windows of `taps` pixels.
struct Fold {
  int64_t taps = 1, step = 1, padding = 0;
};

class GradientLayout {
 public:
  // folds: whether a row's taps become channels; for windows that are not dilated.
  GradientLayout(const Window& window, Size input, Size output, int64_t images, bool folds);

  int64_t images() const { return images_; }  // 1 for a window of one pixel
  int64_t rows() const { return rows_; }      // of outputs of an image
  int64_t width() const { return width_; }    // positions of a row
  int64_t taps() const { return static_cast<int64_t>(taps_.size()); }
  const Fold& fold() const { return fold_; }
  // Whether a zero of one operand is ever multiplied with a value of the other.
  bool mixes_zeros() const { return !stacked_; }

  int64_t memory_width(Side side) const { return side == Side::gradient ? output_.width : memory_width_; }
  Positions positions(const Slab& part, Side side) const;
  int64_t planes() const { return static_cast<int64_t>(phases_.size()); }
  // Where each tap begins in these positions; transposes_gradient: which operand is which.
  std::vector<TapRun> runs(const Slab& part, bool transposes_gradient) const;

  // The first pixel in memory of a plane's row; -1: beyond the last image.
  int64_t row(Side side, const Positions::Plane& plane, int64_t image, int64_t row) const;

 private:
  struct Tap {
    int64_t plane, y, x;  // shift
  };
  Window window_;        // folded
  Size input_, output_;  // folded: windows in a row
  int64_t memory_width_;
  Fold fold_;
  int64_t images_, rows_, rows_of_image_, given_images_;
  bool stacked_;
  int64_t width_, reach_, top_, bottom_;  // the most that a tap shifts: left or right, upwards, downwards
  std::vector<Tap> taps_;
  std::vector<std::array<int64_t, 2>> phases_;

  int64_t plane_rows(int64_t plane) const;
  int64_t plane_columns(int64_t plane) const;
};

}  // namespace resnet_fused::cpu::engine
