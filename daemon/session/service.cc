// SPDX-License-Identifier: Apache-2.0
// Attach, end and reclaim of sessions.
#include "daemon/session/service.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#include "daemon/base/clock.h"
#include "daemon/session/session.h"

namespace expertd::session {

namespace {

// While an ended session waits for its last operations the housekeeper looks this often; joins expire at this grain.
constexpr std::chrono::milliseconds kReclaimPoll(1);
constexpr std::chrono::milliseconds kJoinPoll(20);
constexpr uint64_t kSettleNs = 300'000'000;

}  // namespace

SessionService::SessionService(const ServiceOptions& options, std::vector<DeviceEntry> devices,
                               SessionObserver* observer)
    : options_(options),
      devices_(std::move(devices)),
      observer_(observer),
      directory_({options.op_timeout_ns, options.first_op_timeout_ns}),
      views_([this](const engine::GroupShared& group) { wake_group(group); }) {}

SessionService::~SessionService() {
  stop(base::now_ns());
}

base::Status SessionService::start() {
  EXPERTD_RETURN_IF_ERROR(closer_.start());
  try {
    housekeeper_ = std::thread([this] { housekeeper_main(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the housekeeper: ") + error.what());
  }
  return base::Status::ok();
}

void SessionService::stop(uint64_t deadline_ns) {
  std::vector<base::SessionId> open;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    draining_ = true;
    for (const auto& [id, session] : sessions_) {
      open.push_back(session->id);
    }
  }
  for (const base::SessionId id : open) {
    session_ended(id, "drain");
  }
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ended_.empty() && base::now_ns() < deadline_ns) {
    housekeeper_signal_.wait_for(lock, kReclaimPoll);
  }
  stop_ = true;
  housekeeper_signal_.notify_all();
  lock.unlock();
  if (housekeeper_.joinable()) {
    housekeeper_.join();
  }
  // Nodes that are left need this one's voice to go on without its ranks.
  views_.settle(std::min(deadline_ns, base::now_ns() + kSettleNs));
  views_.clear();
}

uint32_t SessionService::begin_drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  draining_ = true;
  const uint32_t count = static_cast<uint32_t>(sessions_.size());
  const std::vector<DeviceEntry> devices = devices_;
  lock.unlock();
  for (const DeviceEntry& entry : devices) {
    (void)entry.loop->run([loop = entry.loop] { loop->raise_session_flags(EXPERTD_SESSION_DRAINING); }).is_ok();
  }
  return count;
}

uint32_t SessionService::outstanding_operations() {
  const std::lock_guard<std::mutex> lock(mutex_);
  uint32_t outstanding = 0;
  for (const auto& [id, session] : sessions_) {
    outstanding += session->tables.stats.outstanding.load(std::memory_order_relaxed);
  }
  return outstanding;
}

base::Result<SessionService::SessionRef> SessionService::find(base::SessionId session) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sessions_.find(session.value);
  if (found == sessions_.end()) {
    return base::Status(EXPERTD_REASON_NO_SUCH_SESSION);
  }
  return found->second;
}

base::Status SessionService::check_quota(const AttachRequest& request) {
  if (const base::Reason said = last_word_.said(); said != EXPERTD_REASON_NONE) {
    return base::Status(said);
  }
  if (draining_) {
    return base::Status(EXPERTD_REASON_DRAINING);
  }
  if (sessions_.size() + ended_.size() >= options_.max_sessions) {
    return base::Status(EXPERTD_REASON_SESSION_LIMIT,
                        "control.max_sessions = " + std::to_string(options_.max_sessions) + " sessions are open");
  }
  const auto of_uid = std::count_if(sessions_.begin(), sessions_.end(),
                                    [&](const auto& entry) { return entry.second->identity.uid == request.uid; });
  if (static_cast<uint32_t>(of_uid) >= options_.max_sessions_per_uid) {
    return base::Status(EXPERTD_REASON_SESSION_LIMIT,
                        "control.max_sessions_per_uid = " + std::to_string(options_.max_sessions_per_uid) +
                            " sessions of this user are open");
  }
  return base::Status::ok();
}

base::Result<SessionService::SessionRef> SessionService::create_session(const AttachRequest& request, size_t device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  EXPERTD_RETURN_IF_ERROR(check_quota(request));
  const base::SessionId id{next_session_++};
  auto session = std::make_shared<Session>(id, options_.handles_per_session);
  base::Result<std::unique_ptr<RingMemory>> ring = RingMemory::create(id, options_.generation, options_.ring_slots);
  if (!ring.is_ok()) {
    return ring.status();
  }
  session->ring = std::move(ring).value();
  last_word_.add(id, session->ring);
  session->place = devices_[device];
  session->identity = request;
  session->opened_ns = base::now_ns();
  sessions_[id.value] = session;
  return session;
}

