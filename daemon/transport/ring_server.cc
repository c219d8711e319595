// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/ring_server.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "daemon/transport/admit.h"

namespace expertd::transport {

namespace {

// Words shared with the client. The builtins are used because the ABI header is C and has plain integers.
uint64_t load_acquire(const uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
void store_release(uint64_t* word, uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/// Whether another rank has submitted the rank's next operation, which then ends only with this rank's part.
bool is_awaited(const engine::RankState* rank) {
  if (rank == nullptr) {
    return false;
  }
  const engine::GroupShared& group = *rank->group;
  return group.not_posted(rank->next_number) != group.all_ranks() - group.lost() - group.excluded();
}

void refuse_for_drain(engine::Request* request) {
  request->rejected_reason = EXPERTD_REASON_DRAINING;
  request->rejected_argument = EXPERTD_ARGUMENT_NONE;
  request->rejected_value = 0;
  request->rejected_minimum = 0;
  request->rejected_maximum = 0;
}

}  // namespace

RingServer::RingServer(session::SessionTables* tables, session::RingMemory* ring, void* flag_page,
                       uint64_t default_timeout_ns)
    : tables_(tables),
      ring_(ring),
      slot_count_(ring->slot_count()),
      default_timeout_ns_(default_timeout_ns),
      engine_session_(tables->id, this, flag_page) {}

bool RingServer::has_submissions() const {
  return !faulted_ && load_acquire(&ring_->header()->submit_tail) != head_;
}

bool RingServer::poll(engine::Engine& engine, uint64_t now_ns) {
  if (faulted_) {
    return false;
  }
  const uint64_t tail = load_acquire(&ring_->header()->submit_tail);  // pairs with the client's release after the slot
  if (tail == head_) {
    return false;
  }
  if (tail < head_ || tail - head_ > slot_count_) {
    faulted_ = true;
    return true;
  }
  while (head_ != tail) {
    const uint32_t index = static_cast<uint32_t>(head_ % slot_count_);
    if (!engine_session_.slot_free(index)) {
      faulted_ = true;  // the client reused a slot before its completion
      return true;
    }
    expertd_slot slot;
    std::memcpy(&slot, ring_->slots() + index, sizeof(slot));  // the one copy; the client may write on
    const AdmitContext context{index, head_ + 1, now_ns, default_timeout_ns_};
    engine::RankState* rank = admit(slot, context, tables_, &engine_session_.request(index));
    if (draining_ && engine_session_.request(index).rejected_reason == 0 && !is_awaited(rank)) {
      refuse_for_drain(&engine_session_.request(index));
    }
    if (engine_session_.request(index).rejected_reason != 0) {
      tables_->stats.rejected.fetch_add(1, std::memory_order_relaxed);
    }
    ++in_flight_;
    engine.submit(&engine_session_, index, rank);
    ++head_;
  }
  store_release(&ring_->header()->submit_head, head_);
  tables_->stats.outstanding.store(in_flight_, std::memory_order_relaxed);
  return true;
}

void RingServer::set_sleeping(bool sleeping) {
  // seq_cst pairs with the client's fence between its tail store and its read of this word.
  __atomic_store_n(&ring_->header()->daemon_sleeping, sleeping ? 1U : 0U, __ATOMIC_SEQ_CST);
}

void RingServer::set_flags(uint32_t session_flags) {
  draining_ |= (session_flags & EXPERTD_SESSION_DRAINING) != 0;
  __atomic_fetch_or(&ring_->header()->session_flags, session_flags, __ATOMIC_ACQ_REL);
  wake_client();
}

// The routing of a dispatch that failed is not whole, so nothing may be combined with it. Before the completion is
// seen: what is submitted after it must be refused.
void RingServer::drop_handle(const engine::Request& request) {
  const bool makes_one = (request.shape.kind == kernels::OpKind::kDispatch && request.shape.cached == 0) ||
                         request.shape.kind == kernels::OpKind::kLlDispatch;
  if (!makes_one || request.handle_index >= tables_->handles.size()) {
    return;
  }
  session::HandleState& handle = tables_->handles[request.handle_index];
  if (handle.generation == request.handle_generation) {
    tables_->close_handle(&handle);
    handle.generation = 0;
  }
}

void RingServer::complete(const engine::Request& request, const expertd_completion& completion) {
  if (completion.reason != EXPERTD_REASON_NONE) {
    drop_handle(request);
  }
  expertd_completion* slot = ring_->completions() + request.slot;
  constexpr size_t kSeqBytes = sizeof(completion.seq);
  const size_t bytes = offsetof(expertd_completion, expert_counts) +
                       completion.expert_count_entries * sizeof(completion.expert_counts[0]);
  std::memcpy(reinterpret_cast<char*>(slot) + kSeqBytes, reinterpret_cast<const char*>(&completion) + kSeqBytes,
              bytes - kSeqBytes);
  store_release(&slot->seq, completion.seq);  // pairs with the client's acquire of seq
  session::SessionStats& stats = tables_->stats;
  --in_flight_;
  const uint64_t number = stats.completed.fetch_add(1, std::memory_order_relaxed);
  stats.bytes.fetch_add(completion.local_bytes + completion.remote_bytes, std::memory_order_relaxed);
  const uint64_t latency_ns = completion.complete_ns - std::min(request.submit_ns, completion.complete_ns);
  stats.latency_ns[number % session::SessionStats::kLatencies].store(
      static_cast<uint32_t>(std::min<uint64_t>(latency_ns, UINT32_MAX)), std::memory_order_relaxed);
  stats.outstanding.store(in_flight_, std::memory_order_relaxed);
  wake_client();
}

void RingServer::wake_client() {
  expertd_ring_header* header = ring_->header();
  // seq_cst pairs with the waiter's increment of client_waiters before it reads the futex word again.
  __atomic_fetch_add(&header->completion_futex, 1U, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&header->client_waiters, __ATOMIC_SEQ_CST) != 0) {
    // A shared futex: the waiters are in another process. The wake-up cannot block.
    (void)::syscall(SYS_futex, &header->completion_futex, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

}  // namespace expertd::transport
