// SPDX-License-Identifier: Apache-2.0
// Groups of sessions: joining, forming, leaving, masks, plans.
#include <algorithm>
#include <chrono>
#include <thread>

#include "daemon/base/clock.h"
#include "daemon/session/service.h"
#include "daemon/session/session.h"
#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/ll_window_v1.h"

namespace expertd::session {

namespace {

constexpr uint64_t kRendezvousGraceNs = 2'000'000'000ULL;
constexpr std::chrono::milliseconds kQuietPoll(1);
constexpr uint64_t kMaskNs = 5'000'000'000;  // for the nodes of a group to agree on a mask

// The window is where ll_dispatch leaves its results, and ll_combine finds its input, when the caller gives no memory
// of its own. It has room for the payloads that the group carries, and exists whatever they are: only an operation
// tells whether its caller gives memory.
uint64_t window_bytes_of(const GroupConfig& config) {
  if (config.mode == GroupMode::kNormal) {
    return 0;
  }
  const expertd_ll_window_shape shape{config.expert_parallel_size, config.num_experts, config.hidden,
                                      config.max_tokens};
  return expertd_ll_window_place_payloads(&shape, config.dispatch_dtypes, 0).total_bytes;
}

}  // namespace

base::Result<GroupPlan> SessionService::plan_group(base::SessionId id, const GroupConfig& config) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  EXPERTD_RETURN_IF_ERROR(group::check_config(config, 0).status);
  const device::Device& device = *found.value()->place.device;
  const device::DeviceInfo info = device.info();
  // Where the other ranks will be is not known: as for the tables, on GPUs that reach each other.
  const bool reaches_all = config.communication.use_nvlink || config.expert_parallel_size == 1;
  const ExecutorFacts own{info.is_cuda,           info.mps_active,     reaches_all,
                          info.kernels == "bulk", config.copy_kernels, config.copies};
  const ExecutorChoice choice = choose_executor(config, {own});
  EXPERTD_RETURN_IF_ERROR(choice.error.status);
  engine::GroupShape shape = group::shape_of(config);
  shape.copies = choice.rule.copies;
  const base::Result<device::GroupMemory> memory = device.plan_group(shape, options_.handles_per_session);
  if (!memory.is_ok()) {
    return memory.status();
  }
  GroupPlan plan;
  if (const uint64_t bytes = window_bytes_of(config); bytes != 0) {
    const base::Result<uint64_t> window = device.window_size(bytes);
    if (!window.is_ok()) {
      return window.status();
    }
    plan.window_bytes = window.value();
  }
  plan.table_bytes = memory.value().table_bytes;
  plan.handle_bytes = memory.value().handle_bytes;
  plan.handles = memory.value().handle_count;
  plan.pinned_bytes = memory.value().pinned_bytes;
  plan.worst_rows = uint64_t{config.expert_parallel_size} * config.max_tokens;
  return plan;
}

// Joins that wait count like groups: each holds a place in the directory until its deadline.
base::Status SessionService::take_ticket(Session& session, uint64_t* ticket) {
  const std::lock_guard<std::mutex> lock(session.mutex);
  if (session.ended) {
    return base::Status(EXPERTD_REASON_NO_SUCH_SESSION);
  }
  const auto groups =
      static_cast<size_t>(std::count_if(session.memberships.begin(), session.memberships.end(),
                                        [](const auto& entry) { return entry.second.part == Session::Part::kNow; }));
  if (groups + session.joins.size() >= std::min(options_.max_groups, base::kMaxGroupsPerSession)) {
    return base::Status(EXPERTD_REASON_GROUP_LIMIT, "session.max_groups = " + std::to_string(options_.max_groups) +
                                                        " groups are joined or being joined");
  }
  *ticket = session.next_ticket++;
  session.joins.insert(*ticket);
  return base::Status::ok();
}

void SessionService::answer_ended_joins() {
  for (const group::EndedJoin& join : directory_.expire(base::now_ns())) {
    ErrorDetail error;
    error.status = join.status;
    join.member.done(error, {});
  }
}

