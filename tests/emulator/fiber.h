// Fibers: functions on stacks of their own which hand the one OS thread to one another.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if !defined(__x86_64__) || defined(RESNET_FUSED_EMULATOR_UCONTEXT)
#define RESNET_FUSED_EMULATOR_PORTABLE 1
#include <ucontext.h>
#else
#define RESNET_FUSED_EMULATOR_PORTABLE 0
#endif

#ifdef __SANITIZE_ADDRESS__
#define RESNET_FUSED_EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define RESNET_FUSED_EMULATOR_ASAN 0
#endif

// Hidden: two libraries of one process that were built from different sources must not share their state.
#pragma GCC visibility push(hidden)

namespace resnet_fused::cuda::emulator {

// What a suspended function needs to go on.
struct Context {
#if RESNET_FUSED_EMULATOR_PORTABLE
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  // For AddressSanitizer, which must know whose stack is in use.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

#if !RESNET_FUSED_EMULATOR_PORTABLE
// Without `noipa` the caller would be compiled to rely on what the body below leaves untouched.
__attribute__((naked, noipa)) inline void swap_stacks(void** /*suspended*/, void* /*resumed*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "jmp *%rcx");
}
#endif

// Makes `context` one that starts `entry`, which never returns, on the stack [bottom, bottom + bytes).
inline void prepare(Context& context, char* bottom, size_t bytes, void (*entry)()) {
  context.stack = bottom;
  context.stack_bytes = bytes;
  context.fake_stack = nullptr;
#if RESNET_FUSED_EMULATOR_ASAN
  __asan_unpoison_memory_region(bottom, bytes);  // frames that were abandoned left their marks
#endif
#if RESNET_FUSED_EMULATOR_PORTABLE
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(bottom + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where a return address would be, so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

// Suspends the running function in `from` and resumes `to`; returns when `from` is resumed.
inline void change(Context& from, Context& to) {
#if RESNET_FUSED_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if RESNET_FUSED_EMULATOR_PORTABLE
  swapcontext(&from.registers, &to.registers);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if RESNET_FUSED_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Leaves the running function for good and resumes `to`.
[[noreturn]] inline void leave(Context& from, Context& to) {
#if RESNET_FUSED_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
#if RESNET_FUSED_EMULATOR_PORTABLE
  (void)from;
  setcontext(&to.registers);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
  __builtin_unreachable();
}

// The first thing a new fiber does. `first` is the context that the first fiber was started from; only here can its
// stack be learnt.
inline void arrive(Context& first) {
#if RESNET_FUSED_EMULATOR_ASAN
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (first.stack == nullptr) {
    first.stack = stack;
    first.stack_bytes = bytes;
  }
#else
  (void)first;
#endif
}

// Stacks that are kept from launch to launch, each with a page below it that must not be touched.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  // Room for `count` stacks; what lay on them is lost.
  void reserve(int count) {
    if (count <= count_) return;
    release();
    void* mapped = mmap(
        nullptr, stride() * static_cast<size_t>(count), PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(mapped);
    count_ = count;
    // Where the kernel refuses so many separate areas, the stacks work without their guards.
    for (int i = 0; i < count; ++i) mprotect(memory_ + stride() * static_cast<size_t>(i), page(), PROT_NONE);
  }

  char* bottom(int index) const { return memory_ + stride() * static_cast<size_t>(index) + page(); }

  // The tops are staggered: at equal distances from page boundaries they would all share a few lines of the cache.
  static size_t bytes(int index) { return kBytes - static_cast<size_t>(index * 17 % 64) * 64; }

 private:
  static constexpr size_t kBytes = RESNET_FUSED_EMULATOR_ASAN ? 256 * 1024 : 64 * 1024;

  static size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }
  static size_t stride() { return kBytes + page(); }

  void release() {
    if (memory_ == nullptr) return;
#if RESNET_FUSED_EMULATOR_ASAN
    __asan_unpoison_memory_region(memory_, stride() * static_cast<size_t>(count_));
#endif
    munmap(memory_, stride() * static_cast<size_t>(count_));
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace resnet_fused::cuda::emulator

#pragma GCC visibility pop
