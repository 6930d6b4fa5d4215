// The phase without a product: a pass over pixels and channels that ends in the same epilogue as a convolution.
//
// It joins branch and skip path, masks the gradient of the output, gathers statistics, and writes out what a library
// convolution is to read.
#pragma once

#include "epilogue.cuh"

namespace resnet_fused::cuda {

// Shared memory: where threads meet; the constants; the running sums.
template <class T>
constexpr int pointwise_bytes(int columns) {
  return kMeetingBytes<T> + constant_bytes(columns) + running_bytes(columns);
}

// Walks the tiles of one block of channels after the other, as `convolution` does; a tile is every thread's pack in as
// many pixels as are kept in flight.
template <class T>
NOINLINE_DEVICE void pointwise() {
  const Pointwise& p = current_phase().pointwise;
  constexpr int together = sizeof(T) == 2 ? 2 : 1;
  const Epilogue& e = p.epilogue;
  const int packs = 1 << p.packs_log2, columns = packs * kPack, channels = p.source.channels;
  const int pack = thread_index() & (packs - 1), step = kThreads >> p.packs_log2;
  auto* const constants = reinterpret_cast<float*>(work_memory() + kMeetingBytes<T>);
  auto* const running = reinterpret_cast<double*>(work_memory() + kMeetingBytes<T> + constant_bytes(columns));
  const WorkerSums<T> worker{
      running, reinterpret_cast<sum_t<T>*>(work_memory()), reinterpret_cast<int32_t*>(running + 3 * columns)};
  const int blocks = ceil_div(channels, columns);
  const Share share(blocks);
  for (int block = share.first; block < blocks; block += share.step) {
    const int first = block * columns, column = pack * kPack, channel = first + column;
    const int count = least(kPack, channels - channel);
    write_constants(e, constants, first, columns);
    if (e.reduce != Reduce::none) clear_running(worker, columns);
    ThreadSums<T> sums;
    const int64_t stride = static_cast<int64_t>(step) * share.lanes * together;
    for (int64_t from = static_cast<int64_t>(share.lane) * step * together + (thread_index() >> p.packs_log2);
         from < p.pixels && count > 0; from += stride) {
      Pack<T> x[together];
      Fetched<T> fetched[together];  // y: the epilogue's or the source's, never both
      UNROLL for (int u = 0; u < together; ++u) {
        const int64_t pixel = from + u * step, index = pixel * channels + channel;
        if (pixel >= p.pixels) continue;
        load_pack<T>(x[u], p.source.x, index, count, p.source.wide);
        if (p.source.y != nullptr) load_pack<T>(fetched[u].y, p.source.y, index, count, p.source.wide);
        fetch(fetched[u], e, index, pixel, channel, count);
      }
      UNROLL for (int u = 0; u < together; ++u) {
        const int64_t pixel = from + u * step;
        if (pixel >= p.pixels) continue;
        float v[kPack];
        UNROLL for (int i = 0; i < kPack; ++i) {
          v[i] = x[u].get(i);
          if (p.source.source != Source::raw && i < count)
            v[i] = apply_source(
                p.source.source, p.source.table[channel + i], v[i],
                p.source.y != nullptr ? fetched[u].y.get(i) : 0.0f);
          if (p.source.relu) v[i] = relu(v[i]);
        }
        finish(v, fetched[u], e, constants, columns, column, pixel * channels + channel, pixel, channel, count, sums);
      }
    }
    if (e.reduce != Reduce::none) {
      put_thread_sums(worker, sums, e.reduce, columns);
      merge_threads(worker, e.reduce, columns);
      merge_workers(worker, e.reduction, e.reduce, block, share.lane, share.lanes, first, columns, channels);
    }
    sync_threads();  // before the constants of the next block
  }
}

}  // namespace resnet_fused::cuda
