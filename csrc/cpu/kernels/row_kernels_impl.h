// The bodies of the row kernels; included once per instruction set, see elementwise_impl.h.

#include "elementwise_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

// Activations run over up to kTile channels in the first cache.
constexpr int64_t kTile = 512;

// values[c] := the derivative of the activation at values[c].
template <class Kind, class A>
static void differentiate_each(A* __restrict values, const A* __restrict slope, int64_t channels) {
  CHANNEL_LOOP { values[c] = Kind::derivative(values[c], slope[c]); }
}
template <class A>
static void differentiate(ActivationKind kind, A* values, const A* slope, int64_t channels) {
  switch (kind) {
#define CASE(name)           \
  case ActivationKind::name: \
    return differentiate_each<activations::name>(values, slope, channels);
    RESNET_FUSED_ACTIVATIONS(CASE)
#undef CASE
  }
}

template <class A>
static inline A apply(const Affine<A>& norm, int64_t c, A y) {
  return (y - norm.center[c]) * norm.scale[c] + norm.shift[c];
}

// --- statistics ------------------------------------------------------------------------------------------------------

// Sums of (y - first row) and of its square: one read of y, no cancellation for |mean| >> std. Rows are read one by one
// in memory order: several rows at once would touch the sums less often but halve the bandwidth that prefetching gives.
template <class T>
static void statistics(const T* y, int64_t rows, int64_t channels, sum_t<T>* mean, sum_t<T>* m2) {
  using A = arith_t<T>;
  using Sum = sum_t<T>;
  CHANNEL_LOOP {
    mean[c] = 0;
    m2[c] = 0;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = y + r * channels;
    CHANNEL_LOOP {
      const A d = load(row[c]) - load(y[c]);
      mean[c] += d;
      m2[c] += Sum(d) * d;
    }
  }
  const Sum inverse = Sum(1) / static_cast<Sum>(rows);
  CHANNEL_LOOP {
    const Sum offset = mean[c] * inverse;
    const Sum rest = m2[c] - mean[c] * offset;
    m2[c] = rest < 0 ? Sum(0) : rest;
    mean[c] = load(y[c]) + offset;
  }
}

// A few rows at a time in arithmetic type, whose sums lose little and stay in the first cache, then in double.
template <class T>
static void sum(const T* y, int64_t rows, int64_t all, double* __restrict total) {
  using A = arith_t<T>;
  constexpr int64_t kRows = 32;
  A part[kTile];
  for (int64_t first = 0; first < all; first += kTile) {
    const int64_t channels = all - first < kTile ? all - first : kTile;
    double* __restrict to = total + first;
    CHANNEL_LOOP { to[c] = 0; }
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const int64_t end = rows - begin < kRows ? rows : begin + kRows;
      CHANNEL_LOOP { part[c] = 0; }
      for (int64_t r = begin; r < end; ++r) {
        const T* row = y + r * all + first;
        CHANNEL_LOOP { part[c] += load(row[c]); }
      }
      CHANNEL_LOOP { to[c] += part[c]; }
    }
  }
}

// --- forward: normalise + residual + activation
// ------------------------------------------------------------------------

enum class Residual { none, identity, projection };

template <class T, Residual residual, bool relu>
static void normalize_rows(const NormalizeArgs<T>& args, int64_t rows, int64_t channels) {
  using A = arith_t<T>;
  const Affine<A> norm = args.norm, skip_norm = args.skip_norm;
  for (int64_t r = 0; r < rows; ++r) {
    const T* y = args.y + r * channels;
    const T* skip = args.skip + (residual == Residual::none ? 0 : r * channels);
    T* out = args.out + r * channels;
    CHANNEL_LOOP {
      A z = apply(norm, c, load(y[c]));
      if constexpr (residual == Residual::identity) z += load(skip[c]) * skip_norm.scale[c];
      if constexpr (residual == Residual::projection) z += apply(skip_norm, c, load(skip[c]));
      out[c] = Store<T>::from(activate<relu>(z));
    }
  }
}

