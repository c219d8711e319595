// SPDX-License-Identifier: Apache-2.0
// Rounds that go on when ranks are lost or left out.
#include <algorithm>
#include <sstream>

#include "tests/device/client_rounds.h"
#include "tests/support/temp_dir.h"

namespace expertd::device_test {
namespace {

using support::OpEnd;
using support::Outcome;
using support::outcome_of;

constexpr double kMostMs = 12'000;  // until a mask comes

/// Good operations in a row that had the same mask.
struct Span {
  uint64_t first;
  uint64_t last;
  uint64_t mask;
};

/// What a series of operations came to.
class Tally {
 public:
  void note(uint64_t number, const OpEnd& end) {
    if (!end.outcome.ok()) {
      ++failures_;
      last_failure_ = expertd_reason_name(end.outcome.status.reason);
      last_message_ = end.outcome.message;
      return;
    }
    gap_ms_ = std::max(gap_ms_, support::elapsed_ms(good_ns_));
    good_ns_ = support::monotonic_ns();
    if (spans_.empty() || spans_.back().mask != end.result.rank_mask) {
      spans_.push_back({number, number, end.result.rank_mask});
    }
    spans_.back().last = number;
  }
  /// The first good operation whose mask was not `before`; 0: there was none.
  uint64_t first_behind(uint64_t before) const {
    for (const Span& span : spans_) {
      if (span.mask != before) {
        return span.first;
      }
    }
    return 0;
  }
  std::string text() const {
    std::ostringstream text;
    text << " failed=" << failures_ << " reason=" << last_failure_ << " gap=" << gap_ms_ << " masks=";
    for (const Span& span : spans_) {
      text << span.first << "-" << span.last << ":" << span.mask << ",";
    }
    text << " last failure: " << last_message_;
    return text.str();
  }

 private:
  std::vector<Span> spans_;
  uint64_t failures_ = 0;
  std::string last_failure_ = "NONE";
  std::string last_message_;
  double gap_ms_ = 0;
  uint64_t good_ns_ = support::monotonic_ns();
};

}  // namespace

std::string Rounds::masked_round(OpEnd* sent, OpEnd* back) {
  expertd_handle_t handle{};
  expertd_event_t event{};
  Outcome outcome = upload();
  if (!outcome.ok()) {
    return "the inputs cannot be put there: " + outcome.message;
  }
  sent->outcome = low_latency_ ? issue_ll_dispatch(kTokens, 0, &handle, &event) : issue_dispatch(&handle, &event);
  *sent = sent->outcome.ok() ? support::finish(event) : *sent;
  if (sent->outcome.ok()) {
    outcome = low_latency_ ? give_back(handle) : outcome;
    if (!outcome.ok()) {
      return "the rows cannot be given back: " + outcome.message;
    }
    back->outcome =
        low_latency_ ? issue_ll_combine(kTokens, 0, handle, combined_, &event) : issue_combine(handle, &event);
  } else {
    back->outcome = outcome_of(expertd_barrier(group_, stream(), 0, 0, &event));
  }
  *back = back->outcome.ok() ? support::finish(event) : *back;
  if (sent->outcome.ok() && !low_latency_) {
    static_cast<void>(expertd_handle_free(group_, handle));
  }
  if (!sent->outcome.ok() || !back->outcome.ok()) {
    return {};
  }
  outcome = fetch();
  return outcome.ok() ? check(kTokens, sent->result.rank_mask & back->result.rank_mask) : "fetch: " + outcome.message;
}

std::string Rounds::masked(uint64_t count, uint64_t before, std::string* text) {
  const uint64_t begin_ns = support::monotonic_ns();
  Tally tally;
  uint64_t end = before != 0 ? UINT64_MAX : count;
  for (uint64_t round = 0; round < end; ++round) {
    OpEnd sent;
    OpEnd back;
    const std::string wrong = masked_round(&sent, &back);
    if (!wrong.empty()) {
      return wrong + " in round " + std::to_string(round) + ", dispatch under mask " +
             std::to_string(sent.result.rank_mask) + ", combine under " + std::to_string(back.result.rank_mask) +
             tally.text();
    }
    tally.note(2 * round + 1, sent);
    tally.note(2 * round + 2, back);
    const uint64_t masked = tally.first_behind(before);
    if (end == UINT64_MAX && masked != 0) {
      end = ((masked / 2 + count) / count + 1) * count;  // the same for ranks that differ by an operation
    }
    if (end == UINT64_MAX && support::elapsed_ms(begin_ns) > kMostMs) {
      return "no mask came: " + tally.text();
    }
  }
  *text = tally.text();
  return {};
}

}  // namespace expertd::device_test
