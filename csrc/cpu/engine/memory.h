// Memory of the engine: aligned, in huge pages where it is large, and kept for the next call.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace resnet_fused::cpu::engine {

// Not filled. Throws OutOfMemoryError.
using Memory = std::shared_ptr<unsigned char>;
Memory allocate(int64_t bytes);

// The same, beside what is allocated before and behind it, so that also little of it lies in huge pages: reading much
// that is in no cache otherwise waits for addresses to be translated. The system gets 8 MiB back when all that share
// them are gone.
Memory allocate_together(int64_t bytes);

// The same, from what earlier users of such memory have left (see reused_empty).
Memory reuse(int64_t bytes);

// This thread's scratch memory, at least `bytes`; its earlier contents are lost. Throws OutOfMemoryError.
unsigned char* scratch(int64_t bytes);

// A channels_last tensor in memory that an earlier result has left: the first touch of fresh memory costs as much as
// half the block. Held back are at most kKept bytes, or with those in use as many as were ever in use at once: what a
// training step keeps for backward serves the next step.
constexpr int64_t kKept = int64_t{512} << 20;
at::Tensor reused_empty(int64_t images, int64_t channels, int64_t height, int64_t width, at::ScalarType type);
at::Tensor reused_like(const at::Tensor& t);

}  // namespace resnet_fused::cpu::engine