// z += the skip path's part, for the channels [first, first + count)
template <class T>
static void add_skip(
    arith_t<T>* __restrict z, const T* __restrict skip, const Affine<arith_t<T>>& norm, int64_t first,
    int64_t channels) {
  if (!skip) return;
  skip += first;
  const auto* scale = norm.scale + first;
  if (norm.center) {
    const auto *center = norm.center + first, *shift = norm.shift + first;
    CHANNEL_LOOP { z[c] += (load(skip[c]) - center[c]) * scale[c] + shift[c]; }
  } else {
    CHANNEL_LOOP { z[c] += load(skip[c]) * scale[c]; }
  }
}

// Any activation, one tile of channels at a time.
template <class T>
static void normalize_any(const NormalizeArgs<T>& args, int64_t rows, int64_t all) {
  using A = arith_t<T>;
  A z[kTile];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < all; first += kTile) {
      const int64_t channels = all - first < kTile ? all - first : kTile;
      const T *y = args.y + r * all + first, *skip = args.skip ? args.skip + r * all : nullptr;
      T* out = args.out + r * all + first;
      const Affine<A> norm{args.norm.center + first, args.norm.scale + first, args.norm.shift + first};
      CHANNEL_LOOP { z[c] = apply(norm, c, A(load(y[c]))); }
      if (const A* scale = args.act.branch_scale) {
        activate(args.act.act.kind, z, args.act.slope + first, channels);
        CHANNEL_LOOP { z[c] *= scale[first + c]; }
        add_skip(z, skip, args.skip_norm, first, channels);
      } else {
        add_skip(z, skip, args.skip_norm, first, channels);
        activate(args.act.act.kind, z, args.act.slope + first, channels);
      }
      CHANNEL_LOOP { out[c] = Store<T>::from(z[c]); }
    }
  }
}

template <class T>
static void normalize(const NormalizeArgs<T>& args, int64_t rows, int64_t channels) {
  if (!args.act.is_plain()) return normalize_any(args, rows, channels);
  const bool projection = args.skip && args.skip_norm.center, relu = args.act.is_relu();
  if (!args.skip) {
    relu ? normalize_rows<T, Residual::none, true>(args, rows, channels)
         : normalize_rows<T, Residual::none, false>(args, rows, channels);
  } else if (projection) {
    relu ? normalize_rows<T, Residual::projection, true>(args, rows, channels)
         : normalize_rows<T, Residual::projection, false>(args, rows, channels);
  } else {
    relu ? normalize_rows<T, Residual::identity, true>(args, rows, channels)
         : normalize_rows<T, Residual::identity, false>(args, rows, channels);
  }
}

// --- backward: reduction ---------------------------------------------------------------------------------------------

template <class T, Reads reads, bool projection, bool writes_p, bool relu>
static void reduce_rows(const BackwardReduceArgs<T>& args, int64_t rows, int64_t channels) {
  using A = arith_t<T>;
  using Sum = sum_t<T>;
  const Affine<A> norm = args.norm;
  const A* center2 = args.center2;
  Sum *sum = args.sum_dz, *sum_y = args.sum_dz_y, *sum_y2 = args.sum_dz_y2;
  CHANNEL_LOOP {
    sum[c] = 0;
    sum_y[c] = 0;
  }
  if constexpr (projection) CHANNEL_LOOP {
      sum_y2[c] = 0;
    }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * channels;
    const T *dout = args.dout + at, *y = args.y + at;
    const T* out = reads == Reads::output ? args.out + at : nullptr;
    const T* y2 = projection ? args.y2 + at : nullptr;
    T* dz_out = reads == Reads::output ? args.dz + at : nullptr;
    T* p = writes_p ? args.p + at : nullptr;
    CHANNEL_LOOP {
      A dz = load(dout[c]);
      const A yc = load(y[c]);
      if constexpr (reads == Reads::output) {
        dz = load(out[c]) <= 0 ? A(0) : dz;
        dz_out[c] = Store<T>::from(dz);  // exact: dz is dout or 0
      }
      if constexpr (reads == Reads::argument || writes_p) {
        const A z = apply(norm, c, yc);
        if constexpr (reads == Reads::argument) dz = z <= 0 ? A(0) : dz;
        if constexpr (writes_p) p[c] = Store<T>::from(activate<relu>(z));
      }
      sum[c] += dz;
      sum_y[c] += Sum(dz) * (yc - norm.center[c]);
      if constexpr (projection) sum_y2[c] += Sum(dz) * (load(y2[c]) - center2[c]);
    }
  }
}

