// Per-channel statistics and gradient sums: gathered by each thread, merged by worker and then by launch, in fixed
// order.
//
// A worker writes one partial per channel, (count, mean, M2) or three sums, and takes a ticket. The last worker to
// arrive for a block of channels merges all partials in the order of their lanes, so results are the same, bit for bit,
// in every run. It then derives every per-channel value that later phases read.
#pragma once

#include "barriers.cuh"
#include "packs.cuh"

namespace resnet_fused::cuda {

// (count, mean, M2) of several, relative to a value near their means: one division at the end.
struct Moments {
  double near, count = 0, first = 0, second = 0;

  DEVICE explicit Moments(double near) : near(near) {}
  DEVICE void add(double n, double mean, double m2) {
    const double d = mean - near;
    count += n;
    first += n * d;
    second += m2 + n * d * d;
  }
  DEVICE double mean() const { return near + (count > 0 ? first / count : 0.0); }
  DEVICE double m2() const { return count > 0 ? second - first * first / count : 0.0; }
};

// A thread's sums for a pack of channels. For statistics: of v - near and of its square, where near is a value close to
// v, so that nothing cancels where |mean| is far above the deviation. For gradients: of v, of v (y - mean) and, in
// passes that ask for one, a third (`Third` in phase.h).
template <class T, bool JOIN>
struct ThreadSums {
  sum_t<T> first[kPack], second[kPack], third[JOIN ? kPack : 1];
  int rows = 0;

  DEVICE ThreadSums() { UNROLL for (int i = 0; i < kPack; ++i) first[i] = second[i] = third[JOIN ? i : 0] = 0; }
};

// The same in shared memory, [3, kPack, threads], in the place where threads meet: for passes that compute more than
// registers hold beside 24 sums in double. Such a pass waits for global memory longer than for these sums.
template <class T>
struct SharedSums {
  struct Row {
    sum_t<T>* at;
    DEVICE sum_t<T>& operator[](int i) const { return at[i * kThreads]; }
  };
  Row first, second, third;
  int rows = 0;

