// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/schedule.h"

#include <algorithm>

namespace expertd::engine {

bool Schedule::may_launch(const Candidate& candidate) const {
  return policy_ != Policy::kFair || candidate.traffic == Traffic::kLatency ||
         candidate.share->throughput_parts < kFairPartsMax;
}

// A session that had nothing to do gets no credit for that: it begins where the others are.
uint64_t Schedule::start_tag(const Candidate& candidate) const {
  return std::max(candidate.share->finish_tag, virtual_bytes_);
}

bool Schedule::before(const Candidate& a, const Candidate& b) const {
  if (policy_ == Policy::kFair) {
    const uint64_t tag_a = start_tag(a);
    const uint64_t tag_b = start_tag(b);
    return tag_a != tag_b ? tag_a < tag_b : a.ticket < b.ticket;
  }
  if (policy_ == Policy::kLatency) {
    const auto urgent = [](const Candidate& candidate) {
      return candidate.traffic == Traffic::kLatency || candidate.share->passed_over >= kOvertakesMax;
    };
    if (urgent(a) != urgent(b)) {
      return urgent(a);
    }
  }
  return a.ticket < b.ticket;
}

void Schedule::launched(const Candidate& candidate) {
  SessionShare& share = *candidate.share;
  if (policy_ == Policy::kFair) {
    virtual_bytes_ = start_tag(candidate);
    share.finish_tag = virtual_bytes_ + candidate.bytes;
  }
  share.passed_over = 0;
  share.throughput_parts += candidate.traffic == Traffic::kThroughput ? 1 : 0;
}

void Schedule::passed_over(const Candidate& candidate, const Candidate& waiting) const {
  if (candidate.traffic == Traffic::kLatency && waiting.traffic == Traffic::kThroughput &&
      waiting.ticket < candidate.ticket && waiting.share->passed_over < kOvertakesMax) {
    ++waiting.share->passed_over;
  }
}

void Schedule::ended(Traffic traffic, SessionShare* share) const {
  share->throughput_parts -= traffic == Traffic::kThroughput && share->throughput_parts != 0 ? 1 : 0;
}

bool Schedule::hold(uint64_t now_ns, bool latency, bool throughput) {
  const bool contended = policy_ == Policy::kLatency && latency && throughput;
  if (!contended) {
    // Without low latency in the way it has this turn; without itself nobody waits.
    held_since_ns_ = 0;
    overtakes_ = 0;
    return false;
  }
  if (held_since_ns_ == 0) {
    held_since_ns_ = now_ns;
  }
  if (now_ns - held_since_ns_ < hold_max_ns_ && overtakes_ < kOvertakesMax) {
    return true;
  }
  held_since_ns_ = now_ns;
  overtakes_ = 0;
  return false;
}

}  // namespace expertd::engine