// Any activation, one tile of channels at a time; dz is kept, since computing its derivative again may cost more than
// memory traffic.
template <class T>
static void reduce_any(const BackwardReduceArgs<T>& args, int64_t rows, int64_t all) {
  using A = arith_t<T>;
  using Sum = sum_t<T>;
  const auto clear = [&](Sum* sums) {
    for (int64_t c = 0; sums && c < all; ++c) sums[c] = 0;
  };
  clear(args.sum_dz);
  clear(args.sum_dz_y);
  clear(args.y2 ? args.sum_dz_y2 : nullptr);
  clear(args.sum_slope);
  clear(args.sum_act);
  A z[kTile], value[kTile];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < all; first += kTile) {
      const int64_t channels = all - first < kTile ? all - first : kTile, at = r * all + first;
      const T *dout = args.dout + at, *y = args.y + at;
      const A *slope = args.act.slope + first, *scale = args.act.branch_scale;
      const Affine<A> norm{args.norm.center + first, args.norm.scale + first, args.norm.shift + first};
      if (args.reads == Reads::output) {
        const T* out = args.out + at;
        CHANNEL_LOOP { z[c] = load(out[c]); }
      } else {
        CHANNEL_LOOP { z[c] = apply(norm, c, A(load(y[c]))); }
        add_skip(z, args.skip ? args.skip + r * all : nullptr, args.skip_norm, first, channels);
      }
      if (args.p || args.sum_act) {
        CHANNEL_LOOP { value[c] = z[c]; }
        activate(args.act.act.kind, value, slope, channels);
      }
      if (args.p) {
        T* p = args.p + at;
        CHANNEL_LOOP { p[c] = Store<T>::from(value[c]); }
      }
      if (args.sum_act) {
        Sum* sum = args.sum_act + first;
        CHANNEL_LOOP { sum[c] += Sum(load(dout[c])) * value[c]; }
      }
      if (args.sum_slope) {
        Sum* sum = args.sum_slope + first;
        CHANNEL_LOOP { sum[c] += z[c] > 0 ? Sum(0) : Sum(load(dout[c]) * (scale ? scale[first + c] : A(1))) * z[c]; }
      }
      differentiate(args.act.act.kind, z, slope, channels);
      if (scale) CHANNEL_LOOP {
          z[c] *= scale[first + c];
        }
      T* dz = args.dz + at;
      // Loops of their own: GCC 12 turns one that also stores 16 bits into branches, a value at a time.
      CHANNEL_LOOP {
        // where the derivative is zero the gradient is zero, whatever dout is: PyTorch leaves such values out
        const A product = load(dout[c]) * z[c];
        z[c] = z[c] == 0 ? A(0) : product;
      }
      CHANNEL_LOOP { dz[c] = Store<T>::from(z[c]); }
      CHANNEL_LOOP { z[c] = load(dz[c]); }  // the sums count the value that later passes read
      Sum *sum = args.sum_dz + first, *sum_y = args.sum_dz_y + first;
      CHANNEL_LOOP {
        sum[c] += z[c];
        sum_y[c] += Sum(z[c]) * (load(y[c]) - norm.center[c]);
      }
      if (args.y2) {
        const T* y2 = args.y2 + at;
        const A* center2 = args.center2 + first;
        Sum* sum_y2 = args.sum_dz_y2 + first;
        CHANNEL_LOOP { sum_y2[c] += Sum(z[c]) * (load(y2[c]) - center2[c]); }
      }
    }
  }
}