base::Result<AttachGrant> SessionService::attach(const AttachRequest& request) {
  size_t device = 0;
  while (device < devices_.size() && devices_[device].device->info().uuid != request.device) {
    ++device;
  }
  if (device == devices_.size()) {
    if (request.device.rfind("MIG-", 0) == 0) {
      return base::Status(EXPERTD_REASON_MIG_UNSUPPORTED);
    }
    std::string served;
    for (const DeviceEntry& entry : devices_) {
      served += (served.empty() ? "" : ", ") + entry.device->info().uuid;
    }
    return base::Status(EXPERTD_REASON_NO_SUCH_DEVICE,
                        "device \"" + request.device + "\"; this daemon serves " + served);
  }
  base::Result<SessionRef> created = create_session(request, device);
  if (!created.is_ok()) {
    return created.status();
  }
  const SessionRef session = created.value();
  const device::DeviceInfo info = session->place.device->info();
  base::Result<device::SessionGrant> opened = session->place.device->open_session(session->id);
  base::Status status = opened.status();
  if (status.is_ok()) {
    status = session->place.loop->add_session(&session->tables, session->ring.get(),
                                              session->place.device->session_flag_page(session->id));
    if (!status.is_ok()) {
      session->place.device->close_session(session->id);  // the loop has not taken the session and never will
    }
  }
  if (!status.is_ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sessions_.erase(session->id.value);
    return status.with_context("opening a session on " + info.uuid);
  }
  observer_->opened(describe(*session));
  AttachGrant grant;
  grant.session = session->id;
  grant.generation = options_.generation;
  grant.device_index = session->place.device->index().value;
  grant.is_cuda = info.is_cuda;
  grant.mps_active = info.mps_active;
  grant.ring_fd = session->ring->fd();
  grant.wake_fd = session->ring->wake_fd();
  grant.ring_bytes = session->ring->bytes();
  grant.flag_page_fd = std::move(opened.value().flag_page_fd);
  grant.flag_page_bytes = opened.value().flag_page_bytes;
  grant.handles_per_session = options_.handles_per_session;
  grant.op_timeout_ns = options_.op_timeout_ns;
  return grant;
}

void SessionService::wake_group(const engine::GroupShared& group) {
  for (uint32_t place = 0; place < group.places(); ++place) {
    devices_[group.settings().shape.devices[place].value].loop->wake();
  }
}

void SessionService::session_ended(base::SessionId id, const std::string& cause) {
  SessionRef session;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sessions_.find(id.value);
    if (found == sessions_.end()) {
      return;
    }
    session = found->second;
    sessions_.erase(found);
    ended_.push_back(session);
  }
  std::vector<std::shared_ptr<engine::GroupShared>> groups;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    session->ended = true;
    session->ended_ns = base::now_ns();
    for (const auto& [group, membership] : session->memberships) {
      membership.group->set_lost(membership.rank);
      tell_gone(*membership.group, membership.rank);
      groups.push_back(membership.group);
    }
  }
  drop_joins(id);
  for (const std::shared_ptr<engine::GroupShared>& group : groups) {
    wake_group(*group);
  }
  const base::Status closing = session->place.loop->close_session(id, [this, session] {
    session->drained.store(true, std::memory_order_release);
    housekeeper_signal_.notify_all();
  });
  if (!closing.is_ok()) {
    session->drained.store(true, std::memory_order_release);  // the loop has ended: nothing runs any more
  }
  observer_->ended(id, cause);
}

// Gives an ended session's memory back once its own loop has drained and no part of another rank names it.
bool SessionService::try_reclaim(const SessionRef& session) {
  if (!session->drained.load(std::memory_order_acquire)) {
    return false;
  }
  std::map<uint64_t, Session::Membership> memberships;
  std::map<uint32_t, Session::Buffer> buffers;
  std::map<uint64_t, Session::PendingFd> fds;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    for (const auto& [group, membership] : session->memberships) {
      if (!membership.group->quiet(membership.rank)) {
        return false;
      }
    }
    memberships.swap(session->memberships);
    buffers.swap(session->buffers);
    fds.swap(session->fds);
  }
  // Devices may block, and whoever looks at sessions takes their locks: none is held from here on.
  for (const auto& [group, membership] : memberships) {
    session->place.device->destroy_group(base::GroupId{group}, base::Rank{membership.rank});
    forget(*membership.group, membership.rank);
  }
  buffers.clear();
  for (auto& [token, pending] : fds) {
    if (!pending.for_client) {
      discard_fd(std::move(pending.fd));
    }
  }
  session->place.device->close_session(session->id);
  return true;
}

void SessionService::housekeeper_main() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_ || !ended_.empty()) {
    const std::deque<SessionRef> waiting = ended_;
    std::deque<std::unique_ptr<group::Formation>> formations;
    formations.swap(formations_);
    std::deque<Placement> placements;
    placements.swap(placements_);
    std::deque<Formed> formed;
    formed.swap(formed_);
    lock.unlock();
    for (const Placement& placement : placements) {
      place(placement);
    }
    for (Formed& done : formed) {
      answer_formation(std::move(done));
    }
    for (std::unique_ptr<group::Formation>& formation : formations) {
      form_group(std::move(formation));
    }
    const bool going_over = tend_rejoins(base::now_ns());
    std::vector<SessionRef> reclaimed;
    for (const SessionRef& session : waiting) {
      if (try_reclaim(session)) {
        observer_->reclaimed(session->id, base::now_ns() - session->ended_ns);
        reclaimed.push_back(session);
      }
    }
    answer_ended_joins();
    lock.lock();
    for (const SessionRef& session : reclaimed) {
      std::erase(ended_, session);
    }
    if (!reclaimed.empty()) {
      housekeeper_signal_.notify_all();
    }
    if (stop_) {
      break;
    }
    if (formations_.empty() && placements_.empty() && formed_.empty()) {
      housekeeper_signal_.wait_for(lock, ended_.empty() && !going_over ? kJoinPoll : kReclaimPoll);
    }
  }
  lock.unlock();
  answer_rest();
}

}  // namespace expertd::session
