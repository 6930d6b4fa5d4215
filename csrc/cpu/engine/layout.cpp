#include "layout.h"

#include <algorithm>

#include "../../block/integer_division.h"

namespace resnet_fused::cpu::engine {
namespace {

constexpr int64_t kLinesOfPage = 64;  // a page is what crowds

// One dimension of planes: the coordinates of phase a are those of padded inputs a, a + stride, a + 2 stride, ...
struct Dimension {
  int64_t extent;               // coordinates of every plane; neighbours share their padding
  std::vector<int64_t> beyond;  // by phase: one past the last coordinate that is read, 0: never read
};

Dimension planes_of(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  Dimension d{out, std::vector<int64_t>(stride, 0)};
  for (int64_t k = 0; k < kernel; ++k) {
    auto& beyond = d.beyond[k * dilation % stride];
    beyond = std::max(beyond, out + k * dilation / stride);
  }
  for (int64_t phase = 0; phase < stride; ++phase) {
    if (d.beyond[phase] == 0) continue;
    const int64_t first =
        std::max<int64_t>(0, (padding - phase + stride - 1) / stride);  // the first that is no padding
    const int64_t last = (in - 1 + padding - phase) / stride;
    if (in - 1 + padding < phase || first > last) continue;  // only padding
    // reads beyond the extent have to fall on the next row's padding, and no pixel may lie there
    const int64_t end = std::min(last + 1, d.beyond[phase]);
    d.extent = std::max({d.extent, end, d.beyond[phase] - first});
  }
  return d;
}

void lay_out_planes(Layout& l) {
  const auto& w = l.window;
  const auto rows = planes_of(l.input.height, l.output.height, w.kernel[0], w.stride[0], w.padding[0], w.dilation[0]);
  const auto columns = planes_of(l.input.width, l.output.width, w.kernel[1], w.stride[1], w.padding[1], w.dilation[1]);
  l.row = columns.extent;
  const int64_t height = *std::max_element(rows.beyond.begin(), rows.beyond.end());
  std::vector<int64_t> start(w.stride[0] * w.stride[1], -1);
  int64_t used = 0;
  for (int64_t a = 0; a < w.stride[0]; ++a)
    for (int64_t b = 0; b < w.stride[1]; ++b) {
      if (rows.beyond[a] == 0 || columns.beyond[b] == 0) continue;
      start[a * w.stride[1] + b] = used;
      used += (height + 1) * l.row * l.images;  // and a row of zeros behind the last one
    }
  l.positions = used + kTileRows + l.row * l.images;
  for (int64_t r = 0; r < w.kernel[0]; ++r)
    for (int64_t s = 0; s < w.kernel[1]; ++s) {
      const int64_t y = r * w.dilation[0], x = s * w.dilation[1];
      const int64_t plane = start[y % w.stride[0] * w.stride[1] + x % w.stride[1]];
      l.taps.push_back((plane + (y / w.stride[0] * l.row + x / w.stride[1]) * l.images) * l.pitch);
    }
  l.place.assign(l.images * l.input.pixels(), -1);
  std::vector<bool> filled(l.positions);
  for (int64_t y = 0; y < l.input.height; ++y)
    for (int64_t x = 0; x < l.input.width; ++x) {
      const int64_t py = y + w.padding[0], px = x + w.padding[1];
      const int64_t a = py % w.stride[0], b = px % w.stride[1], row = py / w.stride[0], column = px / w.stride[1];
      if (row >= rows.beyond[a] || column >= columns.beyond[b]) continue;
      const int64_t at = start[a * w.stride[1] + b] + (row * l.row + column) * l.images;
      for (int64_t n = 0; n < l.images; ++n) {
        l.place[n * l.input.pixels() + y * l.input.width + x] = static_cast<int32_t>(at + n);
        filled[at + n] = true;
      }
    }
  for (int64_t p = 0; p < l.positions; ++p)
    if (!filled[p]) l.zeros.push_back(static_cast<int32_t>(p));
}

void lay_out_folded(Layout& l, int64_t rows_at_once) {
  const auto& w = l.window;
  l.row = l.output.width;
  l.plane = (rows_at_once + (w.kernel[0] - 1) * w.dilation[0] / w.stride[0]) * l.row;
  l.positions = w.stride[0] * l.plane + kTileRows;
  for (int64_t r = 0; r < w.kernel[0]; ++r) {
    const int64_t y = r * w.dilation[0];
    l.taps.push_back((y % w.stride[0] * l.plane + y / w.stride[0] * l.row) * l.pitch);
  }
}

}  // namespace

bool Window::is_pixel() const {
  for (int d = 0; d < 2; ++d)
    if (kernel[d] != 1 || stride[d] != 1 || padding[d] != 0) return false;
  return true;
}

bool Window::fits_winograd() const {
  for (int d = 0; d < 2; ++d)
    if (kernel[d] != 3 || stride[d] != 1 || dilation[d] != 1) return false;
  return true;
}

Size Window::output(Size input) const {
  const auto length = [&](int64_t in, int d) {
    return (in + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  };
  return {length(input.height, 0), length(input.width, 1)};
}

std::array<int64_t, 2> Window::covers(int64_t begin, int64_t end) const {
  return {begin * stride[0] - padding[0], (end - 1) * stride[0] - padding[0] + (kernel[0] - 1) * dilation[0] + 1};
}

std::array<int64_t, 2> Window::reads(int64_t begin, int64_t end, int64_t height) const {
  const auto [first, beyond] = covers(begin, end);
  const int64_t from = std::clamp<int64_t>(first, 0, height);
  return {from, std::clamp<int64_t>(beyond, from, height)};
}

Layout lay_out(
    Layout::Kind kind, const Window& window, Size input, int64_t channels, int64_t images, int64_t step,
    int64_t rows_at_once, int64_t crowding) {
  Layout l{};
  l.kind = kind;
  l.images = images;
  l.input = input;
  l.output = window.output(input);
  l.channels = channels;
  l.window = window;
  const int64_t across = kind == Layout::Kind::columns  ? window.kernel[0] * window.kernel[1]
                         : kind == Layout::Kind::folded ? window.kernel[1]
                                                        : 1;
  l.pitch = l.depth = round_up(across * channels, step);
  if (kind == Layout::Kind::columns && crowding > 0 && l.pitch % crowding == 0) l.pitch += crowding / kLinesOfPage;
  l.row = l.output.width;
  switch (kind) {
    case Layout::Kind::planes:
      lay_out_planes(l);
      break;
    case Layout::Kind::folded:
      lay_out_folded(l, rows_at_once);
      break;
    default:
      l.taps = {0};
      l.positions = images * l.output.pixels() + kTileRows;
  }
  l.pixel.assign(std::max(l.positions, images * l.output.pixels() + kTileRows), -1);
  const int64_t outputs = l.output.pixels();
  for (int64_t n = 0; n < images; ++n)
    for (int64_t y = 0; y < l.output.height; ++y)
      for (int64_t x = 0; x < l.output.width; ++x) {
        l.pixel[l.position(n, y, x)] = static_cast<int32_t>(n * outputs + y * l.output.width + x);
      }
  return l;
}

Layout columns_like(
    const Layout& other, const Window& window, Size input, int64_t channels, int64_t step, int64_t crowding) {
  Layout l = lay_out(Layout::Kind::columns, window, input, channels, other.images, step, 0, crowding);
  l.positions = std::max(l.positions, other.positions);  // the other's, of folded rows, hold a band
  l.row = other.row;
  l.pixel = other.pixel;
  return l;
}

std::vector<Rows> Layout::tiles(int64_t begin, int64_t end, int64_t tile_rows, bool whole, int64_t readable) const {
  std::vector<Rows> tiles;
  const auto add = [&](int64_t from, int64_t to) {
    // equal parts where a tile's cost depends on its rows, full ones where it does not
    const int64_t count = ceil_div(to - from, tile_rows);
    const int64_t part = whole ? tile_rows : ceil_div(to - from, count);
    for (int64_t at = from; at < to; at += part) {
      const int64_t stop = std::min(at + part, to),
                    excess = whole ? std::max<int64_t>(0, at + tile_rows - readable) : 0;
      const int64_t first = at - excess;
      tiles.push_back(
          {static_cast<int32_t>(first), static_cast<int16_t>(at - first), static_cast<int16_t>(stop - first)});
    }
  };
  const bool padded = kind == Kind::planes;
  const bool row_by_row = padded && (images > 1 || !whole);
  const int64_t side = padded ? images : 1;
  if (!padded && images > 1) {
    add(0, images * output.pixels());  // all rows of all images
  } else if (row_by_row) {
    for (int64_t y = begin; y < end; ++y) add(y * row * side, (y * row + output.width) * side);
  } else {
    add(begin * row, (end - 1) * row + output.width);
  }
  return tiles;
}

}  // namespace resnet_fused::cpu::engine
