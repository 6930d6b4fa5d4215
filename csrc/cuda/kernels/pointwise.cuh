// The phase without a product: a pass over pixels and channels that ends in the same epilogue as a convolution.
//
// It joins branch and skip path, masks the gradient of the output, gathers statistics, and writes out what a library
// convolution reads. Everything it reads and writes is [pixels, channels].
#pragma once

#include "epilogue.cuh"

namespace resnet_fused::cuda {

// Shared memory: where threads meet; the constants; the running sums.
template <class T>
constexpr int pointwise_bytes(int columns) {
  return kMeetingBytes<T> + constant_bytes(columns) + running_bytes(columns);
}

template <class T, bool JOIN, bool SHARED>
DEVICE auto thread_sums(const WorkerSums<T>& worker) {
  if constexpr (SHARED)
    return SharedSums<T>(worker.meeting);
  else
    return ThreadSums<T, JOIN>();
}

DEVICE bool is_any(const Epilogue& e) { return !is_simple(e.act) || e.mask == Mask::by_sum; }
DEVICE bool has_third(const Epilogue& e) { return e.s != nullptr || e.third != Third::skip; }

// Walks the tiles of one block of channels, then those of the next, as `convolution` does. A tile is one pack per
// thread in as many pixels as are kept in flight. WIDE: channels are a multiple of 8 and everything is aligned to 16
// bytes. JOIN: s is read or a third sum is wanted. ANY: the activation may be other than relu; float32 then keeps the
// sums in shared memory.
template <class T, bool WIDE, bool JOIN, bool ANY>
NOINLINE_DEVICE void pointwise() {
  const Pointwise& p = current_phase().pointwise;
  constexpr int together = sizeof(T) == 2 && !JOIN ? 2 : 1;  // reads in flight, as registers allow
  const Epilogue& e = p.epilogue;
  const int packs = 1 << p.packs_log2, columns = packs * kPack, channels = p.source.channels;
  const int pack = thread_index() & (packs - 1), step = kThreads >> p.packs_log2;
  auto* const constants = reinterpret_cast<float*>(work_memory() + kMeetingBytes<T>);
  auto* const running = reinterpret_cast<double*>(work_memory() + kMeetingBytes<T> + constant_bytes(columns));
  const WorkerSums<T> worker{
      running, reinterpret_cast<sum_t<T>*>(work_memory()), reinterpret_cast<int32_t*>(running + 3 * columns),
      constants + kNear * columns};
  const int blocks = ceil_div(channels, columns);
  const Share share(blocks);
  for (int block = share.first; block < blocks; block += share.step) {
    const int first = block * columns, column = pack * kPack, channel = first + column;
    const int count = WIDE ? (channel < channels ? kPack : 0) : least(kPack, channels - channel);
    write_constants(e, constants, first, columns);
    if (e.reduce == Reduce::statistics && thread_index() < columns && first + thread_index() < channels)
      worker.near[thread_index()] = to_float(static_cast<const T*>(p.source.x)[first + thread_index()]);
    if (e.reduce != Reduce::none) clear_running(worker, columns);
    constexpr bool shared_sums = sizeof(T) == 4 && ANY;
    auto sums = thread_sums<T, JOIN, shared_sums>(worker);
    const int64_t stride = static_cast<int64_t>(step) * share.lanes * together;
    for (int64_t from = static_cast<int64_t>(share.lane) * step * together + (thread_index() >> p.packs_log2);
         from < p.pixels && count > 0; from += stride) {
      Pack<T> x[together];
      Fetched<T> fetched[together];  // y: the epilogue's or the source's, never both
      UNROLL for (int u = 0; u < together; ++u) {
        const int64_t pixel = from + u * step, index = pixel * channels + channel;
        x[u].clear();
        if (pixel >= p.pixels) continue;
        load_pack<T>(x[u], p.source.x, index, count, WIDE);
        fetch<T, WIDE, JOIN>(fetched[u], e, index, pixel, channel, count);
        if (p.source.y != nullptr) load_pack<T>(fetched[u].y, p.source.y, index, count, WIDE);
      }
      UNROLL for (int u = 0; u < together; ++u) {
        const int64_t pixel = from + u * step;
        if (pixel >= p.pixels) continue;
        float v[kPack];
        UNROLL for (int i = 0; i < kPack; ++i) v[i] = x[u].get(i);
        if (p.source.source == Source::normalize) {
          const Normalize<T, kPack> normalize(p.source, channel, count);
          UNROLL for (int i = 0; i < kPack; ++i) v[i] = normalize(i, v[i]);
        } else if (p.source.source == Source::gradient) {
          const Gradient<T, kPack> gradient(p.source, channel, count);
          UNROLL for (int i = 0; i < kPack; ++i) v[i] =
              gradient(i, v[i], p.source.y != nullptr ? fetched[u].y.get(i) : 0.0f);
        }
        if (p.source.relu) {
          UNROLL for (int i = 0; i < kPack; ++i) v[i] = relu(v[i]);
        }
        finish<T, WIDE, JOIN, ANY>(
            v, fetched[u], e, constants + column, columns, pixel * channels + channel, pixel, channel, count, sums);
      }
    }
    if (e.reduce != Reduce::none) {
      if constexpr (shared_sums)
        put_thread_sums(worker, sums.take(), e.reduce, columns);
      else
        put_thread_sums(worker, sums, e.reduce, columns);
      merge_threads(worker, e.reduce, columns);
      merge_workers(worker, e.reduction, e.reduce, block, share.lane, share.lanes, first, columns, channels);
    }
    sync_threads();  // before the constants of the next block
  }
}

}  // namespace resnet_fused::cuda
