// SPDX-License-Identifier: Apache-2.0
// Interleaves two calls at every instruction, on one thread and the same way every time: the processor steps through
// the first call, and the second runs as a whole in a trap between two of its instructions. Threads meet inside a
// window of a few instructions once in millions of turns, or never on a busy machine; this finds it at once. It shows
// every order of the accesses, but not what processors reorder: that is for the comments and the thread sanitizer.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>

namespace expertd::test {

class EveryInstruction {
 public:
  /// Runs `first`, and `second` before the `at`-th instruction of it, counted from 1; false when `first` is shorter,
  /// `second` has not run then. Neither may allocate: the second runs in a signal handler.
  static bool run(uint64_t at, const std::function<void()>& first, const std::function<void()>& second) {
    struct sigaction trap {};
    struct sigaction before {};
    trap.sa_sigaction = &EveryInstruction::stepped;
    trap.sa_flags = SA_SIGINFO;
    (void)::sigaction(SIGTRAP, &trap, &before);
    left_ = at;
    second_ = &second;
    set_stepping(true);
    first();
    set_stepping(false);
    (void)::sigaction(SIGTRAP, &before, nullptr);
    return left_ == 0;
  }

 private:
  static constexpr uint64_t kTrapFlag = 0x100;

  static void stepped(int /*signal*/, siginfo_t* /*info*/, void* context) {
    if (left_ == 0 || --left_ != 0) {
      return;
    }
    (*second_)();
    // The rest of the first call needs no more steps.
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~static_cast<greg_t>(kTrapFlag);
  }

  // The pushes leave the red zone alone, which the compiler may be using.
  static void set_stepping(bool on) {
    if (on) {
      asm volatile("lea -128(%%rsp), %%rsp; pushfq; orq %0, (%%rsp); popfq; lea 128(%%rsp), %%rsp" ::"i"(kTrapFlag)
                   : "memory", "cc");
    } else {
      asm volatile("lea -128(%%rsp), %%rsp; pushfq; andq %0, (%%rsp); popfq; lea 128(%%rsp), %%rsp" ::"i"(~kTrapFlag)
                   : "memory", "cc");
    }
  }

  static inline uint64_t left_ = 0;
  static inline const std::function<void()>* second_ = nullptr;
};

}  // namespace expertd::test
