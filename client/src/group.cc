// SPDX-License-Identifier: Apache-2.0
#include "client/src/group.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>

#include "client/src/clock.h"
#include "client/src/local_kernels/local_kernels.h"
#include "client/src/session.h"
#include "expertd/v1/session.pb.h"

namespace expertd::client {
namespace {

constexpr uint64_t kDefaultJoinNs = 60 * kNsPerS;
// The daemon answers at the join's deadline; its answer names the missing ranks and must not be cut off.
constexpr uint64_t kJoinGraceNs = 5 * kNsPerS;

expertd_v1_GroupConfig to_proto(const GroupConfig& config) {
  expertd_v1_GroupConfig message{};
  message.expert_parallel_size = config.ranks;
  message.num_experts = config.num_experts;
  message.hidden = config.hidden;
  message.top_k = config.top_k;
  message.max_tokens = config.max_tokens;
  message.mode = static_cast<expertd_v1_GroupMode>(config.mode);
  message.on_rank_loss = static_cast<expertd_v1_OnRankLoss>(config.on_rank_loss);
  message.op_timeout_ns = config.op_timeout_ns;
  message.first_op_timeout_ns = config.first_op_timeout_ns;
  message.dispatch_dtypes = config.dispatch_dtypes;
  message.dynamic_ll_tokens = config.dynamic_ll_tokens;
  message.capture_lanes = config.capture_lanes;
  message.executor = static_cast<expertd_v1_GroupExecutor>(config.executor);
  const expertd_communication_pattern_t& pattern = config.communication;
  message.has_communication = true;
  message.communication.has_use_nvlink = pattern.use_nvlink != EXPERTD_USE_DEFAULT;
  message.communication.use_nvlink = pattern.use_nvlink == EXPERTD_USE_YES;
  message.communication.has_use_rdma = pattern.use_rdma != EXPERTD_USE_DEFAULT;
  message.communication.use_rdma = pattern.use_rdma == EXPERTD_USE_YES;
  message.communication.virtual_lanes = pattern.virtual_lanes;
  message.communication.bandwidth_ratio = pattern.bandwidth_ratio;
  return message;
}

// What the rank itself has for copy engines; an older daemon has none.
void tell_copies(Session* session, expertd_v1_GroupConfig* message) {
  LocalKernels* kernels = session->device()->local_kernels();
  message->copy_kernels = kernels != nullptr && kernels->exchanges();
  message->copies = EXPERTD_COPIES_BUILT;
}

}  // namespace

Status Group::plan(Session* session, const GroupConfig& config, expertd_group_plan_t* plan) {
  expertd_v1_PlanGroupRequest request{};
  request.has_config = true;
  request.config = to_proto(config);
  tell_copies(session, &request.config);
  expertd_v1_PlanGroupResponse response{};
  Status status = session->connection()->call("PlanGroup", {expertd_v1_PlanGroupRequest_fields, &request},
                                              {expertd_v1_PlanGroupResponse_fields, &response}, kControlTimeoutNs);
  if (status.ok()) {
    expertd_group_plan_t filled{};
    filled.struct_size = plan->struct_size;
    filled.window_bytes = response.window_bytes;
    filled.table_bytes = response.table_bytes;
    filled.handle_bytes = response.handle_bytes;
    filled.worst_rows = response.worst_rows;
    filled.handles = response.handles;
    filled.pinned_bytes = response.pinned_bytes;
    std::memcpy(plan, &filled, std::min(filled.struct_size, sizeof(filled)));
  }
  return status;
}

Status Group::join(Session* session, GroupConfig config, Group** group) {
  auto joined = std::make_unique<Group>(session, std::move(config));
  joined->incarnation_ = session->incarnation();
  Status status = joined->call_join();
  if (status.ok()) {
    status = joined->adopt_resources();
  }
  if (status.ok()) {
    status = session->add_group(&joined, group);
  }
  if (!status.ok() && joined->id_ != 0) {
    // The first failure is the one to report.
    static_cast<void>(joined->end(kControlTimeoutNs));
  }
  return status;
}

Status Group::call_join() {
  if (config_.dynamic_ll_tokens != 0 && !session_->connection()->ring()->takes_token_bounds()) {
    return error(EXPERTD_REASON_UNSUPPORTED,
                 "output_format of the group %s: the daemon's ring is older than 1.3 and knows no token_bound",
                 config_.name.c_str());
  }
  expertd_v1_JoinGroupRequest request{};
  if (config_.name.empty() || !copy_text(config_.name, request.name, sizeof(request.name))) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "length of name", static_cast<int64_t>(config_.name.size()), 1,
                       sizeof(request.name) - 1);
  }
  const uint64_t join_ns = config_.join_timeout_ns == 0 ? kDefaultJoinNs : config_.join_timeout_ns;
  request.rank = config_.rank;
  request.has_config = true;
  request.config = to_proto(config_);
  tell_copies(session_, &request.config);
  request.join_timeout_ns = join_ns;
  expertd_v1_JoinGroupResponse response{};
  Status status =
      session_->connection()->call("JoinGroup", {expertd_v1_JoinGroupRequest_fields, &request},
                                   {expertd_v1_JoinGroupResponse_fields, &response}, join_ns + kJoinGraceNs);
  if (status.reason == EXPERTD_REASON_TIMEOUT) {
    return error(EXPERTD_REASON_JOIN_TIMEOUT, "not every rank of %s joined within %llu ms", config_.name.c_str(),
                 static_cast<unsigned long long>(join_ns / kNsPerMs));
  }
  if (!status.ok()) {
    return status;
  }
  if (response.group_id == 0) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the daemon granted group 0");
  }
  id_ = response.group_id;
  epoch_ = response.epoch;
  config_.op_timeout_ns = response.op_timeout_ns;
  config_.first_op_timeout_ns = response.first_op_timeout_ns;
  granted_window_ = response.window_buffer_id;
  granted_token_ = response.window_fd_token;
  granted_bytes_ = response.window_size;
  granted_exchange_token_ = response.exchange_fd_token;
  granted_exchange_bytes_ = response.exchange_size;
  const expertd_executor_rule granted = {response.rule.copies, response.rule.ht_split_tokens};
  return adopt_rule(response.has_rule ? &granted : nullptr,
                    response.executor == expertd_v1_GroupExecutor_GROUP_EXECUTOR_COPY_ENGINE);
}

