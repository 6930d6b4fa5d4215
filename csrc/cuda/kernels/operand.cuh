// Prologues: a chunk of an operand on its way from memory to a product, as stored or computed.
#pragma once

#include "packs.cuh"

namespace resnet_fused::cuda {

DEVICE bool computed(const Operand& operand) { return operand.source != Source::raw || operand.relu; }

// What the source makes of x (and y) with a channel's table entry.
DEVICE float apply_source(Source source, const Float4& table, float x, float y) {
  if (source == Source::normalize) return (x - table.z) * table.x + table.y;
  return table.x * x + (table.y * (y - table.w) + table.z);
}

// Issues the copy of `count` values (0: zeros) to a chunk of shared memory. wide: count is a whole chunk or 0.
template <class T>
DEVICE void load_chunk(char* shared, const T* global, int count, bool wide) {
  if (wide) {
    cp_async_16(shared, global, count > 0);
  } else {
    Chunk<T> chunk;
    chunk.load_first(global, count);
    chunk.store(reinterpret_cast<T*>(shared));
  }
}

// Computes a chunk in place, once it has come: x in `shared`, y in `with`. The first `count` channels from `channel`.
template <class T>
DEVICE void compute_chunk(const Operand& operand, char* shared, const char* with, int channel, int count) {
  Chunk<T> x, y;
  x.load(reinterpret_cast<const T*>(shared));
  if (operand.y != nullptr)
    y.load(reinterpret_cast<const T*>(with));
  else
    y.clear();
  float v[kChunk<T>];
  UNROLL for (int i = 0; i < kChunk<T>; ++i) {
    v[i] = x.get(i);
    if (i < count) {
      if (operand.source != Source::raw)
        v[i] = apply_source(operand.source, operand.table[channel + i], v[i], y.get(i));
      if (operand.relu) v[i] = relu(v[i]);
    }
  }
  x.set(v);
  x.store(reinterpret_cast<T*>(shared));
}

}  // namespace resnet_fused::cuda
