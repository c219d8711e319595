// SPDX-License-Identifier: Apache-2.0
// Group: one rank of a communicator as its session sees it: configuration, low-latency window and handle rotation. One
// thread per group issues operations; joining, leaving and masks run on any caller's thread. Owned by the Session.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "client/src/ll_window.h"
#include "client/src/memory.h"
#include "client/src/status.h"
#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"
#include "proto/abi/executor_v1.h"

namespace expertd::client {

class Session;

/// Handle places that a group's ll_dispatches use in turn: two operations in flight and two being looked at.
inline constexpr uint32_t kLlHandles = 4;
static_assert(kLlHandles == EXPERTD_EXCHANGE_HANDLES);

struct GroupConfig {
  std::string name;
  uint32_t rank = 0;
  uint32_t ranks = 0;
  uint32_t num_experts = 0;
  uint32_t hidden = 0;
  uint32_t top_k = 0;
  uint32_t max_tokens = 0;
  uint32_t mode = 0;
  uint32_t on_rank_loss = 0;
  uint64_t op_timeout_ns = 0;
  uint64_t first_op_timeout_ns = 0;
  uint64_t join_timeout_ns = 0;
  uint32_t dispatch_dtypes = 0;    // set of expertd_payload; 0: any
  uint32_t dynamic_ll_tokens = 0;  // 0: not dynamic
  uint32_t capture_lanes = 0;
  uint32_t executor = 0;  // expertd_group_executor, as asked for
  expertd_communication_pattern_t communication{};

  uint32_t local_experts() const { return ranks == 0 ? 0 : num_experts / ranks; }
  uint64_t worst_rows() const { return uint64_t{ranks} * max_tokens; }
  expertd_exchange_layout exchange_layout() const {
    const expertd_exchange_shape shape{ranks, num_experts, hidden, max_tokens, top_k};
    return expertd_exchange_layout_of(&shape);
  }
  bool low_latency() const { return mode != EXPERTD_MODE_NORMAL; }
  expertd_exchange_ht_layout ht_layout() const {
    const expertd_exchange_ht_shape shape{ranks, num_experts, hidden, max_tokens, top_k};
    return expertd_exchange_ht_layout_of(&shape);
  }
  /// Of set `set` of the low-latency window.
  LlWindowLayout window_layout(uint32_t set) const {
    return ll_window_layout({ranks, num_experts, hidden, max_tokens}, dispatch_dtypes, set);
  }
  /// Whether dispatches may have this expertd_payload.
  bool carries(uint32_t payload) const { return dispatch_dtypes == 0 || (dispatch_dtypes & payload) != 0; }
};

/// The last high throughput operation by copy engines that used a buffer: its slot, and what it was issued with.
struct HtUse {
  uint32_t slot = 0;
  uint64_t seq = 0;  // 0: none yet
  expertd_stream_t stream = nullptr;
  bool async = false;
};

class Group {
 public:
  Group(Session* session, GroupConfig config) : session_(session), config_(std::move(config)) {}

  static Status plan(Session* session, const GroupConfig& config, expertd_group_plan_t* plan);
  static Status join(Session* session, GroupConfig config, Group** group);
  /// Frees the group, also when the daemon cannot be asked any more.
  static Status leave(Group* group, uint64_t timeout_ns);
  Status masks(expertd_rank_masks_t* masks);

  Session* session() const { return session_; }
  const GroupConfig& config() const { return config_; }
  uint64_t id() const { return id_; }
  const Buffer* window() const { return window_; }
  /// NO_SUCH_GROUP after a re-attach.
  Status check_current() const;
  /// The deadline the daemon will hold the next operation to.
  uint64_t next_timeout_ns(uint64_t asked_ns) const;
  void count_issued() { ++issued_; }
  /// Which dispatches go by copy engines, the same on all ranks.
  const expertd_executor_rule& executor_rule() const { return executor_rule_; }
  /// Whether the daemon is to hear which dispatches are split.
  bool tells_split() const { return tells_split_; }
  /// What operations by copy engines exchange through; null where the daemon's kernels execute all of them.
  const Buffer* exchange() const { return exchange_; }
  /// It has a part for low latency and one for high throughput, each if the rule has such operations. Where the second
  /// one begins:
  uint64_t ht_offset() const {
    return (executor_rule_.copies & EXPERTD_COPIES_LL) != 0 ? config_.exchange_layout().total_bytes : 0;
  }
  /// The buffer of the next operation in it.
  uint32_t exchange_buffer() const { return static_cast<uint32_t>((issued_ + 1) % EXPERTD_EXCHANGE_BUFFERS); }
  HtUse* ht_use(uint32_t buffer) { return &ht_uses_[buffer]; }
  /// The place of a handle's tables in it: of the next ll_dispatch, and of a handle (past the last one if it is none of
  /// the group's).
  uint32_t next_ll_place() const { return static_cast<uint32_t>(ll_count_ % kLlHandles); }
  uint32_t ll_place_of(expertd_handle_t handle) const;

  /// The handle and the window set of the next ll_dispatch; commit_ll() makes them the current ones.
  expertd_handle_t next_ll_handle(uint32_t* set) const;
  /// Where the next captured operation goes; every second one, so that two may be outstanding.
  uint32_t next_capture_lane() const { return static_cast<uint32_t>(captures_ % config_.capture_lanes); }
  void commit_capture() { ++captures_; }
  void commit_ll(expertd_handle_t handle);
  /// STALE_HANDLE unless the handle is one of the last two ll_dispatches.
  Status ll_set_of(expertd_handle_t handle, uint32_t* set) const;
  Status check_handle(expertd_handle_t handle) const;
  bool is_ll_handle(expertd_handle_t handle) const;

 private:
  friend class Session;  // which leaves its groups when it is detached
  Status call_join();
  Status adopt_resources();
  Status adopt_exchange();
  Status adopt_rule(const expertd_executor_rule* granted, bool copies);
  Status tell_daemon(uint64_t timeout_ns) const;
  Status end(uint64_t timeout_ns);
  Status take_ll_handles();

  Session* const session_;
  GroupConfig config_;
  uint64_t id_ = 0;
  uint64_t epoch_ = 0;
  uint64_t incarnation_ = 0;
  uint32_t granted_window_ = 0;
  uint64_t granted_token_ = 0;
  uint64_t granted_bytes_ = 0;
  Buffer* window_ = nullptr;
  uint64_t granted_exchange_token_ = 0;
  uint64_t granted_exchange_bytes_ = 0;
  Buffer* exchange_ = nullptr;
  expertd_executor_rule executor_rule_{};
  bool tells_split_ = false;
  uint64_t issued_ = 0;  // operations that the daemon counts
  std::array<expertd_handle_t, kLlHandles> ll_handles_{};
  uint64_t ll_count_ = 0;
  std::array<HtUse, EXPERTD_HT_BUFFERS> ht_uses_{};
  uint64_t captures_ = 0;
};

inline Group* unwrap(expertd_group_t* group) {
  return reinterpret_cast<Group*>(group);
}
inline expertd_group_t* wrap(Group* group) {
  return reinterpret_cast<expertd_group_t*>(group);
}

}  // namespace expertd::client
