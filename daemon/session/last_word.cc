// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/last_word.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace expertd::session {

void LastWord::add(base::SessionId session, const std::shared_ptr<RingMemory>& ring) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(rings_, [](const auto& entry) { return entry.second.expired(); });
  rings_[session.value] = ring;
  if (said_ != EXPERTD_REASON_NONE) {
    write(*ring, said_);
  }
}

void LastWord::say(base::Reason reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (said_ != EXPERTD_REASON_NONE) {
    return;
  }
  said_ = reason;
  for (const auto& [session, held] : rings_) {
    if (const std::shared_ptr<RingMemory> ring = held.lock(); ring != nullptr) {
      write(*ring, reason);
    }
  }
}

base::Reason LastWord::said() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return said_;
}

// The order is the client's: it sees that the session is over, and then reads why.
void LastWord::write(RingMemory& ring, base::Reason reason) {
  expertd_ring_header* header = ring.header();
  uint32_t none = EXPERTD_REASON_NONE;
  (void)__atomic_compare_exchange_n(&header->end_reason, &none, static_cast<uint32_t>(reason), false, __ATOMIC_RELEASE,
                                    __ATOMIC_RELAXED);
  __atomic_fetch_or(&header->session_flags, EXPERTD_SESSION_CLOSED, __ATOMIC_ACQ_REL);
  // All waiters, without a look at client_waiters: this happens once. The wake-up cannot block.
  __atomic_fetch_add(&header->completion_futex, 1U, __ATOMIC_SEQ_CST);
  (void)::syscall(SYS_futex, &header->completion_futex, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace expertd::session
