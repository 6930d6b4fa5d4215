#include "passes.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "../block/integer_division.h"
#include "engine/memory.h"
#include "merged_statistics.h"
#include "share_out.h"

namespace resnet_fused::cpu {
namespace {

// Elements of a chunk: large enough to amortise a partial, small enough to spread and to stay in L2.
constexpr int64_t kChunkElements = 1 << 15;
constexpr int64_t kMinChunkRows = 16;

// In groups of equally many rows: all of y, or its images. A chunk lies within one group.
struct Chunks {
  int64_t groups, rows, channels, rows_each, each, count;  // rows and each: of a group; each, count: chunks

  Chunks(const at::Tensor& y, int64_t groups)
      : groups(groups),
        rows(y.size(0) * y.size(2) * y.size(3) / groups),
        channels(y.size(1)),
        rows_each(std::max(kMinChunkRows, kChunkElements / std::max<int64_t>(channels, 1))),
        each(ceil_div(rows, rows_each)),
        count(each * groups) {}
  explicit Chunks(const at::Tensor& y) : Chunks(y, 1) {}
  // As many groups as the vectors of `norm` have sets of channels.
  template <class A>
  Chunks(const at::Tensor& y, const NormVectors<A>& norm) : Chunks(y, norm.sets(y.size(1))) {}

  int64_t rows_of(int64_t chunk) const { return std::min(rows_each, rows - chunk % each * rows_each); }
  // Where a group's channels begin in vectors with a set for each group.
  int64_t channels_of(int64_t chunk) const { return chunk / each * channels; }

  // body(chunk, first row, rows of the chunk)
  template <class Body>
  void parallel(const Body& body) const {
    for_each_job(count, [&](int64_t i) { body(i, i / each * rows + i % each * rows_each, rows_of(i)); });
  }
};

template <class S>
const element_t<S>* data(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<const element_t<S>*>(t.const_data_ptr<S>()) : nullptr;
}
template <class S>
element_t<S>* mutable_data(const at::Tensor& t) {
  return t.defined() ? reinterpret_cast<element_t<S>*>(t.mutable_data_ptr<S>()) : nullptr;
}
template <class T>
T* at_offset(T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

const uint8_t* bytes(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<uint8_t>() : nullptr; }
int64_t bytes_of(int64_t channels) { return ceil_div(channels, 8); }

// dz chunk by chunk: rows of dout, or what a bit mask leaves of them, in the dz that is kept or in memory that is not.
template <class S>
class DzChunk {
 public:
  using T = element_t<S>;

  DzChunk(const at::Tensor& dout, const BitMask& mask, int64_t channels)
      : dout_(data<S>(dout)), bits_(bytes(mask.bits)), dz_(mutable_data<S>(mask.dz)), channels_(channels) {}

  const T* operator()(int64_t row, int64_t rows) {
    const int64_t offset = row * channels_;
    if (!bits_) return dout_ + offset;
    if (!dz_) scratch_ = std::make_unique_for_overwrite<T[]>(rows * channels_);
    T* target = dz_ ? dz_ + offset : scratch_.get();
    row_kernels<T>().where_bits(dout_ + offset, bits_ + row * bytes_of(channels_), rows, channels_, target);
    return target;
  }

 private:
  const T* dout_;
  const uint8_t* bits_;
  T* dz_;
  int64_t channels_;
  std::unique_ptr<T[]> scratch_;
};

// out[group][c] = sum over the group's chunks of partial[chunk][k][c], in chunk order
template <class Sum>
std::vector<double> merge_sums(const std::vector<Sum>& partial, const Chunks& chunks, int64_t kinds, int64_t k) {
  const int64_t channels = chunks.channels;
  std::vector<double> total(chunks.groups * channels, 0.0);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const Sum* p = partial.data() + (i * kinds + k) * channels;
    double* sum = total.data() + chunks.channels_of(i);
    for (int64_t c = 0; c < channels; ++c) sum[c] += p[c];
  }
  return total;
}

template <class A>
Affine<A> skip_affine(const ResidualInput<A>& residual) {
  return residual.norm ? residual.norm->affine() : Affine<A>{nullptr, residual.scale.data(), nullptr};
}

}  // namespace

template <class A>
ActVectors<A> act_vectors(const Activation& act, const std::optional<at::Tensor>& slope, int64_t channels) {
  ActVectors<A> vectors{act};
  if (vectors.pointers().is_plain()) return vectors;
  if (slope) vectors.slope = to_vector<A>(*slope);
  if (vectors.slope.size() != static_cast<size_t>(channels))
    vectors.slope.assign(channels, vectors.slope.empty() ? static_cast<A>(act.parameter) : vectors.slope[0]);
  return vectors;
}

template <class A>
std::vector<A> to_vector(const at::Tensor& t) {
  if (t.scalar_type() == c10::CppTypeToScalarType<A>::value && t.device().is_cpu() && t.is_contiguous()) {
    const A* p = t.const_data_ptr<A>();  // the usual case, without three calls of ATen
    return {p, p + t.numel()};
  }
  const auto flat = t.to(at::kCPU, c10::CppTypeToScalarType<A>::value).reshape(-1).contiguous();
  const A* p = flat.template const_data_ptr<A>();
  return {p, p + flat.numel()};
}

at::Tensor from_vector(const std::vector<double>& values, at::IntArrayRef sizes, at::ScalarType type) {
  at::Tensor t = at::empty(sizes, at::dtype(type));
  TORCH_INTERNAL_ASSERT(t.numel() == static_cast<int64_t>(values.size()));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "from_vector", [&] {
    std::copy(values.begin(), values.end(), t.mutable_data_ptr<scalar_t>());
  });
  return t;
}

