// SPDX-License-Identifier: Apache-2.0
// What operators see of sessions and devices.
#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/session/service.h"
#include "daemon/session/session.h"

namespace expertd::session {

base::Status SessionService::open_session(base::SessionId id, const std::string& client_id,
                                          const std::string& traceparent) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  if (client_id.empty() || client_id.size() > 64 || traceparent.size() > 128) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE,
                        "client_id of " + std::to_string(client_id.size()) + " characters, allowed 1..64");
  }
  const std::lock_guard<std::mutex> lock(found.value()->mutex);
  found.value()->client_id = client_id;
  found.value()->traceparent = traceparent;
  return base::Status::ok();
}

SessionSnapshot SessionService::describe(Session& session) const {
  SessionSnapshot snapshot;
  const SessionStats& stats = session.tables.stats;
  snapshot.id = session.id;
  snapshot.uid = session.identity.uid;
  snapshot.pid = session.identity.pid;
  snapshot.device = session.place.device->info().uuid;
  snapshot.age_ns = base::now_ns() - session.opened_ns;
  snapshot.slots = session.ring->slot_count();
  snapshot.slots_used = stats.outstanding.load(std::memory_order_relaxed);
  snapshot.ops_completed = stats.completed.load(std::memory_order_relaxed);
  snapshot.ops_rejected = stats.rejected.load(std::memory_order_relaxed);
  snapshot.bytes_moved = stats.bytes.load(std::memory_order_relaxed);
  std::vector<uint32_t> latencies;
  const uint64_t count = std::min<uint64_t>(snapshot.ops_completed, SessionStats::kLatencies);
  for (uint64_t i = 0; i < count; ++i) {
    latencies.push_back(stats.latency_ns[i].load(std::memory_order_relaxed));
  }
  if (!latencies.empty()) {
    std::sort(latencies.begin(), latencies.end());
    snapshot.p50_ns = latencies[latencies.size() / 2];
    snapshot.p99_ns = latencies[latencies.size() * 99 / 100];
  }
  const std::lock_guard<std::mutex> lock(session.mutex);
  snapshot.name = session.client_id.empty() ? session.identity.name : session.client_id;
  snapshot.buffers = static_cast<uint32_t>(session.buffers.size());
  snapshot.buffer_bytes = session.window_bytes + session.registered_bytes;
  snapshot.groups = static_cast<uint32_t>(session.memberships.size());
  snapshot.state = session.ended ? "ended" : "active";
  return snapshot;
}

std::vector<SessionSnapshot> SessionService::sessions() {
  std::vector<SessionRef> refs;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [id, session] : sessions_) {
      refs.push_back(session);
    }
    refs.insert(refs.end(), ended_.begin(), ended_.end());
  }
  std::vector<SessionSnapshot> snapshots;
  for (const SessionRef& session : refs) {
    snapshots.push_back(describe(*session));
  }
  return snapshots;
}

std::vector<DeviceSnapshot> SessionService::devices() {
  std::vector<DeviceSnapshot> snapshots;
  for (const DeviceEntry& entry : devices_) {
    const device::DeviceInfo info = entry.device->info();
    DeviceSnapshot snapshot;
    snapshot.index = entry.device->index().value;
    snapshot.kind = info.is_cuda ? "cuda" : "host";
    snapshot.uuid = info.uuid;
    snapshot.name = info.name;
    snapshot.healthy = info.healthy;
    snapshot.mps_active = info.mps_active;
    snapshot.doorbell_form = info.doorbell_form;
    snapshot.context_bytes = info.context_bytes;
    snapshot.context_source = info.context_source;
    snapshot.pool_used_bytes = info.pool_used_bytes;
    // Two accounts read one after the other: a window in between must not make this wrap.
    snapshot.table_bytes = info.pool_used_bytes - std::min(info.pool_used_bytes, info.window_bytes);
    snapshot.armed_streams = info.armed_streams;
    snapshot.armed_streams_max = info.armed_streams_max;
    snapshot.lane_streams = info.lane_streams;
    snapshot.parked_streams_max = info.parked_streams_max;
    snapshot.peer_access_mask = info.peer_access_mask;
    snapshot.kernels = info.kernels;
    snapshots.push_back(std::move(snapshot));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, session] : sessions_) {
    DeviceSnapshot& snapshot = snapshots[session->place.device->index().value];
    const std::lock_guard<std::mutex> session_lock(session->mutex);
    snapshot.window_bytes += session->window_bytes;
    snapshot.registered_bytes += session->registered_bytes;
    ++snapshot.sessions;
  }
  for (const SessionRef& session : ended_) {
    const std::lock_guard<std::mutex> session_lock(session->mutex);
    snapshots[session->place.device->index().value].quarantined_bytes +=
        session->window_bytes + session->registered_bytes;
  }
  return snapshots;
}

}  // namespace expertd::session