template <class T>
static void backward_reduce(const BackwardReduceArgs<T>& args, int64_t rows, int64_t channels) {
  if (!args.act.is_plain() || args.skip) return reduce_any(args, rows, channels);
  switch (args.reads) {
    case Reads::output:  // the block's end: nothing follows that needs p
      return args.y2 ? reduce_rows<T, Reads::output, true, false, false>(args, rows, channels)
                     : reduce_rows<T, Reads::output, false, false, false>(args, rows, channels);
    case Reads::argument:
      return args.p ? reduce_rows<T, Reads::argument, false, true, true>(args, rows, channels)
                    : reduce_rows<T, Reads::argument, false, false, true>(args, rows, channels);
    case Reads::nothing:
      if (args.y2) return reduce_rows<T, Reads::nothing, true, false, false>(args, rows, channels);
      return args.p ? reduce_rows<T, Reads::nothing, false, true, false>(args, rows, channels)
                    : reduce_rows<T, Reads::nothing, false, false, false>(args, rows, channels);
  }
}

// --- backward: apply -------------------------------------------------------------------------------------------------

template <class T, Reads reads, bool y_term, bool has_add>
static void apply_rows(const BackwardApplyArgs<T>& args, int64_t rows, int64_t channels) {
  using A = arith_t<T>;
  constexpr bool reads_y = y_term || reads == Reads::argument;
  const Affine<A> norm = args.norm;
  const A *k_dz = args.k_dz, *k_y = args.k_y, *k = args.k, *k_add = args.k_add;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * channels;
    const T* dz_in = args.dz + at;
    const T* y = reads_y ? args.y + at : nullptr;
    const T* add = has_add ? args.add + at : nullptr;
    T* dx = args.dx + at;
    CHANNEL_LOOP {
      A dz = load(dz_in[c]);
      if constexpr (reads == Reads::argument) dz = apply(norm, c, A(load(y[c]))) <= 0 ? A(0) : dz;
      A result = k_dz[c] * dz;
      if constexpr (y_term) result += k_y[c] * (load(y[c]) - norm.center[c]) + k[c];
      if constexpr (has_add) result += k_add[c] * load(add[c]);
      dx[c] = Store<T>::from(result);
    }
  }
}

template <class T, Reads reads>
static void apply_masked(const BackwardApplyArgs<T>& args, int64_t rows, int64_t channels) {
  if (args.y_term) {
    args.add ? apply_rows<T, reads, true, true>(args, rows, channels)
             : apply_rows<T, reads, true, false>(args, rows, channels);
  } else {
    args.add ? apply_rows<T, reads, false, true>(args, rows, channels)
             : apply_rows<T, reads, false, false>(args, rows, channels);
  }
}

template <class T>
static void backward_apply(const BackwardApplyArgs<T>& args, int64_t rows, int64_t channels) {
  args.reads == Reads::argument ? apply_masked<T, Reads::argument>(args, rows, channels)
                                : apply_masked<T, Reads::nothing>(args, rows, channels);
}

// --- one bit per value ---
// ---------------------------------------------------------------------------------------------------

