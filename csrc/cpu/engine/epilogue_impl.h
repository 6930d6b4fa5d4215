// What the sums of products become; included once per file of kernels.
//
// A full panel with ReLU or no activation, and with no scale but the norm's, is finished in registers; everything else
// in the first cache.

#include "vectors_impl.h"

namespace resnet_fused::cpu::KERNELS_ISA {

using engine::Epilogue;
using engine::Gathers;
using engine::kPanel;

template <class T, bool adds, bool watches>
struct InRegisters {
  using Element = T;
  static constexpr int vectors = kPanel / Vector::lanes;

  // The results whose channels begin at `channel`.
  class Panel {
   public:
    inline Panel(const Epilogue<T>& e, int64_t channel)
        : e_(e), channel_(channel), least_(Vector::fill(e.act.is(ActivationKind::relu) ? 0.0f : -__builtin_inff())) {
      for (int v = 0; v < vectors; ++v) {
        scale_[v] = Vector::load(e.scale + channel + v * Vector::lanes);
        shift_[v] = Vector::load(e.shift + channel + v * Vector::lanes);
      }
    }

    // Finishes the sums of one position and writes them to position `target` of the output.
    inline void row(const Vector::Type* sums, int32_t target) const {
      if (target < 0) return;
      const int64_t at = target * e_.pitch + channel_;
      if constexpr (adds)
        for (int64_t c = 0; c < kPanel; c += 64 / sizeof(T)) __builtin_prefetch(e_.out + at + e_.ahead + c, 1);
      typename Vector::Type z[vectors];
      for (int v = 0; v < vectors; ++v) {
        z[v] = Vector::multiply_add(sums[v], scale_[v], shift_[v]);
        if constexpr (adds) z[v] = Vector::add(z[v], Vector::load(e_.residual + at + v * Vector::lanes));
        z[v] = Vector::at_least(least_, z[v]);
      }
      Vector::store_panel(e_.out + at, z);
      if constexpr (watches) {
        bool finite = true;
        for (int v = 0; v < vectors; ++v) finite &= Vector::all_finite(z[v]);
        if (!finite) *e_.not_finite = true;
      }
    }

   private:
    const Epilogue<T>& e_;
    const int64_t channel_;
    typename Vector::Type scale_[vectors], shift_[vectors], least_;
  };

  // Rows [from, to) of a tile of sums, whose positions of the output `target` names.
  static inline void rows(
      const float* sums, const Epilogue<T>& e, int64_t channel, const int32_t* target, int from, int to) {
    const Panel finish(e, channel);
    for (int r = from; r < to; ++r) {
      typename Vector::Type z[vectors];
      for (int v = 0; v < vectors; ++v) z[v] = Vector::load(sums + r * kPanel + v * Vector::lanes);
      finish.row(z, target[r]);
    }
  }
};

// The results as they are, and the statistics of each channel, counted from its first result: nothing cancels where
// the mean is large. They are those of what is written: of sums that all round to one value the variance is zero, and
// so is their distance from the mean.
template <class T>
struct WithStatistics {
  static inline void rows(
      const float* sums, const Epilogue<T>& e, int64_t channel, const int32_t* target, int from, int to) {
    constexpr int vectors = kPanel / Vector::lanes;
    const int64_t panel = channel / kPanel;
    float* gathered = e.sums + 3 * channel;
    int count = e.rows[panel];
    typename Vector::Type shift[vectors], first[vectors], sum[vectors], square[vectors], z[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t c = v * Vector::lanes;
      shift[v] = Vector::load(e.shift + channel + c);
      first[v] = Vector::load(gathered + c);
      sum[v] = Vector::load(gathered + kPanel + c);
      square[v] = Vector::load(gathered + 2 * kPanel + c);
    }
    T* out = e.out + channel;
    for (int row = from; row < to; ++row) {
      if (target[row] < 0) continue;
      for (int v = 0; v < vectors; ++v)
        z[v] = Vector::add(Vector::load(sums + row * kPanel + v * Vector::lanes), shift[v]);
      T* to = out + target[row] * e.pitch;
      Vector::store_panel(to, z);
      for (int v = 0; v < vectors; ++v) z[v] = Vector::load(to + v * Vector::lanes);
      if (count++ == 0)
        for (int v = 0; v < vectors; ++v) {
          Vector::store(gathered + v * Vector::lanes, z[v]);
          first[v] = z[v];
          sum[v] = square[v] = Vector::zero();
        }
      for (int v = 0; v < vectors; ++v) {
        const auto d = Vector::subtract(z[v], first[v]);
        sum[v] = Vector::add(sum[v], d);
        square[v] = Vector::multiply_add(d, d, square[v]);
      }
    }
    e.rows[panel] = count;
    for (int v = 0; v < vectors; ++v) {
      Vector::store(gathered + kPanel + v * Vector::lanes, sum[v]);
      Vector::store(gathered + 2 * kPanel + v * Vector::lanes, square[v]);
    }
  }
};

// A gradient behind the norm and ReLU of y: dz and the sums behind the norm's own gradients, of what is written.
template <class T, bool relu>
struct Differentiates {
  static inline void rows(
      const float* sums, const Epilogue<T>& e, int64_t channel, const int32_t* target, int from, int to) {
    constexpr int vectors = kPanel / Vector::lanes;
    float* gathered = e.sums + 2 * channel;
    typename Vector::Type center[vectors], scale[vectors], shift[vectors], sum[vectors], sum_y[vectors], dz[vectors],
        distance[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t c = v * Vector::lanes;
      center[v] = Vector::load(e.behind.center + channel + c);
      scale[v] = Vector::load(e.behind.scale + channel + c);
      shift[v] = Vector::load(e.behind.shift + channel + c);
      sum[v] = Vector::load(gathered + c);
      sum_y[v] = Vector::load(gathered + kPanel + c);
    }
    T* out = e.out + channel;
    const T* y = e.behind.y + channel;
    for (int row = from; row < to; ++row) {
      if (target[row] < 0) continue;
      const int64_t at = target[row] * e.pitch;
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = v * Vector::lanes;
        const auto d = Vector::subtract(Vector::load(y + at + c), center[v]);
        dz[v] = Vector::load(sums + row * kPanel + c);
        if constexpr (relu) dz[v] = Vector::where_positive(Vector::multiply_add(d, scale[v], shift[v]), dz[v]);
        distance[v] = d;
      }
      Vector::store_panel(out + at, dz);
      for (int v = 0; v < vectors; ++v) {
        dz[v] = Vector::load(out + at + v * Vector::lanes);
        sum[v] = Vector::add(sum[v], dz[v]);
        sum_y[v] = Vector::multiply_add(dz[v], distance[v], sum_y[v]);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      Vector::store(gathered + v * Vector::lanes, sum[v]);
      Vector::store(gathered + kPanel + v * Vector::lanes, sum_y[v]);
    }
  }
};

template <class T>
struct InMemory {
  static void rows(const float* sums, const Epilogue<T>& e, int64_t channel, const int32_t* target, int from, int to) {
    for (int r = from; r < to; ++r)
      if (target[r] >= 0) row(sums + r * kPanel, e, channel, target[r]);
  }

