// SPDX-License-Identifier: Apache-2.0
// Life of a session: attach, re-attach, detach, and who may be inside meanwhile.
#include "client/src/session.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <utility>

#include "client/src/buffer_pair.h"
#include "client/src/clock.h"
#include "client/src/group.h"
#include "client/src/metrics.h"

namespace expertd::client {
namespace {

constexpr uint64_t kDefaultOpNs = 100 * kNsPerS;
constexpr uint64_t kLeaveAtDetachNs = 1 * kNsPerS;

// A futex of this process only: the number of callers inside.
void sleep_while(std::atomic<uint32_t>* word, uint32_t value) {
  const timespec limit = to_timespec(100 * kNsPerMs);
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &limit, nullptr, 0);
}

int hex_value(char c) {
  if (c >= '0' && c <= '9') {
    return c - '0';
  }
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// The trace id of a W3C traceparent "00-<32 hex>-<16 hex>-<2 hex>"; zero when there is none.
std::array<uint8_t, 16> trace_id_of(const std::string& traceparent) {
  std::array<uint8_t, 16> id{};
  if (traceparent.size() < 55 || traceparent[2] != '-' || traceparent[35] != '-') {
    return id;
  }
  for (size_t i = 0; i < id.size(); ++i) {
    const int high = hex_value(traceparent[3 + 2 * i]);
    const int low = hex_value(traceparent[4 + 2 * i]);
    if (high < 0 || low < 0) {
      return {};
    }
    id[i] = static_cast<uint8_t>(high * 16 + low);
  }
  return id;
}

}  // namespace

Session::Session() : fork_generation_(fork_generation()) {
  count_session(1);
}

Session::~Session() {
  // Its thread uses the device side; buffers are unmapped with the device side still there.
  connection_.reset();
  groups_.clear();
  pairs_.clear();
  // The daemon's windows go below, and kernels may read them.
  static_cast<void>(wait_unused(nullptr, UINT64_MAX));
  local_.reset();
  ops_.reset();
  staging_.reset();
  memory_.reset();
  count_session(-1);
}

Status Session::attach(AttachRequest request, Session** session) {
  install_fork_handler();
  auto attached = std::make_unique<Session>();
  Status status = attached->open_first(std::move(request));
  if (status.ok()) {
    *session = attached.release();
  }
  return status;
}

Status Session::open_first(AttachRequest request) {
  request_ = std::move(request);
  trace_id_ = trace_id_of(request_.traceparent);
  Status status = create_device_side(request_.device, &device_);
  if (!status.ok()) {
    return status;
  }
  memory_ = std::make_unique<Memory>(this, device_.get());
  staging_ = std::make_unique<Staging>(memory_.get());
  ops_ = std::make_unique<OpTable>(staging_.get());
  return connect();
}

Status Session::connect() {
  std::unique_ptr<Connection> connection;
  Status status = Connection::open(request_, device_.get(), &connection);
  if (status.ok()) {
    connection_ = std::move(connection);
    memory_->bind(connection_.get());
    handles_.reset(connection_->welcome().handles_per_session);
    // The new attachment has words of its own.
    doorbells_.fill(Doorbell());
    ++incarnation_;
    begin_local();
  }
  return status;
}

Status Session::enter(bool lost_too) {
  if (fork_generation_ != fork_generation()) {
    return {EXPERTD_REASON_FORKED, reason_sentence(EXPERTD_REASON_FORKED)};
  }
  // Pairs with drain_callers(): either this sees the closed door or the drain sees this caller.
  callers_.fetch_add(1, std::memory_order_seq_cst);
  if (closed_to_callers_.load(std::memory_order_seq_cst)) {
    leave();
    return {EXPERTD_REASON_UNAVAILABLE, "the session is being detached or re-attached"};
  }
  if (!lost_too && connection_->lost()) {
    Status status = connection_->over("the daemon is gone; call expertd_reattach when it is back");
    leave();
    return status;
  }
  return {};
}

void Session::leave() {
  callers_.fetch_sub(1, std::memory_order_seq_cst);
  if (closed_to_callers_.load(std::memory_order_seq_cst)) {
    syscall(SYS_futex, &callers_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
}

// The callers inside leave at once, because their connection is lost; nothing inside waits without it or a deadline.
void Session::drain_callers(uint32_t remaining) {
  for (;;) {
    const uint32_t inside = callers_.load(std::memory_order_seq_cst);
    if (inside <= remaining) {
      return;
    }
    sleep_while(&callers_, inside);
  }
}

Status Session::reattach(uint64_t timeout_ns) {
  if (fork_generation_ != fork_generation()) {
    return {EXPERTD_REASON_FORKED, reason_sentence(EXPERTD_REASON_FORKED)};
  }
  const std::lock_guard lock(reattach_mutex_);
  if (!connection_->look_for_end()) {
    return error(EXPERTD_REASON_BAD_STATE,
                 "the session is attached; re-attaching is for after UNAVAILABLE and GPU_LOST");
  }
  closed_to_callers_.store(true, std::memory_order_seq_cst);
  drain_callers(0);
  // Streams that wait on the ended attachment's words are released before the new one has words of its own.
  connection_->finish();
  // Windows are about to be mapped anew, under operations that read them. What is still not over belongs to a stream
  // that the caller holds back.
  static_cast<void>(wait_unused(nullptr, UINT64_MAX));
  ops_->collect_all(*connection_->ring());
  ops_->forget_in_flight();
  staging_->give_back_all();
  request_.timeout_ns = timeout_ns == 0 ? request_.timeout_ns : timeout_ns;
  Status status = connect();
  if (status.ok()) {
    status = memory_->recreate();
    count_reattach();
    if (!status.ok()) {
      // Half of a session is none: the caller can try again.
      connection_->abandon("re-creating the session's memory failed");
    }
  }
  closed_to_callers_.store(false, std::memory_order_seq_cst);
  return status;
}

void Session::leave_groups() {
  const uint64_t deadline_ns = deadline_after(kLeaveAtDetachNs);
  // The objects stay until the last caller has left.
  const std::lock_guard lock(objects_mutex_);
  for (const std::unique_ptr<Group>& group : groups_) {
    // Best effort: the end of the lease leaves every group anyway.
    static_cast<void>(group->tell_daemon(left_until(deadline_ns)));
  }
}

Status Session::detach(Session* session) {
  if (session->fork_generation_ != fork_generation()) {
    return {EXPERTD_REASON_FORKED, reason_sentence(EXPERTD_REASON_FORKED)};
  }
  {
    const std::lock_guard lock(session->reattach_mutex_);
    session->closed_to_callers_.store(true, std::memory_order_seq_cst);
    if (!session->connection_->lost()) {
      session->leave_groups();
    }
    session->connection_->abandon("the session was detached");
    session->drain_callers(0);
  }
  delete session;
  return {};
}

Status Session::info(expertd_session_info_t* info) const {
  const expertd_attach_welcome& welcome = connection_->welcome();
  expertd_session_info_t filled{};
  filled.struct_size = info->struct_size;
  filled.session_id = welcome.session_id;
  filled.device_type = device_->is_cuda() ? EXPERTD_CUDA : EXPERTD_HOST;
  snprintf(filled.device, sizeof(filled.device), "%s", device_->name().c_str());
  filled.mps_active = welcome.mps_active != 0 ? 1 : 0;
  filled.ring_slots = connection_->ring()->slot_count();
  filled.handles_max = handles_.capacity();
  filled.generation = welcome.generation;
  std::memcpy(info, &filled, std::min(filled.struct_size, sizeof(filled)));
  return {};
}

Status Session::state() const {
  const uint32_t flags = connection_->ring()->session_flags();
  if (connection_->lost() || (flags & EXPERTD_SESSION_CLOSED) != 0) {
    return connection_->over("the daemon is gone or ended the session; call expertd_reattach");
  }
  if ((flags & EXPERTD_SESSION_DRAINING) != 0) {
    return {EXPERTD_REASON_DRAINING, reason_sentence(EXPERTD_REASON_DRAINING)};
  }
  return {};
}

uint64_t Session::default_timeout_ns() const {
  const uint64_t granted = connection_->welcome().op_timeout_ns;
  return granted == 0 ? kDefaultOpNs : granted;
}

Status Session::add_group(std::unique_ptr<Group>* group, Group** out) {
  const std::lock_guard lock(objects_mutex_);
  if (groups_.size() >= kMaxGroups) {
    return range_error(EXPERTD_REASON_GROUP_LIMIT, "groups", kMaxGroups + 1, 0, kMaxGroups);
  }
  *out = group->get();
  groups_.push_back(std::move(*group));
  return {};
}

std::unique_ptr<Group> Session::remove_group(const Group* group) {
  const std::lock_guard lock(objects_mutex_);
  const auto found =
      std::find_if(groups_.begin(), groups_.end(), [group](const auto& it) { return it.get() == group; });
  if (found == groups_.end()) {
    return nullptr;
  }
  std::unique_ptr<Group> owned = std::move(*found);
  groups_.erase(found);
  return owned;
}

Status Session::add_pair(std::unique_ptr<BufferPair> pair, BufferPair** out) {
  const std::lock_guard lock(objects_mutex_);
  if (pairs_.size() >= kMaxPairs) {
    return range_error(EXPERTD_REASON_BUFFER_LIMIT, "buffer pairs", kMaxPairs + 1, 0, kMaxPairs);
  }
  *out = pair.get();
  pairs_.push_back(std::move(pair));
  return {};
}

std::unique_ptr<BufferPair> Session::remove_pair(const BufferPair* pair) {
  const std::lock_guard lock(objects_mutex_);
  const auto found = std::find_if(pairs_.begin(), pairs_.end(), [pair](const auto& it) { return it.get() == pair; });
  if (found == pairs_.end()) {
    return nullptr;
  }
  std::unique_ptr<BufferPair> owned = std::move(*found);
  pairs_.erase(found);
  return owned;
}

SessionUse::SessionUse(Session* session, bool lost_too) : session_(session), status_(session->enter(lost_too)) {}

SessionUse::~SessionUse() {
  if (status_.ok()) {
    session_->leave();
  }
}

}  // namespace expertd::client
