// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/observers.h"

#include <algorithm>

#include "daemon/base/log.h"

namespace expertd::app {

void DeviceObserver::completed(base::DeviceIndex /*device*/, const engine::Request& request,
                               const expertd_completion& completion, const engine::HeldUp& held_up) {
  if (request.rejected_reason != 0) {
    // Never admitted, so it is no operation that failed.
    ops_->reject(request.rejected_reason);
    if (request.rejected_reason == EXPERTD_REASON_DESCRIPTOR_MALFORMED) {
      ops_->descriptor_invalid(request.rejected_reason);
    }
    return;
  }
  metrics::OpRecord record;
  record.op = static_cast<uint32_t>(request.shape.kind);
  record.reason = completion.reason;
  record.missing = completion.missing;
  record.phases = metrics::phase_times(completion, request.submit_ns);
  record.tokens = request.shape.tokens;
  record.local_bytes = completion.local_bytes;
  record.fabric_bytes = std::min(held_up.fabric_bytes, completion.remote_bytes);
  record.remote_bytes = completion.remote_bytes - record.fabric_bytes;
  record.executor = completion.executor;
  record.sms = completion.sms;
  ops_->record(record);
  if (completion.reason == EXPERTD_REASON_NONE && held_up.last_rank >= 0) {
    waits_->add({held_up.group.value, completion.group_op, record.op, held_up.rank,
                 static_cast<uint32_t>(held_up.last_rank), held_up.waited_ns, held_up.counts});
  }
}

void DeviceObserver::beat(base::DeviceIndex /*device*/, uint64_t now_ns, uint64_t lag_ns) {
  beat_->beat(now_ns);
  thread_->lag(lag_ns);
}

void DeviceObserver::ring_fill(base::DeviceIndex /*device*/, uint32_t used, uint32_t capacity) {
  ops_->ring_used(used);
  if (used >= capacity) {
    ops_->ring_full();
  }
}

void DeviceObserver::ring_broken() {
  ops_->reject(EXPERTD_REASON_RING_OVERFLOW);
  ops_->descriptor_invalid(EXPERTD_REASON_RING_OVERFLOW);
}

void DeviceObserver::count_missed_beats() {
  for (; missed_counted_ < beat_->missed_total(); ++missed_counted_) {
    thread_->missed_beat();
  }
}

void SessionLog::opened(const session::SessionSnapshot& session) {
  counters_->session_opened();
  base::log_info("session opened", {{"session", session.id},
                                    {"name", session.name},
                                    {"device", session.device},
                                    {"uid", session.uid},
                                    {"pid", session.pid}});
}

void SessionLog::ended(base::SessionId session, const std::string& cause) {
  const auto& names = metrics::kCloseCauseNames;
  const auto found = std::find(names.begin(), names.end(), cause);
  const size_t index = found == names.end() ? static_cast<size_t>(metrics::CloseCause::kEof)
                                            : static_cast<size_t>(found - names.begin());
  counters_->session_closed(static_cast<metrics::CloseCause>(index));
  base::log_info("session ended", {{"session", session}, {"cause", cause}});
}

void SessionLog::reclaimed(base::SessionId session, uint64_t duration_ns) {
  counters_->lease_reaped(duration_ns);
  base::log_debug("session reclaimed", {{"session", session}, {"duration_us", duration_ns / 1000}});
}

}  // namespace expertd::app
