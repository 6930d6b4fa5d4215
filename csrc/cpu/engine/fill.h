// Writes a convolution's input where its layout wants it.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "layout.h"
#include "operand.h"

namespace resnet_fused::cpu::engine {

// Pixels as they are, or widened where floats are multiplied.
template <class T>
void copy(const T* from, int64_t count, T* to) {
  if (from != to) std::memcpy(to, from, count * sizeof(T));
}
template <class T>
void copy(const T* from, int64_t count, float* to)
  requires(!std::is_same_v<T, float>)
{
  row_kernels<T>().widen(from, count, to);
}

// Neighbouring pixels of an operand, and zeros up to the pitch. P: the element type of what is multiplied.
template <class T, class P>
void put(const Operand<T>& from, int64_t first, int64_t count, int64_t pitch, P* to) {
  const int64_t channels = from.channels();
  std::vector<T> narrow;
  if (!std::is_same_v<T, P> && !from.is_given()) narrow.resize(count * channels);
  const auto put_dense = [&](int64_t first, int64_t count, P* to) {
    if constexpr (std::is_same_v<T, P>)
      copy(from.pixels(first, count, to), count * channels, to);
    else
      copy(from.pixels(first, count, narrow.data()), count * channels, to);
  };
  if (pitch == channels) {
    put_dense(first, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      put_dense(first + i, 1, to + i * pitch);
      std::memset(to + i * pitch + channels, 0, (pitch - channels) * sizeof(P));
    }
  }
  if (from.not_finite && !row_kernels<P>().all_finite(to, count * pitch)) *from.not_finite = true;
}

// Input rows [begin, end) of an image, the n-th of those side by side.
template <class T, class P>
void fill_planes(const Operand<T>& from, const Layout& l, int64_t n, int64_t image, int64_t begin, int64_t end, P* to) {
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
template <class T, class P>
void fill_columns(
    const Operand<T>& from, const Layout& l, const Layout& main, int64_t n, int64_t image, int64_t begin, int64_t end,
    P* to, int64_t origin = 0) {
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
      P* out = to + (main.position(n, y, c) - origin) * l.pitch;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t iy = y * w.stride[0] - w.padding[0] + tap / w.kernel[1] * w.dilation[0];
        const int64_t ix = c * w.stride[1] - w.padding[1] + tap % w.kernel[1] * w.dilation[1];
        P* at = out + tap * l.channels;
        if (iy < 0 || ix < 0 || iy >= l.input.height || ix >= l.input.width)
          std::memset(at, 0, l.channels * sizeof(P));
        else
          put(from, pixels + iy * l.input.width + ix, 1, l.channels, at);
      }
      std::memset(out + taps * l.channels, 0, (l.pitch - taps * l.channels) * sizeof(P));
    }
}

}  // namespace resnet_fused::cpu::engine
