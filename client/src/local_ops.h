// SPDX-License-Identifier: Apache-2.0
// LocalOps: the local operations of a GPU session, from their launch on the caller's stream to their results. It is to
// them what ring and OpTable are to operations of the daemon: as many outstanding as slots, the results of the last
// ones kept. An end is seen in the slot's record, which the kernel writes. Any thread: issue() serialises, the rest
// holds short locks only, and waits hold none. Owned by the Session; it outlives re-attaching, which local work is not
// touched by. Nothing wakes a waiter: it polls, at first without pause and then in steps of kNapNs.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "client/src/completion_source.h"
#include "client/src/local_kernels/local_kernels.h"
#include "client/src/op_table.h"

namespace expertd::client {

struct OpRequest;

/// Marks the sequence of an event as one of a local operation; the daemon's do not get that far.
inline constexpr uint64_t kLocalEvent = uint64_t{1} << 47;

/// The kernel's parameters for what build_layout() made; false when the daemon must say what is wrong with it.
bool layout_params(const OpRequest& request, LayoutParams* params);

class LocalOps final : public CompletionSource {
 public:
  explicit LocalOps(LocalKernels* kernels) : kernels_(kernels), ops_(nullptr) {}

  /// Launches on the stream. `incarnation` goes into the upper bits of the event. RING_OVERFLOW when no slot becomes
  /// free before the operation's own deadline.
  Status issue_layout(const OpRequest& request, LayoutParams params, uint64_t incarnation, expertd_stream_t stream,
                      uint64_t* event);

  /// BAD_STATE for an event that was not issued yet.
  Status find(uint64_t event, Lookup* lookup, OpOutcome* outcome, uint64_t* deadline_ns);
  /// Until the operation has ended. kClosed: the context is lost.
  WaitEnd wait(uint64_t event, uint64_t deadline_ns);
  Status stream_word(uint64_t event, const void** word, uint64_t* value) const;
  Status health() { return kernels_->health(); }
  LocalKernels* kernels() { return kernels_; }

  /// Until no operation that was issued before uses any of these bytes; BUFFER_BUSY at the deadline.
  Status wait_unused(const Extent& bytes, uint64_t deadline_ns);

  uint32_t slot_index(uint64_t seq) const override { return static_cast<uint32_t>((seq - 1) % kLocalSlots); }
  bool try_read(uint64_t seq, expertd_completion* completion) const override;

  static bool is_local(uint64_t event) { return (event & kLocalEvent) != 0; }

 private:
  /// What an operation reads and writes, while it is in its slot.
  struct Use {
    uint64_t seq = 0;
    std::array<Extent, 5> extents{};
  };

  static uint64_t seq_of(uint64_t event) { return event & (kLocalEvent - 1); }
  bool has_ended(uint64_t seq) const;
  WaitEnd wait_seq(uint64_t seq, uint64_t deadline_ns);
  Status wait_for_slot(uint64_t deadline_ns);
  void note_use(const OpRequest& request, uint64_t seq);

  LocalKernels* const kernels_;
  OpTable ops_;
  std::mutex issue_mutex_;
  // Written under the issue lock, read anywhere.
  std::atomic<uint64_t> next_seq_{1};
  std::mutex uses_mutex_;
  std::array<Use, kLocalSlots> uses_{};
};

}  // namespace expertd::client