// A daemon without rules has one executor for all low latency operations, and one that is older has none to choose.
Status Group::adopt_rule(const expertd_executor_rule* granted, bool copies) {
  tells_split_ = granted != nullptr;
  executor_rule_ = granted != nullptr ? *granted : expertd_executor_rule{copies ? uint32_t{EXPERTD_COPIES_LL} : 0u, 0};
  if (config_.executor == EXPERTD_GROUP_EXECUTOR_COPY_ENGINE && executor_rule_.copies == 0) {
    return {EXPERTD_REASON_UNSUPPORTED, "executor = copy_engine: the daemon is older and has none"};
  }
  return (executor_rule_.copies & ~uint32_t{EXPERTD_COPIES_BUILT}) == 0
             ? Status()
             : error(EXPERTD_REASON_BAD_MESSAGE, "the daemon granted copies %u, asked for %u", executor_rule_.copies,
                     EXPERTD_COPIES_BUILT);
}

Status Group::adopt_resources() {
  if (config_.low_latency()) {
    Status status = take_ll_handles();
    if (!status.ok()) {
      return status;
    }
  }
  Status exchanged = adopt_exchange();
  if (!exchanged.ok() || granted_window_ == 0) {
    return exchanged;
  }
  const uint64_t needed = config_.window_layout(0).total_bytes;
  if (granted_bytes_ < needed || needed == 0) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the group's window has %llu bytes, its layout needs %llu",
                 static_cast<unsigned long long>(granted_bytes_), static_cast<unsigned long long>(needed));
  }
  return session_->memory()->adopt_window(granted_window_, granted_token_, granted_bytes_, &window_);
}

// No buffer of the session's: tensors cannot lie in it, and the daemon frees its side with the group.
Status Group::adopt_exchange() {
  if (executor_rule_.copies == 0) {
    return {};
  }
  const bool high_throughput = (executor_rule_.copies & EXPERTD_COPIES_HT) != 0;
  const uint64_t needed = ht_offset() + (high_throughput ? config_.ht_layout().total_bytes : 0);
  if (granted_exchange_bytes_ < needed || needed == 0) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the group's exchange window has %llu bytes, its layout needs %llu",
                 static_cast<unsigned long long>(granted_exchange_bytes_), static_cast<unsigned long long>(needed));
  }
  return session_->memory()->adopt_window(kNoBuffer, granted_exchange_token_, granted_exchange_bytes_, &exchange_);
}

Status Group::take_ll_handles() {
  for (expertd_handle_t& handle : ll_handles_) {
    Status status = session_->handles()->take(id_, &handle);
    if (!status.ok()) {
      return status;
    }
  }
  return {};
}

// Only if it is still the daemon that knows the group.
Status Group::tell_daemon(uint64_t timeout_ns) const {
  if (!check_current().ok() || session_->connection()->lost()) {
    return {};
  }
  expertd_v1_LeaveGroupRequest request{};
  request.group_id = id_;
  expertd_v1_LeaveGroupResponse response{};
  return session_->connection()->call("LeaveGroup", {expertd_v1_LeaveGroupRequest_fields, &request},
                                      {expertd_v1_LeaveGroupResponse_fields, &response}, timeout_ns);
}

// Frees what the group holds here, whatever the daemon says.
Status Group::end(uint64_t timeout_ns) {
  Status status = tell_daemon(timeout_ns);
  if (check_current().ok()) {
    session_->handles()->give_back_all(id_);
    session_->memory()->forget_captured(id_);
  }
  for (Buffer** window : {&window_, &exchange_}) {
    if (*window != nullptr) {
      session_->memory()->drop(*window);
      *window = nullptr;
    }
  }
  return status;
}