void SessionService::drop_joins(base::SessionId id) {
  for (const group::Member& member : directory_.session_ended(id)) {
    ErrorDetail error;
    error.status = base::Status(EXPERTD_REASON_CANCELLED, "the session ended while it waited for its group");
    member.done(error, {});
  }
}

void SessionService::join_group(base::SessionId id, const JoinRequest& request, JoinCallback done) {
  ErrorDetail error;
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    error.status = found.status();
    done(error, {});
    return;
  }
  const SessionRef session = found.value();
  uint64_t ticket = 0;
  error.status = take_ticket(*session, &ticket);
  if (error.status.reason() == EXPERTD_REASON_GROUP_LIMIT) {
    answer_ended_joins();  // the session may have cancelled some just now
    error.status = take_ticket(*session, &ticket);
  }
  if (!error.status.is_ok()) {
    done(error, {});
    return;
  }
  group::Member member;
  member.attempt = rendezvous_ == nullptr ? 0 : random_attempt();
  member.attempt_now = std::make_shared<std::atomic<uint64_t>>(member.attempt);
  const JoinCallback answer = [this, session, ticket, name = request.name, rank = request.rank,
                               attempt = member.attempt_now,
                               done = std::move(done)](const ErrorDetail& end, const JoinGrant& grant) {
    {
      const std::lock_guard<std::mutex> lock(session->mutex);
      session->joins.erase(ticket);
    }
    if (*attempt != 0 && !end.status.is_ok()) {
      rendezvous_->withdraw(name, rank, *attempt);  // whoever refused it: the other nodes must not wait for it
    }
    done(end, grant);
  };
  member.session = id;
  member.device = session->place.device->index();
  member.deadline_ns = base::now_ns() + join_timeout_ns(request);
  member.done = answer;
  member.copy_kernels = request.config.copy_kernels;
  member.copies = request.config.copies;
  member.ticket = ticket;
  member.cancelled = request.cancelled;
  const uint64_t attempt = member.attempt;
  if (attempt != 0) {
    member.deadline_ns += kRendezvousGraceNs;  // who is missing is known at the rendezvous
  }
  std::unique_ptr<group::Formation> formation;
  error = directory_.join(request, std::move(member), &formation);
  if (!error.status.is_ok()) {
    answer(error, {});
    return;
  }
  bool ended = false;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    ended = session->ended;
  }
  if (ended) {
    drop_joins(id);  // its end was through with the directory before this join came there
  } else if (attempt != 0) {
    ask_rendezvous(request, attempt, session->place.device->info());
  }
  if (formation != nullptr) {
    // Tables and windows take a while on a GPU; the caller's thread must not wait for them.
    const std::lock_guard<std::mutex> lock(mutex_);
    formations_.push_back(std::move(formation));
    housekeeper_signal_.notify_all();
  }
}

// Whether two of its GPUs do not reach each other, or are not to, so that their ranks exchange through memory of the
// host.
bool SessionService::needs_relay(const group::Formation& formation) const {
  const bool may_reach = formation.config.communication.use_nvlink;
  std::vector<device::DeviceInfo> infos;
  for (const group::Member& member : formation.members) {
    infos.push_back(devices_[member.device.value].device->info());
  }
  for (size_t from = 0; from < infos.size(); ++from) {
    for (size_t to = 0; to < infos.size(); ++to) {
      const bool reaches = may_reach && (infos[from].peer_access_mask >> formation.members[to].device.value & 1) != 0;
      if (from != to && infos[from].is_cuda && infos[to].is_cuda && !reaches) {
        return true;
      }
    }
  }
  return false;
}

/// One answer for all ranks, from what their devices and clients can.
ExecutorChoice SessionService::executor_of(const group::Formation& formation) const {
  std::vector<ExecutorFacts> ranks;
  for (const group::Member& member : formation.members) {
    const device::DeviceInfo info = devices_[member.device.value].device->info();
    const bool reaches_all =
        std::all_of(formation.members.begin(), formation.members.end(), [&](const group::Member& other) {
          const bool reaches =
              formation.config.communication.use_nvlink && (info.peer_access_mask >> other.device.value & 1) != 0;
          return other.device == member.device || reaches;
        });
    ranks.push_back(
        {info.is_cuda, info.mps_active, reaches_all, info.kernels == "bulk", member.copy_kernels, member.copies});
  }
  // What goes to other nodes is packed by kernels of the daemon.
  return choose_executor(formation.config, ranks, formation.shared->spans_nodes() ? 0 : EXPERTD_COPIES_BUILT);
}

