// RESNET_FUSED_X86: whether kernels for x86-64's vector instructions are compiled. Elsewhere, and with
// RESNET_FUSED_PORTABLE, plain C++ does all.
#pragma once

#if defined(__x86_64__) && !defined(RESNET_FUSED_PORTABLE)
#define RESNET_FUSED_X86
#endif
