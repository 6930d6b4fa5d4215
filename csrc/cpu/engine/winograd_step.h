// One step of a schedule by Winograd (winograd.h).
#pragma once

#include "pack.h"
#include "schedule.h"

namespace resnet_fused::cpu::engine {

// input: position 0 of convolution `conv`'s layout. scratch: this thread's, which the schedule has laid out; where the
// outputs are split, of all threads, and all compute. Returns whether every sum was finite, and every result if
// `epilogue` looks at them; what it points to is not written.
template <class Out>
bool multiply_patches(
    const Schedule& s, int64_t conv, const Step& step, const float* input, const Packed& u, unsigned char* scratch,
    const Epilogue<Out>& epilogue);

}  // namespace resnet_fused::cpu::engine