Status Group::leave(Group* group, uint64_t timeout_ns) {
  const std::unique_ptr<Group> owned = group->session_->remove_group(group);
  if (owned == nullptr) {
    return error(EXPERTD_REASON_NO_SUCH_GROUP, "the group was left already");
  }
  return owned->end(timeout_ns);
}

// A daemon that does not know of words behind the first has no group with such ranks: they are refused here.
Status Group::masks(expertd_rank_masks_t* masks) {
  expertd_v1_GroupMaskRequest request{};
  request.group_id = id_;
  const struct {
    const uint64_t* words;
    uint64_t* low;
    pb_size_t* more_count;
    uint64_t* more;
  } given[] = {{masks->exclude, &request.exclude, &request.exclude_more_count, request.exclude_more},
               {masks->readmit, &request.readmit, &request.readmit_more_count, request.readmit_more}};
  for (const auto& set : given) {
    *set.low = set.words[0];
    for (uint32_t i = 1; i < EXPERTD_MASK_WORDS; ++i) {
      const uint32_t there = config_.ranks > i * 64 ? config_.ranks - i * 64 : 0;
      if (there < 64 && set.words[i] >> there != 0) {
        return error(EXPERTD_REASON_ARGUMENT_RANGE, "a mask names ranks behind %u, the last of the group",
                     config_.ranks - 1);
      }
      set.more[i - 1] = set.words[i];
      *set.more_count = set.words[i] != 0 ? static_cast<pb_size_t>(i) : *set.more_count;
    }
  }
  expertd_v1_GroupMaskResponse response{};
  Status status = session_->connection()->call("GroupMask", {expertd_v1_GroupMaskRequest_fields, &request},
                                               {expertd_v1_GroupMaskResponse_fields, &response}, kControlTimeoutNs);
  if (!status.ok()) {
    return status;
  }
  std::fill(std::begin(masks->lost), std::end(masks->lost), 0);
  std::fill(std::begin(masks->excluded), std::end(masks->excluded), 0);
  masks->lost[0] = response.lost;
  masks->excluded[0] = response.excluded;
  std::copy_n(response.lost_more, response.lost_more_count, masks->lost + 1);
  std::copy_n(response.excluded_more, response.excluded_more_count, masks->excluded + 1);
  masks->epoch = response.epoch;
  return status;
}

Status Group::check_current() const {
  if (incarnation_ == session_->incarnation()) {
    return {};
  }
  return error(EXPERTD_REASON_NO_SUCH_GROUP, "the group %s ended with the daemon; leave it and join anew",
               config_.name.c_str());
}

uint64_t Group::next_timeout_ns(uint64_t asked_ns) const {
  if (asked_ns != 0) {
    return asked_ns;
  }
  return issued_ != 0 ? config_.op_timeout_ns : std::max(config_.first_op_timeout_ns, config_.op_timeout_ns);
}

expertd_handle_t Group::next_ll_handle(uint32_t* set) const {
  *set = static_cast<uint32_t>(ll_count_ % EXPERTD_LL_WINDOW_SETS);
  return session_->handles()->renew(ll_handles_[ll_count_ % kLlHandles].index);
}

void Group::commit_ll(expertd_handle_t handle) {
  ll_handles_[ll_count_ % kLlHandles] = handle;
  ++ll_count_;
}

Status Group::ll_set_of(expertd_handle_t handle, uint32_t* set) const {
  for (uint64_t back = 1; back <= EXPERTD_LL_WINDOW_SETS && back <= ll_count_; ++back) {
    const uint64_t number = ll_count_ - back;
    const expertd_handle_t& known = ll_handles_[number % kLlHandles];
    if (known.index == handle.index && known.generation == handle.generation) {
      *set = static_cast<uint32_t>(number % EXPERTD_LL_WINDOW_SETS);
      return {};
    }
  }
  return about(error(EXPERTD_REASON_STALE_HANDLE, "handle %u.%u is not one of the group's last %u ll_dispatches",
                     handle.index, handle.generation, EXPERTD_LL_WINDOW_SETS),
               {EXPERTD_ARGUMENT_HANDLE, handle.generation});
}

uint32_t Group::ll_place_of(expertd_handle_t handle) const {
  uint32_t place = 0;
  while (place < kLlHandles && ll_handles_[place].index != handle.index) {
    ++place;
  }
  return place;
}

bool Group::is_ll_handle(expertd_handle_t handle) const {
  return config_.low_latency() && std::any_of(ll_handles_.begin(), ll_handles_.end(),
                                              [handle](const auto& it) { return it.index == handle.index; });
}

Status Group::check_handle(expertd_handle_t handle) const {
  return session_->handles()->check(id_, handle);
}

}  // namespace expertd::client