  DEVICE explicit SharedSums(sum_t<T>* meeting)
      : first{meeting + thread_index()}, second{first.at + kPack * kThreads}, third{second.at + kPack * kThreads} {
    UNROLL for (int i = 0; i < kPack; ++i) first[i] = second[i] = third[i] = 0;
  }
  // Copies the sums to registers on the way to the other threads; the meeting place is free afterwards.
  DEVICE ThreadSums<T, true> take() const {
    ThreadSums<T, true> mine;
    UNROLL for (int i = 0; i < kPack; ++i) {
      mine.first[i] = first[i];
      mine.second[i] = second[i];
      mine.third[i] = third[i];
    }
    mine.rows = rows;
    sync_threads();
    return mine;
  }
};

// The worker's running values for a block of channels, [3, columns], and where its threads meet, [groups, 3, columns]
// with groups = threads * 8 / columns.
template <class T>
struct WorkerSums {
  double* running;
  sum_t<T>* meeting;
  int32_t* flag;
  float* near;  // [columns], for statistics: the running mean, and at first any value
};
template <class T>
constexpr int kMeetingBytes = kThreads * kPack * 3 * static_cast<int>(sizeof(sum_t<T>));
constexpr int running_bytes(int columns) { return 3 * columns * 8 + 16; }

template <class T>
DEVICE void clear_running(const WorkerSums<T>& sums, int columns) {
  for (int i = thread_index(); i < 3 * columns; i += kThreads) sums.running[i] = 0.0;
  sync_threads();
}

// Puts a thread's values where threads meet.
template <class T, bool JOIN>
DEVICE void put_thread_sums(const WorkerSums<T>& sums, const ThreadSums<T, JOIN>& mine, Reduce reduce, int columns) {
  const int packs = columns / kPack;
  sum_t<T>* at = sums.meeting + thread_index() / packs * 3 * columns + thread_index() % packs * kPack;
  UNROLL for (int i = 0; i < kPack; ++i, ++at) {
    at[0] = mine.first[i];
    at[columns] = mine.second[i];
    at[2 * columns] = reduce == Reduce::statistics ? static_cast<sum_t<T>>(mine.rows)
                      : JOIN                       ? mine.third[JOIN ? i : 0]
                                                   : 0;
  }
}

// Adds what all threads have put down to the running values. The meeting place is free afterwards.
template <class T>
NOINLINE_DEVICE void merge_threads(const WorkerSums<T>& sums, Reduce reduce, int columns) {
  const int groups = kThreads * kPack / columns;
  sync_threads();
  for (int column = thread_index(); column < columns; column += kThreads) {
    double* at = sums.running + column;
    const sum_t<T>* from = sums.meeting + column;
    double a = 0, b = 0, c = 0;
    for (int i = 0; i < groups; ++i, from += 3 * columns) {
      a += from[0];
      b += from[columns];
      c += from[2 * columns];
    }
    if (reduce == Reduce::statistics) {
      const double near = sums.near[column], shift = c > 0 ? a / c : 0.0;
      Moments moments(near + shift);
      moments.add(at[0], at[columns], at[2 * columns]);
      moments.add(c, near + shift, b - a * shift);
      at[0] = moments.count;
      at[columns] = moments.mean();
      at[2 * columns] = moments.m2();
      sums.near[column] = static_cast<float>(at[columns]);
    } else {
      at[0] += a;
      at[columns] += b;
      at[2 * columns] += c;
    }
  }
  sync_threads();
}

// --- what follows from merged values ---------------------------------------------------------------------------------

// Writes a channel's column of a norm's table.
DEVICE void store_norm_table(float* table, int channel, int channels, const Affine& a) {
  float* const at = table + channel;
  at[kRowScale * channels] = static_cast<float>(a.scale);
  at[kRowShift * channels] = static_cast<float>(a.shift);
  at[kRowCenter * channels] = static_cast<float>(a.center);
  at[kRowFolded * channels] = static_cast<float>(a.shift - a.center * a.scale);
}

// dy = factor scale (dz - mean(dz) - y_hat mean(dz y_hat)), the means only for batch statistics.
DEVICE void store_gradient_table(
    float* table, int channel, int channels, const Affine& a, double factor, double dz, double dz_y, double rows,
    bool batch) {
  const double k_dz = factor * a.scale;
  const double k_y = batch ? -k_dz * a.inverse_std * a.inverse_std * dz_y / rows : 0.0;
  const double k = batch ? -k_dz * dz / rows : 0.0;
  float* const at = table + channel;
  at[kRowScale * channels] = static_cast<float>(k_dz);
  at[kRowShift * channels] = static_cast<float>(k);
  at[kRowCenter * channels] = static_cast<float>(a.center);
  at[kRowFolded * channels] = static_cast<float>(k - k_y * a.center);
  at[kRowYScale * channels] = static_cast<float>(k_y);
}

NOINLINE_DEVICE void store_gradients(
    const VectorGradients& g, int channel, int channels, double dz, double dz_y, double rows) {
  const Affine a = affine(g.norm, channel);
  const double factor = load(g.factor, channel, 1.0);
  if (g.table != nullptr) store_gradient_table(g.table, channel, channels, a, factor, dz, dz_y, rows, g.batch);
  store(g.dgamma, channel, factor * a.inverse_std * dz_y);
  store(g.dbeta, channel, factor * dz);
  store(g.dbias, channel, g.batch ? 0.0 : factor * a.scale * dz);  // batch statistics take away what a bias adds
  if (g.dfactor != nullptr) g.dfactor[channel] = a.scale * dz_y + a.shift * dz;
}

NOINLINE_DEVICE void store_merged(
    const Reduction& r, Reduce reduce, int channel, int channels, double a, double b, double c) {
  if (reduce == Reduce::statistics) {
    // as later launches will read them: rounded to float32
    const float mean = static_cast<float>(b), var = static_cast<float>(c / r.rows);
    r.stats[channel] = mean;
    r.stats[channels + channel] = var;
    if (r.table != nullptr) {
      const double inverse_std = 1.0 / sqrt(static_cast<double>(var) + r.norm.eps);
      store_norm_table(
          r.table, channel, channels,
          {load(r.norm.gamma, channel, 1.0) * inverse_std, load(r.norm.beta, channel, 0.0), mean, inverse_std});
    }
  } else {
    store_gradients(r.first, channel, channels, a, b, r.rows);
    store_gradients(r.second, channel, channels, a, c, r.rows);
    if (r.third != nullptr) r.third[channel] = c;
    if (r.sums != nullptr) {
      r.sums[channel] = a;
      r.sums[channels + channel] = b;
    }
  }
}

// Writes the worker's partial for the channels [first, first + columns) and, in the last worker, merges all `lanes`.
template <class T>
NOINLINE_DEVICE void merge_workers(
    const WorkerSums<T>& sums, const Reduction& r, Reduce reduce, int block, int lane, int lanes, int first,
    int columns, int channels) {
  const int mine = least(columns, channels - first);
  for (int column = thread_index(); column < mine; column += kThreads) {
    double* partial = r.partials + static_cast<int64_t>(lane) * 3 * channels + first + column;
    UNROLL for (int i = 0; i < 3; ++i) partial[static_cast<int64_t>(i) * channels] = sums.running[i * columns + column];
  }
  if (!arrives_last(r.tickets + block, lanes, sums.flag)) return;
  // several threads per channel, each with every slices-th lane
  const int slices = kThreads / columns, slice = thread_index() / columns, column = thread_index() % columns;
  auto* const meeting = reinterpret_cast<double*>(sums.meeting);
  if (column < mine && slice < slices) {
    const double* partial = r.partials + first + column;
    const int64_t row = channels;
    Moments moments(partial[row]);
    double a = 0, b = 0, c = 0;
    UNROLL_4 for (int i = slice; i < lanes; i += slices) {
      const double* p = partial + i * 3 * row;
      if (reduce == Reduce::statistics) {
        moments.add(p[0], p[row], p[2 * row]);
      } else {
        a += p[0];
        b += p[row];
        c += p[2 * row];
      }
    }
    double* at = meeting + slice * 3 * columns + column;
    at[0] = reduce == Reduce::statistics ? moments.count : a;
    at[columns] = reduce == Reduce::statistics ? moments.mean() : b;
    at[2 * columns] = reduce == Reduce::statistics ? moments.m2() : c;
  }
  sync_threads();
  if (thread_index() < mine) {
    const double* at = meeting + thread_index();
    Moments moments(at[columns]);
    double a = 0, b = 0, c = 0;
    for (int i = 0; i < slices; ++i, at += 3 * columns) {
      if (reduce == Reduce::statistics) {
        moments.add(at[0], at[columns], at[2 * columns]);
      } else {
        a += at[0];
        b += at[columns];
        c += at[2 * columns];
      }
    }
    if (reduce == Reduce::statistics) {
      a = moments.count;
      b = moments.mean();
      c = moments.m2();
    }
    store_merged(r, reduce, first + thread_index(), channels, a, b, c);
  }
  sync_threads();
}

// The table of a norm that no reduction of the same launch writes.
NOINLINE_DEVICE void write_table() {
  const Table& t = current_phase().table;
  for (int c = worker_index() * kThreads + thread_index(); c < t.channels; c += worker_count() * kThreads) {
    const Affine a = affine(t.norm, c);
    const bool batch = t.sums != nullptr;
    if (t.gradient)
      store_gradient_table(
          t.table, c, t.channels, a, 1.0, batch ? t.sums[c] : 0.0, batch ? t.sums[t.channels + c] : 0.0, t.rows, batch);
    else
      store_norm_table(t.table, c, t.channels, a);
  }
}

// --- which worker does what ------------------------------------------------------------------------------------------

// A worker takes every step-th block of channels from `first` on, and of each block's tiles every lanes-th from `lane`
// on. Workers left over after the last whole lane get no block. Neighbouring workers have the blocks of the same
// pixels.
struct Share {
  int first, step, lane, lanes;
  DEVICE explicit Share(int blocks) {
    step = least(blocks, worker_count());
    lanes = worker_count() / step;
    lane = worker_index() / step;
    first = lane < lanes ? worker_index() % step : blocks;
  }
};

}  // namespace resnet_fused::cuda
