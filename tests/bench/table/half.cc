// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/half.h"

#include <algorithm>
#include <utility>

namespace expertd::bench {

namespace {

/// More than an operation of 128 tokens takes, context switches included.
constexpr std::chrono::microseconds kArrival{500};

}  // namespace

std::function<void()> time_receive_half(ctl::BenchRank* rank, ctl::BenchOperation* operation, expertd_event_t* event,
                                        Timing* timing) {
  timing->before = [operation, event, untimed = std::move(timing->before)] {
    if (untimed) {
      untimed();
    }
    operation->issue(event);
  };
  timing->arm = std::max<std::chrono::nanoseconds>(timing->arm, kArrival);
  return [rank, event] { rank->check(expertd_event_stream_wait(*event, rank->stream()), "receive half"); };
}

}  // namespace expertd::bench