// Eight bits are held as the eight bytes of a word, each 0 or 1; loops over values read and write them (little-endian).
static inline uint64_t spread(uint8_t bits) {
  const uint64_t own = bits * 0x0101010101010101u & 0x8040201008040201u;  // byte j holds bit j, in its place
  return (own + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}
static inline uint8_t gather(uint64_t bytes) { return static_cast<uint8_t>(bytes * 0x0102040810204080u >> 56); }

constexpr int64_t kBitTile = 512;

// `count` bits; the rest of the last byte is zero.
template <class T>
static void pack_passing(const T* __restrict out, int64_t count, uint8_t* __restrict bits) {
  uint64_t words[kBitTile / 8];
  uint8_t* one = reinterpret_cast<uint8_t*>(words);
  for (int64_t done = 0; done < count; done += kBitTile) {
    const int64_t n = count - done < kBitTile ? count - done : kBitTile, whole = (n + 7) / 8;
    words[whole - 1] = 0;
    for (int64_t k = 0; k < n; ++k) one[k] = load(out[done + k]) <= 0 ? 0 : 1;
    for (int64_t k = 0; k < whole; ++k) bits[done / 8 + k] = gather(words[k]);
  }
}

// On bit patterns, so that one loop serves every type of the same size; GCC 12 fails on selections of 16-bit structs.
template <class Word>
static void unpack_where(
    const Word* __restrict dout, const uint8_t* __restrict bits, int64_t count, Word* __restrict dz) {
  uint64_t words[kBitTile / 8];
  const uint8_t* one = reinterpret_cast<const uint8_t*>(words);
  for (int64_t done = 0; done < count; done += kBitTile) {
    const int64_t n = count - done < kBitTile ? count - done : kBitTile;
    for (int64_t k = 0; k < (n + 7) / 8; ++k) words[k] = spread(bits[done / 8 + k]);
    for (int64_t k = 0; k < n; ++k) dz[done + k] = dout[done + k] & (Word(0) - one[k]);
  }
}

template <int size>
struct WordOf;
template <>
struct WordOf<2> {
  typedef uint16_t __attribute__((may_alias)) type;
};
template <>
struct WordOf<4> {
  typedef uint32_t __attribute__((may_alias)) type;
};
template <>
struct WordOf<8> {
  typedef uint64_t __attribute__((may_alias)) type;
};

// Where bytes hold whole pixels, all rows are one long row.
static inline void join_rows(int64_t& rows, int64_t& channels) {
  if (channels % 8 != 0) return;
  channels *= rows;
  rows = 1;
}

template <class T>
static void passing_bits(const T* out, int64_t rows, int64_t channels, uint8_t* bits) {
  join_rows(rows, channels);
  for (int64_t r = 0; r < rows; ++r) pack_passing(out + r * channels, channels, bits + r * ((channels + 7) / 8));
}

template <class T>
static void where_bits(const T* dout, const uint8_t* bits, int64_t rows, int64_t channels, T* dz) {
  using Word = typename WordOf<sizeof(T)>::type;
  join_rows(rows, channels);
  for (int64_t r = 0; r < rows; ++r)
    unpack_where(
        reinterpret_cast<const Word*>(dout + r * channels), bits + r * ((channels + 7) / 8), channels,
        reinterpret_cast<Word*>(dz + r * channels));
}

// --- finiteness ------------------------------------------------------------------------------------------------------

// The bits of an infinity without its sign: no value that is not finite has smaller ones.
static inline uint16_t magnitude(bf16 v) { return v.bits & 0x7fffu; }
static inline uint16_t magnitude(f16 v) { return v.bits & 0x7fffu; }
static inline uint32_t magnitude(float v) { return __builtin_bit_cast(uint32_t, v) & 0x7fffffffu; }
static inline uint64_t magnitude(double v) { return __builtin_bit_cast(uint64_t, v) & 0x7fffffffffffffffull; }
template <class T>
struct Infinity;
template <>
struct Infinity<bf16> {
  static constexpr uint16_t bits = 0x7f80u;
};
template <>
struct Infinity<f16> {
  static constexpr uint16_t bits = 0x7c00u;
};
template <>
struct Infinity<float> {
  static constexpr uint32_t bits = 0x7f800000u;
};
template <>
struct Infinity<double> {
  static constexpr uint64_t bits = 0x7ff0000000000000ull;
};

template <class T>
static bool all_finite(const T* x, int64_t count) {
  auto largest = magnitude(x[0]);
  for (int64_t i = 0; i < count; ++i) {
    const auto m = magnitude(x[i]);
    largest = m > largest ? m : largest;
  }
  return largest < Infinity<T>::bits;
}

// --- max pooling -----------------------------------------------------------------------------------------------------

template <class T>
static void max_of(const T* const* rows, int64_t count, int64_t channels, T* __restrict out) {
  arith_t<T> best[kTile];
  for (int64_t from = 0; from < channels; from += kTile, out += kTile) {
    const int64_t rest = channels - from < kTile ? channels - from : kTile;
    const auto tile = [&](int64_t channels) {
      const T* first = rows[0] + from;
      CHANNEL_LOOP { best[c] = load(first[c]); }
      for (int64_t i = 1; i < count; ++i) {
        const T* row = rows[i] + from;
        CHANNEL_LOOP {
          const auto v = load(row[c]);
          best[c] = (v > best[c]) | (v != v) ? v : best[c];
        }
      }
      CHANNEL_LOOP { out[c] = Store<T>::from(best[c]); }
    };
    tile(rest);
  }
}

// Places travel in the arithmetic type so that every lane of the loop has one width.
template <class T>
static void max_and_place(
    const T* const* rows, const uint8_t* places, int64_t count, int64_t all, T* __restrict out,
    uint8_t* __restrict which) {
  using A = arith_t<T>;
  A best[kTile], place[kTile];
  for (int64_t from = 0; from < all; from += kTile) {
    const int64_t channels = all - from < kTile ? all - from : kTile;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = rows[i] + from;
      const A at = places[i];
      const bool first = i == 0;  // starts the maximum, so that a window of -inf has one
      CHANNEL_LOOP {
        const A v = load(row[c]);
        const bool take = first | (v > best[c]) | (v != v);
        best[c] = take ? v : best[c];
        place[c] = take ? at : place[c];
      }
    }
    CHANNEL_LOOP { out[from + c] = Store<T>::from(best[c]); }
    CHANNEL_LOOP { which[from + c] = static_cast<uint8_t>(static_cast<int32_t>(place[c])); }
  }
}

