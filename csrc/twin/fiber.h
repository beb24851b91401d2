// A stackful coroutine: ucontext gives it its own stack, setjmp/longjmp switch (swapcontext makes two system
// calls a switch). Under AddressSanitizer every switch is announced and made by swapcontext, which it
// follows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <functional>

namespace vitkernels::twin {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // `main` never returns: it suspends.
  void start(std::function<void()> main);
  void resume();   // from outside: run until the fiber suspends
  void suspend();  // from inside

  const char* stack() const { return stack_; }

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t STACK_BYTES = 256 * 1024;  // red zones around every local
#else
  static constexpr size_t STACK_BYTES = 128 * 1024;
#endif

 private:
  static void entry(unsigned high, unsigned low);

  std::function<void()> main_;
  char* mapping_ = nullptr;
  char* stack_ = nullptr;
  bool entered_ = false;
  ucontext_t outside_{};
  ucontext_t inside_{};
#if defined(__SANITIZE_ADDRESS__)
  void* outside_fake_stack_ = nullptr;
  void* inside_fake_stack_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
#else
  jmp_buf outside_jump_;
  jmp_buf inside_jump_;
#endif
};

}  // namespace vitkernels::twin
