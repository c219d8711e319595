// SPDX-License-Identifier: Apache-2.0
// Session: what one attached client owns, put together: device side, connection, memory, staging, handles, operations
// and groups. Functions run on the callers' threads; the connection's client thread never enters here. Every entry goes
// through SessionUse, so that a re-attach or detach can wait until nobody is inside.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "client/src/connection.h"
#include "client/src/device_side.h"
#include "client/src/handle_table.h"
#include "client/src/local_ops.h"
#include "client/src/memory.h"
#include "client/src/op_table.h"
#include "client/src/staging.h"
#include "client/src/status.h"

namespace expertd::client {

class Group;
class BufferPair;
struct HtUse;
struct OpRequest;

/// An event carries the attachment it belongs to in the upper bits of its sequence.
inline constexpr uint32_t kIncarnationShift = 48;
inline constexpr uint64_t kSeqMask = (uint64_t{1} << kIncarnationShift) - 1;
inline constexpr size_t kMaxGroups = 16;
inline constexpr size_t kMaxPairs = 256;

/// The last write of a slot's doorbell that was enqueued on a stream; 0 when it is known to have happened.
struct Doorbell {
  uint64_t seq = 0;
  expertd_stream_t stream = nullptr;
};

class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  static Status attach(AttachRequest request, Session** session);
  Status reattach(uint64_t timeout_ns);
  /// Waits until no call is inside, then frees everything of the session and itself.
  static Status detach(Session* session);

  Status info(expertd_session_info_t* info) const;
  Status state() const;

  Memory* memory() { return memory_.get(); }
  HandleTable* handles() { return &handles_; }
  DeviceSide* device() { return device_.get(); }
  Connection* connection() { return connection_.get(); }
  uint64_t incarnation() const { return incarnation_; }
  uint64_t default_timeout_ns() const;

  /// Takes the group over unless it fails.
  Status add_group(std::unique_ptr<Group>* group, Group** out);
  /// Takes a group out; null when it is not one of the session's.
  std::unique_ptr<Group> remove_group(const Group* group);
  Status add_pair(std::unique_ptr<BufferPair> pair, BufferPair** out);
  std::unique_ptr<BufferPair> remove_pair(const BufferPair* pair);

  /// Resolves, stages, writes the descriptor and rings the doorbell (submit.cc).
  Status submit(OpRequest* request, expertd_stream_t stream, expertd_event_t* event);
  /// By the library's own kernel where the device side has one and the arguments are right, else as submit()
  /// (session_local.cc).
  Status submit_layout(OpRequest* request, expertd_stream_t stream, expertd_event_t* event);
  /// Lets the daemon keep an operation for replays of a graph, and returns how they name it (capture.cc).
  Status submit_capture(OpRequest* request, uint64_t* entry, uint32_t* words);
  /// Only the descriptor of build_refusal(): it has no tensors, no event and nothing on a stream.
  Status submit_refusal(OpRequest* refusal);

  Status query(uint64_t event, int* done);
  /// The status is the operation's own, or why it is not known.
  Status wait(uint64_t event, uint64_t timeout_ns, expertd_op_result_t* result);
  Status stream_wait(uint64_t event, expertd_stream_t stream);
  Status synchronize(expertd_stream_t stream, uint64_t timeout_ns);
  /// Until no local operation uses these bytes (of UINT64_MAX: any), or BUFFER_BUSY after 5 s: before memory of the
  /// daemon is unmapped.
  Status wait_unused(const void* data, uint64_t bytes);

 private:
  friend class SessionUse;

  Status open_first(AttachRequest request);
  Status connect();
  Status enter(bool lost_too);
  void leave();
  void drain_callers(uint32_t remaining);
  void leave_groups();
  Status find(uint64_t event, Lookup* lookup, OpOutcome* outcome, uint64_t* deadline_ns);

  Status wait_for_slot(uint64_t deadline_ns);
  void stamp(expertd_slot* slot) const;
  Status resolve_tensors(OpRequest* request, OpRecord* record, expertd_stream_t stream);
  Status place_tensor(OpRequest* request, uint32_t index, bool* staged);
  Status place_device_tensor(OpRequest* request, uint32_t index);
  Status stage_tensors(OpRequest* request, const std::vector<uint32_t>& staged, OpRecord* record);
  void begin_local();
  bool reaches(const OpRequest& request);
  Status query_local(uint64_t event, int* done);
  Status wait_local(uint64_t event, uint64_t timeout_ns, expertd_op_result_t* result);
  Status stream_wait_local(uint64_t event, expertd_stream_t stream);
  bool rings_late(uint32_t slot, expertd_stream_t stream);
  // Operations by copy engines (copy_engine.cc).
  Status issue_exchange(OpRequest* request, uint32_t index, bool rung, expertd_stream_t stream);
  Status wait_for_arrivals(const ExchangeParams& params, uint32_t index, bool doorbell, expertd_stream_t stream);
  // The same of high throughput (copy_engine_ht.cc).
  Status follow_ht(HtUse* last, uint32_t index, uint64_t seq, bool async, expertd_stream_t stream);
  Status issue_ht(OpRequest* request, uint32_t index, bool rung, expertd_stream_t stream);
  Status receive_ht(OpRequest* request, uint32_t index, expertd_stream_t stream);

  const uint32_t fork_generation_;
  AttachRequest request_;
  std::array<uint8_t, 16> trace_id_{};

  // The order of destruction matters: the connection ends before what its thread uses.
  std::unique_ptr<DeviceSide> device_;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<OpTable> ops_;
  std::unique_ptr<LocalOps> local_;  // null where the daemon does local work
  HandleTable handles_;
  std::unique_ptr<Connection> connection_;
  uint64_t incarnation_ = 0;

  std::mutex submit_mutex_;
  std::array<Doorbell, EXPERTD_RING_SLOTS_MAX> doorbells_{};  // under submit_mutex_; GPU sessions
  std::mutex objects_mutex_;                                  // groups_ and pairs_
  std::vector<std::unique_ptr<Group>> groups_;
  std::vector<std::unique_ptr<BufferPair>> pairs_;

  std::mutex reattach_mutex_;
  std::atomic<uint32_t> callers_{0};
  std::atomic<bool> closed_to_callers_{false};
};

/// Keeps a session as it is while a call is inside. lost_too: calls that make sense after the daemon's end.
class SessionUse {
 public:
  explicit SessionUse(Session* session, bool lost_too = false);
  ~SessionUse();
  SessionUse(const SessionUse&) = delete;
  SessionUse& operator=(const SessionUse&) = delete;
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

 private:
  Session* const session_;
  Status status_;
};

inline Session* unwrap(expertd_session_t* session) {
  return reinterpret_cast<Session*>(session);
}
inline expertd_session_t* wrap(Session* session) {
  return reinterpret_cast<expertd_session_t*>(session);
}

}  // namespace expertd::client
