// Writes a convolution's input where its layout wants it.
#pragma once

#include <cstring>
#include <vector>

#include "layout.h"
#include "operand.h"

namespace resnet_fused::cpu::engine {

// Neighbouring pixels of an operand, and zeros up to the pitch.
template <class T>
void put(const Operand<T>& from, int64_t first, int64_t count, int64_t pitch, T* to) {
  const int64_t channels = from.channels();
  if (pitch == channels) {
    if (const T* made = from.pixels(first, count, to); made != to) std::memcpy(to, made, count * channels * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      T* at = to + i * pitch;
      if (const T* made = from.pixels(first + i, 1, at); made != at) std::memcpy(at, made, channels * sizeof(T));
      std::memset(at + channels, 0, (pitch - channels) * sizeof(T));
    }
  }
  if (from.not_finite && !row_kernels<T>().all_finite(to, count * pitch)) *from.not_finite = true;
}

// Input rows [begin, end) of an image, the n-th of those side by side.
template <class T>
void fill_planes(const Operand<T>& from, const Layout& l, int64_t n, int64_t image, int64_t begin, int64_t end, T* to) {
  const int64_t width = l.input.width, first = image * l.input.pixels();
  const bool dense = l.window.stride[1] == 1 && l.images == 1;
  std::vector<T> row;
  for (int64_t y = begin; y < end; ++y) {
    const int32_t* place = l.place.data() + n * l.input.pixels() + y * width;
    if (dense && place[0] >= 0) {
      int64_t count = width;
      while (place[count - 1] < 0) --count;
      put(from, first + y * width, count, l.pitch, to + place[0] * l.pitch);
      continue;
    }
    if (!from.is_given()) row.resize(width * l.channels);
    Operand<T> made(from.pixels(first + y * width, width, row.data()), l.channels);
    made.not_finite = from.not_finite;
    for (int64_t c = 0; c < width; ++c)
      if (place[c] >= 0) put(made, c, 1, l.pitch, to + place[c] * l.pitch);
  }
}

// The windows of output rows [begin, end), at the positions that `main` gives to these outputs; to: position `origin`.
template <class T>
void fill_columns(
    const Operand<T>& from, const Layout& l, const Layout& main, int64_t n, int64_t image, int64_t begin, int64_t end,
    T* to, int64_t origin = 0) {
  const auto& w = l.window;
  const int64_t taps = w.kernel[0] * w.kernel[1], pixels = image * l.input.pixels();
  if (w.is_pixel() && main.kind == Layout::Kind::columns) {
    const int64_t width = l.input.width;
    put(from, pixels + begin * width, (end - begin) * width, l.pitch,
        to + (main.position(n, begin, 0) - origin) * l.pitch);
    return;
  }
  for (int64_t y = begin; y < end; ++y)
    for (int64_t c = 0; c < l.output.width; ++c) {
      T* out = to + (main.position(n, y, c) - origin) * l.pitch;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t iy = y * w.stride[0] - w.padding[0] + tap / w.kernel[1] * w.dilation[0];
        const int64_t ix = c * w.stride[1] - w.padding[1] + tap % w.kernel[1] * w.dilation[1];
        T* at = out + tap * l.channels;
        if (iy < 0 || ix < 0 || iy >= l.input.height || ix >= l.input.width)
          std::memset(at, 0, l.channels * sizeof(T));
        else
          put(from, pixels + iy * l.input.width + ix, 1, l.channels, at);
      }
      std::memset(out + taps * l.channels, 0, (l.pitch - taps * l.channels) * sizeof(T));
    }
}

}  // namespace resnet_fused::cpu::engine