/// A descriptor of the exchange window waits for the client to fetch it, as those of windows do.
base::Status SessionService::grant_exchange(const group::Formation& formation, const group::Member& member,
                                            JoinGrant* grant) {
  const base::Result<SessionRef> found = find(member.session);
  if (!found.is_ok()) {
    return found.status();
  }
  Session& session = *found.value();
  base::Result<device::Window> window =
      session.place.device->exchange_window(formation.shared->settings().shape.id, base::Rank{member.rank});
  if (!window.is_ok()) {
    return window.status().with_context("exchange window of rank " + std::to_string(member.rank));
  }
  const std::lock_guard<std::mutex> lock(session.mutex);
  if (session.ended || session.fds.size() >= base::kMaxPendingFds) {
    return base::Status(session.ended ? EXPERTD_REASON_NO_SUCH_SESSION : EXPERTD_REASON_BUFFER_LIMIT,
                        "fetch the descriptors of earlier windows first");
  }
  grant->exchange.size = window.value().bytes;
  grant->exchange.fd_token = session.next_token++;
  session.fds[grant->exchange.fd_token] = {std::move(window.value().fd), window.value().bytes, true};
  return base::Status::ok();
}

void SessionService::form_group(std::unique_ptr<group::Formation> formation) {
  if (needs_relay(*formation)) {
    formation->shared->set_exchange_pages(1);
  }
  const base::GroupId group = formation->shared->settings().shape.id;
  std::vector<JoinGrant> grants(formation->members.size());
  const ExecutorChoice choice = executor_of(*formation);
  ErrorDetail error = choice.error;
  if (error.status.is_ok() && formation->shared->spans_nodes()) {
    error = open_fabric(*formation);
  }
  if (error.status.is_ok() && choice.rule.copies != 0) {
    const bool high_throughput = (choice.rule.copies & EXPERTD_COPIES_HT) != 0;
    formation->shared->set_copy_engine(high_throughput ? EXPERTD_HT_BUFFERS : EXPERTD_EXCHANGE_BUFFERS, choice.rule);
  }
  const bool on_gpus = devices_[formation->members.front().device.value].device->info().is_cuda;
  directory_.describe(group, on_gpus ? rule_text(formation->config.mode, choice.rule) : "host");
  for (size_t i = 0; i < formation->members.size() && error.status.is_ok(); ++i) {
    grants[i].executor = choice.executor;
    grants[i].rule = choice.rule;
    error.status = form_member(*formation, formation->members[i], &grants[i]);
    error.rank = error.status.is_ok() ? -1 : static_cast<int32_t>(formation->members[i].rank);
  }
  const bool reports = formation->placed != nullptr;
  Formed formed{std::move(formation), std::move(grants), std::move(error)};
  if (reports) {
    report_formed(std::move(formed));
  } else {
    answer_formation(std::move(formed));
  }
}

void SessionService::answer_formation(Formed formed) {
  const std::unique_ptr<group::Formation>& formation = formed.formation;
  const std::vector<JoinGrant>& grants = formed.grants;
  const ErrorDetail& error = formed.error;
  const base::GroupId group = formation->shared->settings().shape.id;
  for (size_t i = 0; i < formation->members.size(); ++i) {
    const group::Member& member = formation->members[i];
    const base::Result<SessionRef> found = find(member.session);
    if (member.done == nullptr) {
      continue;  // it goes over, or stays
    }
    // All or none: a rank that could not be set up leaves a group that nobody may use. A rank whose join was cancelled
    // meanwhile would never submit anything: its peers are to see a lost rank at once.
    if (!found.is_ok()) {
      member.done(error, grants[i]);  // the session's connection is over as well
    } else if (!error.status.is_ok()) {
      (void)remove_membership(found.value(), group, base::now_ns()).is_ok();
      if (!join_again(*formation, member, error)) {
        member.done(error, {});
      }
    } else if (member.is_cancelled()) {
      (void)remove_membership(found.value(), group, base::now_ns()).is_ok();
      ErrorDetail cancelled;
      cancelled.status = base::Status(EXPERTD_REASON_CANCELLED, "the join was cancelled");
      member.done(cancelled, {});
    } else {
      mark_formed(*found.value(), group);
      member.done(error, grants[i]);
    }
  }
  after_formation(*formation, error);
}

