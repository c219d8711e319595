// SPDX-License-Identifier: Apache-2.0
#include "client/src/ring_client.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstring>

#include "client/src/clock.h"
#include "client/src/cpu_pause.h"

namespace expertd::client {
namespace {

// Longer than most low-latency operations and shorter than a scheduler's slice; a wake of a sleeper costs about 24 us.
constexpr uint64_t kSpinNs = 20'000;
constexpr uint64_t kAloneNs = 3'000;  // of these without giving way: an operation on another CPU takes less
constexpr int kPausesPerClockRead = 16;
constexpr uint64_t kMaxRingBytes = uint64_t{1} << 20;

static_assert(std::atomic_ref<uint64_t>::is_always_lock_free && std::atomic_ref<uint32_t>::is_always_lock_free);

template <typename Word>
std::atomic_ref<Word> atomic_word(Word* word) {
  return std::atomic_ref<Word>(*word);
}

// Shared, because the daemon wakes from another process: std::atomic::wait would use a private futex.
void futex_sleep(uint32_t* word, uint32_t expected, uint64_t deadline_ns) {
  const timespec deadline = to_timespec(deadline_ns);
  syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, &deadline, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void futex_wake_all(uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

Status bad_ring(const char* field, uint64_t value) {
  return error(EXPERTD_REASON_PROTOCOL_VERSION, "the daemon's ring has %s = %llu, which this library does not know",
               field, static_cast<unsigned long long>(value));
}

bool region_fits(uint64_t offset, uint64_t bytes, uint64_t total) {
  return offset % EXPERTD_FLAG_STRIDE == 0 && offset >= EXPERTD_RING_HEADER_BYTES && offset <= total &&
         bytes <= total - offset;
}

Status check_header(const expertd_ring_header& header, uint64_t mapped_bytes) {
  if (header.magic != EXPERTD_RING_MAGIC) {
    return bad_ring("magic", header.magic);
  }
  if (header.abi_major != EXPERTD_ABI_MAJOR) {
    return bad_ring("abi_major", header.abi_major);
  }
  const uint32_t count = header.slot_count;
  if (count < 8 || count > EXPERTD_RING_SLOTS_MAX || (count & (count - 1)) != 0) {
    return bad_ring("slot_count", count);
  }
  if (header.slot_bytes != EXPERTD_SLOT_BYTES || header.completion_bytes != EXPERTD_COMPLETION_BYTES) {
    return bad_ring("slot_bytes", header.slot_bytes);
  }
  if (!region_fits(header.slots_offset, uint64_t{count} * EXPERTD_SLOT_BYTES, mapped_bytes)) {
    return bad_ring("slots_offset", header.slots_offset);
  }
  if (!region_fits(header.completions_offset, uint64_t{count} * EXPERTD_COMPLETION_BYTES, mapped_bytes)) {
    return bad_ring("completions_offset", header.completions_offset);
  }
  return {};
}

// A mapping of a file that its owner can shrink can be made to fault.
Status check_file(int fd, uint64_t bytes) {
  struct stat info {};
  if (fstat(fd, &info) != 0) {
    return system_error("fstat of the ring");
  }
  if (bytes < EXPERTD_RING_HEADER_BYTES || bytes > kMaxRingBytes || static_cast<uint64_t>(info.st_size) < bytes) {
    return bad_ring("total_bytes", bytes);
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return error(EXPERTD_REASON_UNSEALED_MEMORY, "the daemon's ring is not sealed against shrinking");
  }
  return {};
}

}  // namespace

Status RingClient::open(const OwnedFd& fd, uint64_t ring_bytes, int wake_fd, std::unique_ptr<RingClient>* ring) {
  Status status = check_file(fd.get(), ring_bytes);
  if (!status.ok()) {
    return status;
  }
  void* mapping = mmap(nullptr, ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (mapping == MAP_FAILED) {
    return system_error("mmap of the ring");
  }
  // A forked child must not be able to write into its parent's ring.
  madvise(mapping, ring_bytes, MADV_DONTFORK);
  auto opened = std::make_unique<RingClient>(Private(), mapping, ring_bytes, wake_fd);
  expertd_ring_header copy;
  std::memcpy(&copy, mapping, sizeof(copy));
  status = check_header(copy, ring_bytes);
  if (!status.ok()) {
    return status;
  }
  opened->slot_count_ = copy.slot_count;
  opened->abi_minor_ = copy.abi_minor;
  opened->slots_offset_ = copy.slots_offset;
  opened->completions_offset_ = copy.completions_offset;
  *ring = std::move(opened);
  return {};
}

RingClient::RingClient(Private, void* mapping, uint64_t mapping_bytes, int wake_fd)
    : mapping_(mapping), mapping_bytes_(mapping_bytes), wake_fd_(wake_fd) {}

RingClient::~RingClient() {
  munmap(mapping_, mapping_bytes_);
}

expertd_slot* RingClient::slot_at(uint32_t index) const {
  char* base = static_cast<char*>(mapping_) + slots_offset_;
  return reinterpret_cast<expertd_slot*>(base) + index;
}

expertd_completion* RingClient::completion_at(uint32_t index) const {
  char* base = static_cast<char*>(mapping_) + completions_offset_;
  return reinterpret_cast<expertd_completion*>(base) + index;
}

bool RingClient::next_slot_free() const {
  const uint64_t seq = next_seq();
  return seq <= slot_count_ || completed_seq(slot_index(seq)) == seq - slot_count_;
}

void RingClient::submit(const expertd_slot& slot) {
  std::memcpy(slot_at(slot_index(slot.seq)), &slot, sizeof(slot));
  // Before the tail, so that whoever sees the completion of this operation also sees that it was issued.
  next_seq_.store(slot.seq + 1, std::memory_order_release);
  // Pairs with the daemon's acquire load: whoever sees the tail sees the slot.
  atomic_word(&header()->submit_tail).store(slot.seq, std::memory_order_release);
  // Either the daemon sees the tail before it sleeps or this sees that it sleeps; pairs with its fence between storing
  // daemon_sleeping and reading the tail once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (atomic_word(&header()->daemon_sleeping).load(std::memory_order_relaxed) != 0) {
    const uint64_t one = 1;
    // It fails only at a full counter, and then the daemon is awake already.
    static_cast<void>(!write(wake_fd_, &one, sizeof(one)));
  }
}

uint64_t RingClient::completed_seq(uint32_t index) const {
  // Pairs with the daemon's release store of seq, the last word of a completion that it writes.
  return atomic_word(&completion_at(index)->seq).load(std::memory_order_acquire);
}

// A waiter may get to run only after another thread used the slot again and the later operation completed too. A later
// sequence counts only when it was issued, because its submitter has collected the earlier result by then: a word that
// the daemon made up must not end a wait for a result that is not there.
bool RingClient::has_ended(uint64_t seq) const {
  const uint64_t completed = completed_seq(slot_index(seq));
  return completed == seq || (completed > seq && completed < next_seq() && slot_index(completed) == slot_index(seq));
}

bool RingClient::try_read(uint64_t seq, expertd_completion* completion) const {
  if (completed_seq(slot_index(seq)) != seq) {
    return false;
  }
  std::memcpy(completion, completion_at(slot_index(seq)), sizeof(*completion));
  completion->seq = seq;
  if (completion->expert_count_entries > EXPERTD_COMPLETION_EXPERTS) {
    completion->expert_count_entries = EXPERTD_COMPLETION_EXPERTS;
  }
  return true;
}

bool RingClient::session_over() const {
  return closed() || (session_flags() & EXPERTD_SESSION_CLOSED) != 0;
}

WaitEnd RingClient::wait(uint64_t seq, uint64_t deadline_ns) {
  const uint64_t spin_end = now_ns() + kSpinNs;
  for (;;) {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (has_ended(seq)) {
        return WaitEnd::kComplete;
      }
      pause_cpu();
    }
    const uint64_t now = now_ns();
    if (now >= deadline_ns || now >= spin_end || session_over()) {
      break;
    }
    if (spin_end - now < kSpinNs - kAloneNs) {
      (void)sched_yield();  // the engine may want this very CPU; polling on would keep it away
    }
  }
  return sleep_until_ended(seq, deadline_ns);
}

WaitEnd RingClient::sleep_until_ended(uint64_t seq, uint64_t deadline_ns) {
  auto futex = atomic_word(&header()->completion_futex);
  auto waiters = atomic_word(&header()->client_waiters);
  // Before the first look at the completion, so that the daemon either sees the waiter or this sees the completion.
  waiters.fetch_add(1, std::memory_order_seq_cst);
  WaitEnd end = WaitEnd::kComplete;
  for (;;) {
    const uint32_t seen = futex.load(std::memory_order_seq_cst);
    if (has_ended(seq)) {
      break;
    }
    if (session_over()) {
      // The daemon may have completed it as its last act.
      end = has_ended(seq) ? WaitEnd::kComplete : WaitEnd::kClosed;
      break;
    }
    if (now_ns() >= deadline_ns) {
      end = WaitEnd::kDeadline;
      break;
    }
    futex_sleep(&header()->completion_futex, seen, deadline_ns);
  }
  waiters.fetch_sub(1, std::memory_order_seq_cst);
  return end;
}

void RingClient::close() {
  closed_.store(true, std::memory_order_seq_cst);
  // A waiter between its look at closed_ and its sleep has read the old word, so that its sleep ends at once.
  atomic_word(&header()->completion_futex).fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(&header()->completion_futex);
}

uint32_t RingClient::session_flags() const {
  return atomic_word(&header()->session_flags).load(std::memory_order_acquire);
}

int32_t RingClient::end_reason() const {
  const auto reason = static_cast<int32_t>(atomic_word(&header()->end_reason).load(std::memory_order_acquire));
  return reason_is_known(reason) ? reason : EXPERTD_REASON_NONE;
}

}  // namespace expertd::client