typedef uint64_t Line __attribute__((vector_size(64), aligned(2), may_alias));

template <class T>
static void windows(const T* row, int64_t step, int64_t used, int64_t pitch, int64_t count, T* out) {
  if (pitch * sizeof(T) == 64) {
    uint8_t bytes[64];
    for (int64_t i = 0; i < 64; ++i) bytes[i] = i < used * static_cast<int64_t>(sizeof(T)) ? 255 : 0;
    const Line mask = *reinterpret_cast<const Line*>(bytes);
    for (int64_t i = 0; i < count; ++i)
      *reinterpret_cast<Line*>(out + i * pitch) = *reinterpret_cast<const Line*>(row + i * step) & mask;
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < pitch; ++k) out[i * pitch + k] = k < used ? row[i * step + k] : T{};
}

template <class T>
static void add_where(
    const T* __restrict dout, const uint8_t* __restrict position, uint8_t at, int64_t channels,
    arith_t<T>* __restrict sum) {
  CHANNEL_LOOP { sum[c] += position[c] == at ? load(dout[c]) : arith_t<T>(0); }
}

template <class T>
static void store(const arith_t<T>* __restrict sum, int64_t channels, T* __restrict out) {
  CHANNEL_LOOP { out[c] = Store<T>::from(sum[c]); }
}

template <class T>
static void widen(const T* __restrict values, int64_t channels, arith_t<T>* __restrict out) {
  CHANNEL_LOOP { out[c] = load(values[c]); }
}

template <class T>
static constexpr RowKernels<T> table = {
    statistics<T>, sum<T>,       normalize<T>, backward_reduce<T>, backward_apply<T>, passing_bits<T>, where_bits<T>,
    all_finite<T>, add_where<T>, max_of<T>,    max_and_place<T>,   windows<T>,        store<T>,        widen<T>};

const RowKernels<float>& kernels(float) { return table<float>; }
const RowKernels<double>& kernels(double) { return table<double>; }
const RowKernels<bf16>& kernels(bf16) { return table<bf16>; }
const RowKernels<f16>& kernels(f16) { return table<f16>; }

}  // namespace resnet_fused::cpu::KERNELS_ISA

#undef CHANNEL_LOOP
