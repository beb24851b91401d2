#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vitkernels::twin {
namespace {

size_t guard_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, STACK_BYTES);
#endif
  munmap(mapping_, STACK_BYTES + guard_bytes());
}

void Fiber::start(std::function<void()> main) {
  main_ = std::move(main);
  void* memory = mmap(nullptr, STACK_BYTES + guard_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("host twin: no memory for a fiber's stack");
  mapping_ = static_cast<char*>(memory);
  stack_ = mapping_ + guard_bytes();
  mprotect(mapping_, guard_bytes(), PROT_NONE);  // an overflow stops here and not in the next fiber's stack
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = STACK_BYTES;
  inside_.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(entry), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self & 0xffffffffu));
}

void Fiber::entry(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_bytes_);
#endif
  self->main_();
  std::terminate();
}

#if defined(__SANITIZE_ADDRESS__)

void Fiber::resume() {
  __sanitizer_start_switch_fiber(&outside_fake_stack_, stack_, STACK_BYTES);
  swapcontext(&outside_, &inside_);
  __sanitizer_finish_switch_fiber(outside_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
  __sanitizer_start_switch_fiber(&inside_fake_stack_, outside_stack_, outside_bytes_);
  swapcontext(&inside_, &outside_);
  __sanitizer_finish_switch_fiber(inside_fake_stack_, &outside_stack_, &outside_bytes_);
}

#else

void Fiber::resume() {
  if (_setjmp(outside_jump_) != 0) return;
  if (entered_) _longjmp(inside_jump_, 1);
  entered_ = true;
  setcontext(&inside_);
}

void Fiber::suspend() {
  if (_setjmp(inside_jump_) == 0) _longjmp(outside_jump_, 1);
}

#endif

}  // namespace vitkernels::twin