  static void row(const float* sums, const Epilogue<T>& e, int64_t channel, int64_t target) {
    static constexpr float zeros[kPanel] = {};
    const int64_t rest = e.channels - channel, channels = rest < kPanel ? rest : kPanel;
    const int64_t at = target * e.pitch + channel;
    const float* slope = e.slope ? e.slope + channel : zeros;
    alignas(64) float z[kPanel];
    CHANNEL_LOOP { z[c] = sums[c] * e.scale[channel + c] + e.shift[channel + c]; }
    if (e.branch_scale) {
      activate(e.act.kind, z, slope, channels);
      CHANNEL_LOOP { z[c] *= e.branch_scale[channel + c]; }
    }
    if (e.residual && e.residual_scale) {
      CHANNEL_LOOP { z[c] += load(e.residual[at + c]) * e.residual_scale[channel + c]; }
    } else if (e.residual) {
      CHANNEL_LOOP { z[c] += load(e.residual[at + c]); }
    }
    if (!e.branch_scale) activate(e.act.kind, z, slope, channels);
    T* out = e.out + at;
    CHANNEL_LOOP { out[c] = Store<T>::from(z[c]); }
    if (e.not_finite) {
      float wild = 0;
      for (int64_t c = 0; c < channels; ++c) wild += load(out[c]) * 0.0f;
      if (wild != 0) *e.not_finite = true;
    }
  }
};

// Calls body with the struct above that fits every full panel.
template <class T, class Body>
static inline void with_finish(const Epilogue<T>& e, const Body& body) {
  if (e.gathers == Gathers::statistics) return body(WithStatistics<T>{});
  if (e.gathers == Gathers::gradient)
    return e.behind.relu ? body(Differentiates<T, true>{}) : body(Differentiates<T, false>{});
  const bool relu = e.act.is(ActivationKind::relu);
  const bool plain = !e.branch_scale && !e.residual_scale && (relu || e.act.is(ActivationKind::identity));
  if (!plain || (e.residual && e.not_finite)) return body(InMemory<T>{});
  if (e.not_finite) return body(InRegisters<T, false, true>{});
  if (e.residual) return body(InRegisters<T, true, false>{});
  return body(InRegisters<T, false, false>{});
}

template <class Finish, class T>
static inline void finish_rows(
    const float* sums, const Epilogue<T>& e, int64_t channel, const int32_t* target, int from, int to) {
  if (channel + kPanel <= e.channels)
    Finish::rows(sums, e, channel, target, from, to);
  else
    InMemory<T>::rows(sums, e, channel, target, from, to);
}

}  // namespace resnet_fused::cpu::KERNELS_ISA
