// The kernel: a worker walks the phases of a program. Phases listed together run in one cooperative launch, with a grid
// barrier wherever one reads what another wrote. For a phase listed alone the end of the launch is the barrier.
#pragma once

#include "chain.cuh"
#include "convolution.cuh"
#include "pointwise.cuh"
#include "weight_gradient.cuh"

namespace resnet_fused::cuda {

// Each phase is a function of its own, called and not inlined: in one body the compiler would keep the values of all
// phases in registers at once, and spill.
template <class T>
DEVICE void run_phases(const Program& program) {
  for (int i = 0; i < program.count; ++i) {
    sync_threads();  // the phase before has read its last
    const auto* from = reinterpret_cast<const Bits128*>(&program.phases[i]);
    for (int k = thread_index(); k < static_cast<int>(sizeof(Phase) / 16); k += kThreads)
      reinterpret_cast<Bits128*>(shared_memory())[k] = from[k];
    if (program.phases[i].barrier)
      grid_barrier(program.barrier);
    else
      sync_threads();
    switch (current_phase().kind) {
      case Kind::convolution:
        if (current_phase().convolution.tile == TileShape::large)
          current_phase().convolution.transposed ? convolution<Large<T>, true>() : convolution<Large<T>, false>();
        else
          current_phase().convolution.transposed ? convolution<Small<T>, true>() : convolution<Small<T>, false>();
        break;
      case Kind::weight_gradient:
        if (current_phase().weight_gradient.tile == TileShape::large)
          weight_gradient<Large<T>>();
        else
          weight_gradient<Small<T>>();
        break;
      case Kind::pointwise:
        if (!current_phase().pointwise.source.wide || !current_phase().pointwise.epilogue.wide)
          pointwise<T, false, true, true>();
        else if (is_any(current_phase().pointwise.epilogue))
          pointwise<T, true, true, true>();
        else if (has_third(current_phase().pointwise.epilogue))
          pointwise<T, true, true, false>();
        else
          pointwise<T, true, false, false>();
        break;
      case Kind::table:
        write_table();
        break;
      case Kind::chain:
        chain<T>();
        break;
    }
  }
}

// Dynamic shared memory of a phase, in bytes; a chain gets its places there.
template <class T>
inline int work_bytes(Phase& phase) {
  switch (phase.kind) {
    case Kind::convolution: {
      const Convolution& c = phase.convolution;
      return c.tile == TileShape::large ? convolution_bytes<Large<T>>(c.buffers, c.product.source.y != nullptr)
                                        : convolution_bytes<Small<T>>(c.buffers, c.product.source.y != nullptr);
    }
    case Kind::weight_gradient: {
      const WeightGradient& w = phase.weight_gradient;
      return w.tile == TileShape::large ? weight_gradient_bytes<Large<T>>(w.buffers, w.dy.y != nullptr)
                                        : weight_gradient_bytes<Small<T>>(w.buffers, w.dy.y != nullptr);
    }
    case Kind::pointwise:
      return pointwise_bytes<T>((1 << phase.pointwise.packs_log2) * kPack);
    case Kind::chain:
      return place_chain<T>(phase.chain);
    default:
      return 0;
  }
}
template <class T>
inline int shared_bytes(Phase& phase) {
  return kPhaseBytes + work_bytes<T>(phase);
}

}  // namespace resnet_fused::cuda