namespace {

// [groups, 2, C]: mean and biased variance of each group of rows, in arithmetic type.
template <class S>
at::Tensor statistics(const at::Tensor& y, int64_t groups) {
  using A = acc_t<S>;
  using Sum = sum_t<element_t<S>>;
  const Chunks chunks(y, groups);
  const int64_t channels = chunks.channels;
  std::vector<Sum> partial(chunks.count * 2 * channels);
  const auto& kernels = row_kernels<element_t<S>>();
  const auto* source = data<S>(y);
  chunks.parallel([&](int64_t i, int64_t row, int64_t rows) {
    Sum* p = partial.data() + i * 2 * channels;
    kernels.statistics(source + row * channels, rows, channels, p, p + channels);
  });

  auto result = at::empty(
      {groups, 2, channels},
      y.options().dtype(c10::CppTypeToScalarType<A>::value).memory_format(at::MemoryFormat::Contiguous));
  A* mean = result.template mutable_data_ptr<A>();
  for (int64_t group = 0; group < groups; ++group, mean += 2 * channels) {
    MergedStatistics merged(channels);
    for (int64_t i = group * chunks.each; i < (group + 1) * chunks.each; ++i) {
      const Sum* p = partial.data() + i * 2 * channels;
      merged.add(static_cast<double>(chunks.rows_of(i)), [&](int64_t c) { return std::pair(p[c], p[channels + c]); });
    }
    merged.write(mean, mean + channels);
  }
  return result;
}

}  // namespace

template <class S>
at::Tensor batch_statistics(const at::Tensor& y) {
  return statistics<S>(y, 1).select(0, 0);
}

template <class S>
at::Tensor image_statistics(const at::Tensor& y) {
  return statistics<S>(y, y.size(0));
}