void SessionService::mark_formed(Session& session, base::GroupId group) {
  const std::lock_guard<std::mutex> lock(session.mutex);
  if (const auto entry = session.memberships.find(group.value); entry != session.memberships.end()) {
    entry->second.formed = true;
  }
}

base::Status SessionService::form_member(const group::Formation& formation, const group::Member& member,
                                         JoinGrant* grant) {
  base::Result<SessionRef> found = find(member.session);
  if (!found.is_ok()) {
    return found.status();
  }
  const SessionRef session = found.value();
  const engine::GroupSettings& settings = formation.shared->settings();
  engine::GroupShape shape = settings.shape;
  shape.rank = member.rank;
  shape.session = member.session;
  shape.placement = settings.placement.get();
  shape.fabric = settings.fabric.get();
  shape.lost = formation.shared->lost_set();
  EXPERTD_RETURN_IF_ERROR(session->place.device->create_group(shape, options_.handles_per_session));
  if (member.done == nullptr) {
    const base::Status added = add_coming(*session, formation, member.rank);
    if (!added.is_ok()) {
      session->place.device->destroy_group(shape.id, base::Rank{member.rank});
    }
    return added;
  }
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    session->joins.erase(member.ticket);  // the membership takes its place
    session->memberships[shape.id.value] = {formation.shared, member.rank, 0, false, shape.id, Session::Part::kNow};
  }
  if (const uint64_t bytes = window_bytes_of(formation.config); bytes != 0) {
    base::Result<BufferGrant> window = create_window(member.session, bytes);
    if (!window.is_ok()) {
      return window.status().with_context("low-latency window of rank " + std::to_string(member.rank));
    }
    grant->window = window.value();
    const std::lock_guard<std::mutex> lock(session->mutex);
    const auto entry = session->memberships.find(shape.id.value);
    if (entry == session->memberships.end()) {
      return base::Status(EXPERTD_REASON_NO_SUCH_GROUP);
    }
    entry->second.window_buffer = grant->window.buffer_id;
  }
  if (shape.copies != 0) {
    EXPERTD_RETURN_IF_ERROR(grant_exchange(formation, member, grant));
  }
  grant->group = shape.id;
  grant->epoch = settings.epoch_base + formation.shared->epoch();
  grant->op_timeout_ns = settings.op_timeout_ns;
  grant->first_op_timeout_ns = settings.first_op_timeout_ns;
  const uint32_t handle_limit = session->place.device->handle_capacity(shape.id, base::Rank{member.rank});
  auto entered = std::make_shared<bool>(false);
  EXPERTD_RETURN_IF_ERROR(session->place.loop->run(
      [session, shared = formation.shared, id = shape.id, rank = member.rank, handle_limit, entered] {
        for (JoinedGroup& joined : session->tables.groups) {
          if (joined.id.value == 0) {
            joined.rank = {shared.get(), rank, 1};
            joined.handle_limit = handle_limit;
            joined.id = id;
            *entered = true;
            return;
          }
        }
      }));
  if (!*entered) {
    return base::Status(EXPERTD_REASON_GROUP_LIMIT);
  }
  return base::Status::ok();
}

