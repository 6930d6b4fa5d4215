// How a convolution's input lies in memory, so that a tap of its window is one shift for all outputs.
//
// Padding is one column of zeros between the rows: it ends one row and begins the next. Planes undo strides: with
// stride 2, pixels with even and with odd coordinates lie apart, and each tap reads one plane densely.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "products.h"

namespace resnet_fused::cpu::engine {

struct Size {
  int64_t height, width;
  int64_t pixels() const { return height * width; }
};

struct Window {
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  bool is_pixel() const;       // of one pixel, nothing padded or skipped
  bool fits_winograd() const;  // 3×3, next to each other, at every pixel (winograd.h)
  Size output(Size input) const;
  // The input rows under output rows [begin, end), padding included.
  std::array<int64_t, 2> covers(int64_t begin, int64_t end) const;
  // Those within the input.
  std::array<int64_t, 2> reads(int64_t begin, int64_t end, int64_t height) const;
};

struct Layout {
  enum class Kind {
    pixels,   // position = pixel; x itself, or the output of the convolution before
    planes,   // padded, one plane for each phase of the stride
    columns,  // position = output, the whole window's values side by side
    folded    // a row's taps side by side, for few channels: windows of one column remain. Rows with even coordinates
              // and with odd ones lie apart, and the buffer holds those of a band
  };
  Kind kind;
  int64_t images;  // side by side, the last dimension before the channels; pixels, columns: one after another
  Size input, output;
  int64_t channels;
  int64_t pitch;               // elements of a position
  int64_t depth;               // elements of a tap
  int64_t positions;           // with those that a tile reads beyond the last output
  int64_t row;                 // positions of an output row and its padding, of one image
  int64_t plane;               // folded: positions of one phase of the stride
  std::vector<int64_t> taps;   // shifts in elements
  std::vector<int32_t> place;  // planes: of each pixel of `images` images, -1: never read
  std::vector<int32_t> zeros;  // planes: positions that no pixel fills
  std::vector<int32_t> pixel;  // which output (image, row, column) a position is, -1: none
  Window window;

  int64_t position(int64_t image, int64_t y, int64_t x) const {
    return kind == Kind::planes ? (y * row + x) * images + image : (image * output.height + y) * output.width + x;
  }
  int64_t bytes(int64_t element) const { return positions * pitch * element; }
  // The tiles for output rows [begin, end), of all images. whole: tiles are read whole, and may read up to `readable`
  // positions.
  std::vector<Rows> tiles(int64_t begin, int64_t end, int64_t tile_rows, bool whole, int64_t readable) const;
};

// channels: of the input; step: depth is a multiple of it; rows_at_once: the most output rows that a band has;
// crowding: multiples of it are no pitch of columns, unless it is 0.
Layout lay_out(
    Layout::Kind kind, const Window& window, Size input, int64_t channels, int64_t images, int64_t step,
    int64_t rows_at_once = 0, int64_t crowding = 0);

// Columns for the outputs of another layout, which has the same outputs.
Layout columns_like(
    const Layout& other, const Window& window, Size input, int64_t channels, int64_t step, int64_t crowding = 0);

}  // namespace resnet_fused::cpu::engine