template <class S>
at::Tensor image_means(const at::Tensor& y) {
  const Chunks chunks(y, y.size(0));
  const int64_t channels = chunks.channels;
  std::vector<double> partial(chunks.count * channels);
  const auto& kernels = row_kernels<element_t<S>>();
  const auto* source = data<S>(y);
  chunks.parallel([&](int64_t i, int64_t row, int64_t rows) {
    kernels.sum(source + row * channels, rows, channels, partial.data() + i * channels);
  });
  auto means = at::empty({chunks.groups, channels}, y.options().memory_format(at::MemoryFormat::Contiguous));
  S* mean = means.template mutable_data_ptr<S>();
  const std::vector<double> sums = merge_sums(partial, chunks, 1, 0);
  for (size_t i = 0; i < sums.size(); ++i) mean[i] = static_cast<S>(sums[i] / static_cast<double>(chunks.rows));
  return means;
}

namespace {

template <class S>
void normalize_into(
    const at::Tensor& out, const at::Tensor& y, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const ResidualInput<acc_t<S>>& residual, const at::Tensor& bits) {
  using A = acc_t<S>;
  const Chunks chunks(y, norm);
  const auto& kernels = row_kernels<element_t<S>>();
  const Affine<A> skip_norm = skip_affine(residual);
  const auto *source = data<S>(y), *skip = data<S>(residual.skip);
  auto* target = mutable_data<S>(out);
  uint8_t* passing = bits.defined() ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  chunks.parallel([&](int64_t i, int64_t row, int64_t rows) {
    const int64_t channels = chunks.channels, offset = row * channels;
    kernels.normalize(
        {source + offset, norm.affine(chunks.channels_of(i)), at_offset(skip, offset), skip_norm, act.pointers(),
         target + offset},
        rows, channels);
    if (passing) kernels.passing_bits(target + offset, rows, channels, passing + row * bytes_of(channels));
  });
}

}  // namespace

template <class S>
at::Tensor normalize(
    const at::Tensor& y, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const ResidualInput<acc_t<S>>& residual, const at::Tensor& bits) {
  auto out = engine::reused_like(y);
  normalize_into<S>(out, y, norm, act, residual, bits);
  return out;
}

template <class S>
void normalize_in_place(
    const at::Tensor& y, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const ResidualInput<acc_t<S>>& residual) {
  normalize_into<S>(y, y, norm, act, residual, {});
}

template <class S>
Sums backward_reduce(
    const ReduceInput& in, const NormVectors<acc_t<S>>& norm, const ActVectors<acc_t<S>>& act,
    const NormVectors<acc_t<S>>* norm2, const ResidualInput<acc_t<S>>& residual) {
  using Sum = sum_t<element_t<S>>;
  const Chunks chunks(in.y, norm);
  const int64_t channels = chunks.channels;
  int64_t kinds = 2;
  const int64_t of_y2 = norm2 ? kinds++ : 0, of_slope = in.sums_slope ? kinds++ : 0, of_act = in.sums_act ? kinds++ : 0;
  TORCH_INTERNAL_ASSERT(!keeps_dz(act) || in.dz.defined());
  const auto skip_norm = skip_affine(residual);
  std::vector<Sum> partial(chunks.count * kinds * channels);
  const auto& kernels = row_kernels<element_t<S>>();
  const auto *out = data<S>(in.out), *y = data<S>(in.y), *y2 = data<S>(in.y2), *skip = data<S>(residual.skip);
  auto *dz = mutable_data<S>(in.dz), *p = mutable_data<S>(in.p);
  chunks.parallel([&](int64_t i, int64_t row, int64_t rows) {
    const int64_t offset = row * channels;
    Sum* sums = partial.data() + i * kinds * channels;
    DzChunk<S> dz_rows(in.dout, in.bits, channels);
    kernels.backward_reduce(
        {dz_rows(row, rows), in.reads, at_offset(out, offset), y + offset, norm.affine(chunks.channels_of(i)),
         act.pointers(), at_offset(skip, offset), skip_norm, at_offset(y2, offset),
         norm2 ? norm2->center.data() : nullptr, at_offset(dz, offset), at_offset(p, offset), sums, sums + channels,
         of_y2 ? sums + of_y2 * channels : nullptr, of_slope ? sums + of_slope * channels : nullptr,
         of_act ? sums + of_act * channels : nullptr},
        rows, channels);
  });
  Sums sums{merge_sums(partial, chunks, kinds, 0), merge_sums(partial, chunks, kinds, 1)};
  if (of_y2) sums.dz_y2 = merge_sums(partial, chunks, kinds, of_y2);
  if (of_slope) sums.slope = merge_sums(partial, chunks, kinds, of_slope);
  if (of_act) sums.act = merge_sums(partial, chunks, kinds, of_act);
  return sums;
}

