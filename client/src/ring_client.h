// SPDX-License-Identifier: Apache-2.0
// RingClient: the client's side of one session's shared-memory ring (proto/abi/ring_v1.h). submit() is called under the
// session's submit lock; the rest by any thread without a lock. It owns the mapping and borrows the wake eventfd. What
// the daemon writes is copied and bounded before use; geometry is read once. It never waits without a deadline.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "client/src/completion_source.h"
#include "client/src/owned_fd.h"
#include "client/src/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::client {

class RingClient final : public CompletionSource {
  struct Private {
    explicit Private() = default;
  };

 public:
  /// Maps and checks the ring; the descriptor is not needed afterwards. wake_fd must outlive the ring.
  static Status open(const OwnedFd& fd, uint64_t ring_bytes, int wake_fd, std::unique_ptr<RingClient>* ring);
  /// Only for open().
  RingClient(Private, void* mapping, uint64_t mapping_bytes, int wake_fd);
  ~RingClient() override;

  uint32_t slot_count() const { return slot_count_; }
  /// The daemon knows EXPERTD_SLOT_REFUSED.
  bool takes_refusals() const { return abi_minor_ >= 1; }
  bool takes_token_bounds() const { return abi_minor_ >= 3; }
  /// The daemon knows EXPERTD_SLOT_CAPTURED.
  bool takes_captures() const { return abi_minor_ >= 3; }
  uint32_t slot_index(uint64_t seq) const override { return static_cast<uint32_t>((seq - 1) & (slot_count_ - 1)); }
  /// Sequence of the next submission.
  uint64_t next_seq() const { return next_seq_.load(std::memory_order_acquire); }
  /// The place of next_seq() is free: the operation that had it has completed.
  bool next_slot_free() const;

  /// Writes the descriptor and publishes it. slot.seq must be next_seq() and its slot free.
  void submit(const expertd_slot& slot);

  /// The operation seq has ended; its completion may have been overwritten by a later user of its slot.
  bool has_ended(uint64_t seq) const;
  bool try_read(uint64_t seq, expertd_completion* completion) const override;
  /// Until has_ended(seq). Spins about 20 us, then sleeps on the shared futex.
  WaitEnd wait(uint64_t seq, uint64_t deadline_ns);
  /// Ends all waits, present and future. For the client thread when the lease is over.
  void close();
  bool closed() const { return closed_.load(std::memory_order_seq_cst); }

  uint32_t session_flags() const;
  /// Why the daemon ended the session, a known Reason; NONE when it did not or said nothing. Readable after its end.
  int32_t end_reason() const;

 private:
  expertd_ring_header* header() const { return static_cast<expertd_ring_header*>(mapping_); }
  expertd_slot* slot_at(uint32_t index) const;
  expertd_completion* completion_at(uint32_t index) const;
  uint64_t completed_seq(uint32_t index) const;
  bool session_over() const;
  WaitEnd sleep_until_ended(uint64_t seq, uint64_t deadline_ns);

  void* const mapping_;
  const uint64_t mapping_bytes_;
  const int wake_fd_;
  uint32_t slot_count_ = 0;
  uint32_t abi_minor_ = 0;
  uint64_t slots_offset_ = 0;
  uint64_t completions_offset_ = 0;
  // Written under the submit lock, read anywhere.
  std::atomic<uint64_t> next_seq_{1};
  std::atomic<bool> closed_{false};
};

}  // namespace expertd::client
