// SPDX-License-Identifier: Apache-2.0
// Heartbeat: when to send a sign of life to one peer daemon, when its silence, or the want of an answer, has lasted too
// long, and how long a round trip takes. Pure: the time comes from the caller, the control lane's thread.
//
// Silence alone would find a loss in one direction late on the side that still hears: what the other side sends goes on
// arriving until its connection, whose acknowledgements are lost, stops for its retransmissions. But its answers end at
// once, since it gets no pings. So time also counts from the first ping after the last answer.
//
// Any answer to a ping later than those answered before ends that wait, not only that of the first ping of it: a peer
// whose answers take longer than an interval, or than all intervals, but keep coming answers once per interval and is
// not lost. Neither is one lost that silence would have left: where the ping is what is held up, the other side hears
// nothing since before that ping and ends the connection no later; where the peer or its answer is, so are its pings.
#pragma once

#include <algorithm>
#include <cstdint>

namespace expertd::fabric {

struct HeartbeatOptions {
  uint64_t interval_ns = 100'000'000;
  uint32_t misses = 5;                        // intervals of silence, or without an answer, that lose the peer
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
    asked_ns_ = asked_ns_ == 0 ? now_ns : asked_ns_;
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
    if (sent_ns > answered_ns_) {
      answered_ns_ = sent_ns;
      asked_ns_ = 0;
    }
  }

  /// This side did nothing for `gap_ns`, so it could not hear either: the peer's silence is longer by at most that.
  void forgive(uint64_t gap_ns) {
    heard_ns_ += gap_ns;
    asked_ns_ += asked_ns_ == 0 ? 0 : gap_ns;
  }

  /// No sign of life, or no answer, for too long.
  bool silent_too_long(uint64_t now_ns) const { return now_ns > lost_at_ns(); }
  /// The peer that is lost at `now_ns` was heard in time, and did not answer.
  bool only_unanswered(uint64_t now_ns) const { return now_ns <= silent_at_ns(); }
  uint64_t lost_at_ns() const { return std::min(silent_at_ns(), unanswered_at_ns()); }
  /// When to look again at the latest.
  uint64_t next_ns() const { return std::min(send_ns_, lost_at_ns() + 1); }

  bool up() const { return up_; }
  uint64_t heard_ns() const { return heard_ns_; }
  /// The first ping since the last answer; 0: none.
  uint64_t asked_ns() const { return asked_ns_; }
  uint64_t rtt_ns() const { return rtt_ns_; }

 private:
  uint64_t limit_ns() const { return options_.interval_ns * options_.misses; }
  uint64_t silent_at_ns() const { return heard_ns_ + (up_ ? limit_ns() : options_.connect_limit_ns); }
  // Not before the first answer: the connection to a peer that is heard already may still be under way.
  uint64_t unanswered_at_ns() const {
    return asked_ns_ == 0 || answered_ns_ == 0 ? UINT64_MAX : asked_ns_ + limit_ns();
  }

  HeartbeatOptions options_;
  uint64_t heard_ns_;
  uint64_t send_ns_;
  uint64_t asked_ns_ = 0;
  uint64_t answered_ns_ = 0;  // when the last ping that was answered was sent
  uint64_t rtt_ns_ = 0;
  bool up_ = false;
};

}  // namespace expertd::fabric