template <class S>
void backward_apply(
    const at::Tensor& dz, Reads reads, const at::Tensor& y, const NormVectors<acc_t<S>>& norm,
    const ApplyVectors<acc_t<S>>& k, const at::Tensor& add, const at::Tensor& dx, const BitMask& bits) {
  const Chunks chunks(dz, norm);
  const auto& kernels = row_kernels<element_t<S>>();
  const auto *y_data = data<S>(y), *add_data = data<S>(add);
  auto* target = mutable_data<S>(dx);
  chunks.parallel([&](int64_t i, int64_t row, int64_t rows) {
    const int64_t offset = row * chunks.channels, set = chunks.channels_of(i);
    DzChunk<S> dz_rows(dz, bits, chunks.channels);
    kernels.backward_apply(
        {dz_rows(row, rows), reads, at_offset(y_data, offset), k.y_term, norm.affine(set), k.k_dz.data() + set,
         k.k_y.data() + set, k.k.data() + set, at_offset(add_data, offset), k.k_add.data(), target + offset},
        rows, chunks.channels);
  });
}

template <class S>
bool all_finite(const at::Tensor& x) {
  const Chunks chunks(x);
  const auto& kernels = row_kernels<element_t<S>>();
  const auto* source = data<S>(x);
  std::atomic<bool> finite{true};
  chunks.parallel([&](int64_t, int64_t row, int64_t rows) {
    if (finite && !kernels.all_finite(source + row * chunks.channels, rows * chunks.channels)) finite = false;
  });
  return finite;
}

#define INSTANTIATE(S)                                                                                               \
  template bool all_finite<S>(const at::Tensor&);                                                                    \
  template at::Tensor batch_statistics<S>(const at::Tensor&);                                                        \
  template at::Tensor image_statistics<S>(const at::Tensor&);                                                        \
  template at::Tensor image_means<S>(const at::Tensor&);                                                             \
  template void normalize_in_place<S>(                                                                               \
      const at::Tensor&, const NormVectors<acc_t<S>>&, const ActVectors<acc_t<S>>&, const ResidualInput<acc_t<S>>&); \
  template at::Tensor normalize<S>(                                                                                  \
      const at::Tensor&, const NormVectors<acc_t<S>>&, const ActVectors<acc_t<S>>&, const ResidualInput<acc_t<S>>&,  \
      const at::Tensor&);                                                                                            \
  template Sums backward_reduce<S>(                                                                                  \
      const ReduceInput&, const NormVectors<acc_t<S>>&, const ActVectors<acc_t<S>>&, const NormVectors<acc_t<S>>*,   \
      const ResidualInput<acc_t<S>>&);                                                                               \
  template void backward_apply<S>(                                                                                   \
      const at::Tensor&, Reads, const at::Tensor&, const NormVectors<acc_t<S>>&, const ApplyVectors<acc_t<S>>&,      \
      const at::Tensor&, const at::Tensor&, const BitMask&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)
#undef INSTANTIATE
template ActVectors<float> act_vectors<float>(const Activation&, const std::optional<at::Tensor>&, int64_t);
template ActVectors<double> act_vectors<double>(const Activation&, const std::optional<at::Tensor>&, int64_t);
template std::vector<float> to_vector<float>(const at::Tensor&);
template std::vector<double> to_vector<double>(const at::Tensor&);

}  // namespace resnet_fused::cpu