// What the client knows by one name may be two groups for a while, and is left as one.
base::Status SessionService::remove_membership(const SessionRef& session, base::GroupId named, uint64_t deadline_ns) {
  std::vector<Leaving> parts = parts_of(*session, named);
  if (parts.empty()) {
    return base::Status(EXPERTD_REASON_NO_SUCH_GROUP, "group " + std::to_string(named.value));
  }
  for (const Leaving& part : parts) {
    begin_leaving(part);
  }
  // Operations of the group that this session still has in flight end with PEER_LOST; nothing new is admitted.
  LoopPort* loop = session->place.loop;
  auto idle = std::make_shared<bool>(false);
  do {
    EXPERTD_RETURN_IF_ERROR(loop->run([session, parts, named, loop, idle] {
      JoinedGroup* joined = session->tables.find_group(named.value);
      *idle = joined == nullptr || !loop->uses_group(session->id, &joined->rank);
      if (*idle && joined != nullptr) {
        *joined = JoinedGroup{};
      }
    }));
    *idle = *idle &&
            std::all_of(parts.begin(), parts.end(), [](const Leaving& part) { return part.group->quiet(part.rank); });
    if (!*idle) {
      if (base::now_ns() >= deadline_ns) {
        return base::Status(EXPERTD_REASON_TIMEOUT, "operations of the group did not end before the deadline");
      }
      std::this_thread::sleep_for(kQuietPoll);
    }
  } while (!*idle);
  uint32_t window = 0;
  {
    // Whoever takes the membership out gives its tables back: another Leave, or the reclaim of a session that ended.
    const std::lock_guard<std::mutex> lock(session->mutex);
    parts.clear();
    std::erase_if(session->memberships, [&](const auto& entry) {
      const Session::Membership& membership = entry.second;
      if (membership.named != named) {
        return false;
      }
      window = std::max(window, membership.window_buffer);
      parts.push_back({base::GroupId{entry.first}, membership.group, membership.rank});
      return true;
    });
  }
  for (const Leaving& part : parts) {
    if (!part.group->is_lost(part.rank)) {
      begin_leaving(part);  // it was formed meanwhile
    }
    session->place.device->destroy_group(part.id, base::Rank{part.rank});
    forget(*part.group, part.rank);
  }
  return window == 0 ? base::Status::ok() : remove_buffer(session, window, deadline_ns);
}

base::Status SessionService::leave_group(base::SessionId id, base::GroupId group, uint64_t deadline_ns) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  {
    const std::lock_guard<std::mutex> lock(found.value()->mutex);
    const auto entry = found.value()->find_group(group);
    if (entry == found.value()->memberships.end() || !entry->second.formed) {
      return base::Status(EXPERTD_REASON_NO_SUCH_GROUP, "group " + std::to_string(group.value));
    }
  }
  return remove_membership(found.value(), group, deadline_ns);
}

base::Result<MaskReply> SessionService::group_mask(base::SessionId id, base::GroupId group,
                                                   const base::RankSet& exclude, const base::RankSet& readmit) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  Session& session = *found.value();
  std::shared_ptr<engine::GroupShared> shared;
  {
    const std::lock_guard<std::mutex> lock(session.mutex);
    const auto entry = session.find_group(group);
    if (entry == session.memberships.end()) {
      return base::Status(EXPERTD_REASON_NO_SUCH_GROUP, "group " + std::to_string(group.value));
    }
    shared = entry->second.group;
    if (const auto next = shared->moved_from() == 0
                              ? session.memberships.end()
                              : session.memberships.find(shared->successor()->settings().shape.id.value);
        next != session.memberships.end()) {
      shared = next->second.group;
    }
  }
  const uint64_t base = shared->settings().epoch_base;
  if ((exclude | readmit).any()) {
    if (!shared->settings().mask_on_loss) {
      return base::Status(EXPERTD_REASON_BAD_STATE, "the group was joined with on_rank_loss = fail");
    }
    if (((exclude | readmit) - shared->all_ranks()).any()) {
      return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "mask names ranks beyond expert_parallel_size");
    }
    if (shared->has_views()) {
      EXPERTD_RETURN_IF_ERROR(views_.change_mask(*shared, exclude, readmit, base::now_ns() + kMaskNs));
    } else {
      shared->change_excluded(exclude, readmit);
      wake_group(*shared);
    }
  }
  if (shared->has_views()) {
    const engine::View view = shared->view();
    return MaskReply{base + view.epoch, view.lost, view.excluded};
  }
  return MaskReply{base + shared->epoch(), shared->lost(), shared->excluded()};
}

}  // namespace expertd::session
