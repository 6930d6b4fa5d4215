// Which instruction sets the CPU's kernels use: decided at the first call. RESNET_FUSED_ISA lowers the choice.
#pragma once

#include "x86.h"

namespace resnet_fused::cpu {

// In ascending order. amx_portable is no instruction set: the kernels of amx with tile operations in plain C++.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx, amx_portable };

// Throws ValueError where RESNET_FUSED_ISA names no instruction set, or one that this processor or system does not
// have.
Isa isa();
// The same for kernels without tiles.
Isa vector_isa();

// Whether float32 multiplies more channels in a cycle than AVX512-BF16: Intel's processors begin one product of pairs
// every two cycles, and two of floats every cycle.
bool has_slow_pairs();

// Whether RESNET_FUSED_ISA made the choice.
bool is_forced();

const char* name(Isa isa);

}  // namespace resnet_fused::cpu
