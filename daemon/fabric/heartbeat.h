// SPDX-License-Identifier: Apache-2.0
// Heartbeat: when to send a sign of life to one peer daemon, when its silence has lasted too long, and how long a round
// trip takes. Pure: the time comes from the caller, the control lane's thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace expertd::fabric {

struct HeartbeatOptions {
  uint64_t interval_ns = 100'000'000;
  uint32_t misses = 5;                        // silent intervals after which the peer is lost
  uint64_t connect_limit_ns = 5'000'000'000;  // the first sign of life may take so long
};

class Heartbeat {
 public:
  Heartbeat(const HeartbeatOptions& options, uint64_t now_ns)
      : options_(options), heard_ns_(now_ns), send_ns_(now_ns) {}

  /// Whether a ping is due; it is then taken as sent.
  bool take_due(uint64_t now_ns) {
    if (now_ns < send_ns_) {
      return false;
    }
    // From now on and not from when it was due, so that a thread that came late does not send several at once.
    send_ns_ = now_ns + options_.interval_ns;
    return true;
  }

  void heard(uint64_t now_ns) {
    heard_ns_ = std::max(heard_ns_, now_ns);
    up_ = true;
  }

  /// A pong returned `sent_ns`; a time that this side cannot have sent says nothing.
  void answered(uint64_t sent_ns, uint64_t now_ns) {
    if (sent_ns == 0 || sent_ns > now_ns) {
      return;
    }
    rtt_ns_ = now_ns - sent_ns;
  }

  /// This side did nothing for `gap_ns`, so it could not hear either: the peer's silence is longer by at most that.
  void forgive(uint64_t gap_ns) { heard_ns_ += gap_ns; }

  bool silent_too_long(uint64_t now_ns) const { return now_ns > lost_at_ns(); }
  uint64_t lost_at_ns() const {
    return heard_ns_ + (up_ ? options_.interval_ns * options_.misses : options_.connect_limit_ns);
  }
  /// When to look again at the latest.
  uint64_t next_ns() const { return std::min(send_ns_, lost_at_ns() + 1); }

  bool up() const { return up_; }
  uint64_t heard_ns() const { return heard_ns_; }
  uint64_t rtt_ns() const { return rtt_ns_; }

 private:
  HeartbeatOptions options_;
  uint64_t heard_ns_;
  uint64_t send_ns_;
  uint64_t rtt_ns_ = 0;
  bool up_ = false;
};

}  // namespace expertd::fabric
