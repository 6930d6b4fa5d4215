#include "memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../../block/integer_division.h"

namespace resnet_fused::cpu::engine {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20, kMargin = 4096;
constexpr int64_t kChunk = 4 * kHugePage;

// The offset within a page at which memory begins, a different one each time. Of two buffers that are walked side by
// side, a load from one would wait for stores to the other if their addresses differed by whole pages.
int64_t next_shift() {
  static std::atomic<int64_t> turn{0};
  return turn.fetch_add(1) % 4 * 1088;
}

// The memory begins with the address to free.
unsigned char* allocate_raw(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* memory = nullptr;
  TORCH_CHECK_WITH(
      OutOfMemoryError, posix_memalign(&memory, alignment, bytes + kMargin) == 0, "the CPU engine needs ", bytes,
      " bytes more than there are; a smaller batch needs less");
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint
#endif
  auto* shifted = static_cast<unsigned char*>(memory) + 64 + next_shift();
  std::memcpy(shifted - sizeof(memory), &memory, sizeof(memory));
  return shifted;
}

#if defined(__linux__)
// Fresh pages: those of the heap that have been touched stay small.
Memory map(int64_t bytes) {
  const int64_t mapped = bytes + kHugePage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(
      OutOfMemoryError, memory != MAP_FAILED, "the CPU engine needs ", bytes, " bytes more than there are");
  auto* aligned = reinterpret_cast<unsigned char*>(round_up(reinterpret_cast<int64_t>(memory), kHugePage));
  madvise(aligned, bytes, MADV_HUGEPAGE);  // a hint
  return {aligned, [memory, mapped](unsigned char*) { munmap(memory, mapped); }};
}
#endif

void free_raw(unsigned char* shifted) {
  void* memory;
  std::memcpy(&memory, shifted - sizeof(memory), sizeof(memory));
  std::free(memory);
}

// The memory that earlier results have left, by size.
class Pool {
 public:
  unsigned char* take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = free_.find(bytes);
      if (found != free_.end()) {
        auto* memory = found->second;
        free_.erase(found);
        held_ -= bytes;
        used_ += bytes;
        return memory;
      }
      used_ += bytes;
      // other sizes than before: what is held gives way to them
      while (held_ > kKept && held_ + used_ > most_used_) release(std::prev(free_.end()));
      most_used_ = std::max(most_used_, used_);
    }
    try {
      return allocate_raw(bytes);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      used_ -= bytes;
      throw;
    }
  }

  void give(unsigned char* memory, int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      used_ -= bytes;
      if (held_ + bytes <= std::max(kKept, most_used_ - used_)) {
        free_.emplace(bytes, memory);
        held_ += bytes;
        return;
      }
    }
    free_raw(memory);
  }

 private:
  using Free = std::multimap<int64_t, unsigned char*>;
  std::mutex mutex_;
  Free free_;
  int64_t held_ = 0, used_ = 0, most_used_ = 0;

  void release(Free::iterator block) {
    held_ -= block->first;
    free_raw(block->second);
    free_.erase(block);
  }
};

Pool& pool() {
  static Pool* const whole_process = new Pool;  // tensors may outlive every destructor
  return *whole_process;
}

struct Scratch {
  Memory memory;
  int64_t bytes = 0;
};
thread_local Scratch this_thread;

}  // namespace

Memory allocate_together(int64_t bytes) {
#if defined(__linux__)
  static std::mutex mutex;
  static Memory chunk;
  static int64_t used = 0, size = 0;
  const int64_t needed = round_up(bytes, 64) + next_shift();
  const std::lock_guard lock(mutex);
  if (used + needed > size) {
    const int64_t next = round_up(std::max(needed, kChunk), kHugePage);
    chunk = map(next);
    size = next;
    used = 0;
  }
  Memory memory(chunk, chunk.get() + used);
  used += needed;
  return memory;
#else
  return allocate(bytes);
#endif
}

Memory allocate(int64_t bytes) {
  return {allocate_raw(bytes), [](unsigned char* memory) { free_raw(memory); }};
}

Memory reuse(int64_t bytes) {
  return {pool().take(bytes), [bytes](unsigned char* memory) { pool().give(memory, bytes); }};
}

unsigned char* scratch(int64_t bytes) {
  if (this_thread.bytes < bytes) {
    this_thread = {};
    this_thread = {allocate(bytes), bytes};
  }
  return this_thread.memory.get();
}

at::Tensor reused_empty(int64_t images, int64_t channels, int64_t height, int64_t width, at::ScalarType type) {
  const int64_t bytes = images * channels * height * width * static_cast<int64_t>(c10::elementSize(type));
  unsigned char* memory = pool().take(bytes);
  return at::from_blob(
      memory, {images, channels, height, width}, {height * width * channels, 1, width * channels, channels},
      [bytes](void* given) { pool().give(static_cast<unsigned char*>(given), bytes); },
      at::TensorOptions().dtype(type));
}

at::Tensor reused_like(const at::Tensor& t) {
  return reused_empty(t.size(0), t.size(1), t.size(2), t.size(3), t.scalar_type());
}

}  // namespace resnet_fused::cpu::engine
