// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/view_change.h"

#include <algorithm>
#include <bit>

namespace expertd::engine {

namespace {

constexpr uint64_t kNodeBits = 6;  // of a ballot

constexpr uint64_t bit(uint32_t index) {
  return uint64_t{1} << index;
}
constexpr uint32_t node_of_ballot(uint64_t ballot) {
  return static_cast<uint32_t>(ballot & (bit(kNodeBits) - 1));
}

}  // namespace

const char* view_end_text(ViewEnd end) {
  switch (end) {
    case ViewEnd::kNone:
      return "it takes part";
    case ViewEnd::kMinority:
      return "the nodes that it reaches do not have most of the ranks that were left, so that others may go on";
    case ViewEnd::kLeftOut:
      return "the other nodes have lost it and go on without it";
    case ViewEnd::kDeadline:
      return "the nodes did not agree in time on who is left";
  }
  return "unknown";
}

ViewChange::ViewChange(const Placement& placement, const ViewOptions& options, ViewHost* host,
                       const base::RankSet& lost)
    : placement_(placement), options_(options), host_(host) {
  committed_.view.lost = lost;
}

base::RankSet ViewChange::ranks_of(uint64_t nodes) const {
  base::RankSet ranks;
  for (uint32_t rank = 0; rank < placement_.ranks(); ++rank) {
    if ((nodes & bit(placement_.node_of[rank])) != 0) {
      ranks.add(rank);
    }
  }
  return ranks;
}

uint64_t ViewChange::members_of(const base::RankSet& lost_ranks) const {
  uint64_t nodes = 0;
  for (const uint32_t rank : base::RankSet::first(placement_.ranks()) - lost_ranks) {
    nodes |= bit(placement_.node_of[rank]);
  }
  return nodes;
}

uint32_t ViewChange::coordinator() const {
  return static_cast<uint32_t>(std::countr_zero(living()));
}

// Two majorities of one view have a node in common, whatever anybody knows of losses: the votes are those of the view.
bool ViewChange::is_majority(uint64_t nodes) const {
  const base::RankSet votes = base::RankSet::first(placement_.ranks()) - view().lost;
  const base::RankSet given = votes & ranks_of(nodes);
  const uint32_t twice = 2 * given.count();
  return twice > votes.count() || (twice == votes.count() && given.any() && given.lowest() == votes.lowest());
}

bool ViewChange::needs_change() const {
  return (report_.lost_nodes & members()) != 0 || (report_.gone - view().lost).any() || granted_ != wishes_;
}

void ViewChange::rank_gone(uint32_t rank, uint64_t now_ns) {
  report_.gone.add(rank);
  changed(now_ns);
}

void ViewChange::node_lost(uint32_t node, uint64_t now_ns) {
  report_.lost_nodes |= bit(node);
  changed(now_ns);
}

uint64_t ViewChange::ask(const base::RankSet& exclude, const base::RankSet& readmit, uint64_t now_ns) {
  report_.exclude = (report_.exclude | exclude) - readmit;
  report_.readmit = (report_.readmit - exclude) | readmit;
  const uint64_t wish = ++wishes_;
  changed(now_ns);
  return wish;
}

// Who asked for promises hears what has changed since it was given one.
void ViewChange::changed(uint64_t now_ns) {
  const uint32_t asker = node_of_ballot(promised_);
  if (ended_ == ViewEnd::kNone && promised_ != 0 && asker != placement_.own_node && !is_lost(asker)) {
    send_promise(asker);
  } else {
    retry_at_ns_ = phase_ == Phase::kIdle ? now_ns : retry_at_ns_;
  }
  advance(now_ns);
}

void ViewChange::tend(uint64_t now_ns) {
  advance(now_ns);
}

uint64_t ViewChange::next_ns() const {
  if (ended_ != ViewEnd::kNone || since_ns_ == 0) {
    const bool tells = ready_ && ended_ == ViewEnd::kNone && (members() >> placement_.own_node & 1) != 0;
    return tells ? tell_ready_ns_ : UINT64_MAX;
  }
  return std::min(retry_at_ns_, since_ns_ + options_.limit_ns);
}

void ViewChange::advance(uint64_t now_ns) {
  const uint32_t own = placement_.own_node;
  const bool takes_part = ended_ == ViewEnd::kNone && (members() >> own & 1) != 0;
  if (takes_part && !wants_change()) {
    tend_ready(now_ns);
  }
  if (!takes_part || !wants_change()) {
    since_ns_ = 0;
    return;
  }
  since_ns_ = since_ns_ == 0 ? std::max<uint64_t>(now_ns, 1) : since_ns_;
  if (!is_majority(living())) {
    end(ViewEnd::kMinority);
    return;
  }
  if (now_ns - since_ns_ >= options_.limit_ns) {
    end(ViewEnd::kDeadline);
    return;
  }
  if (phase_ == Phase::kPreparing) {
    propose_if_complete(now_ns);
  }
  if (ended_ != ViewEnd::kNone || since_ns_ == 0 || now_ns < retry_at_ns_) {
    return;
  }
  retry_at_ns_ = now_ns + options_.retry_ns;
  if (phase_ == Phase::kPreparing) {
    // When all have promised, one of them has not heard of a rank that is gone, or told of it in a promise overtaken.
    const uint64_t missing = living() & ~promises_;
    send_to(missing != 0 ? missing : living(), message_of(ViewKind::kPrepare));
  } else if (phase_ == Phase::kAccepting) {
    send_to(living() & ~accepts_, message_of(ViewKind::kAccept));
  } else if (coordinator() == own) {
    begin(now_ns);
  } else {
    send_to(bit(coordinator()), message_of(ViewKind::kReport));
  }
}

void ViewChange::begin(uint64_t now_ns) {
  const uint32_t own = placement_.own_node;
  ballot_ = (((std::max(top_ballot_, promised_) >> kNodeBits) + 1) << kNodeBits) | own;
  top_ballot_ = ballot_;
  promised_ = ballot_;
  phase_ = Phase::kPreparing;
  report_.last = host_->hold();
  note_promise();
  promises_ = bit(own);
  send_to(living(), message_of(ViewKind::kPrepare));
  propose_if_complete(now_ns);
}

// Which of several promises to one ballot its value is made of is not known here; the first tells of the fewest wishes.
void ViewChange::note_promise() {
  if (told_ballot_ != promised_) {
    told_ballot_ = promised_;
    told_wishes_ = wishes_;
  }
}

// Nodes that have lost each other cannot be in one view: the lower one stays.
uint64_t ViewChange::mutual_nodes() const {
  const uint32_t own = placement_.own_node;
  uint64_t kept = bit(own);
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    bool mutual = (promises_ >> node & 1) != 0 && !is_lost(node);
    for (uint32_t other = 0; other < placement_.nodes() && mutual; ++other) {
      const uint64_t lost_there = other == own ? report_.lost_nodes : promise_of_[other].report.lost_nodes;
      const bool lost = ((promise_of_[node].report.lost_nodes >> other | lost_there >> node) & 1) != 0;
      mutual = (kept >> other & 1) == 0 || other == node || !lost;
    }
    kept |= mutual ? bit(node) : 0;
  }
  return kept;
}

// A node that hears of a rank's end later than of the view would not know which operations the rank was through with.
bool ViewChange::told_alike(uint64_t nodes) const {
  const base::RankSet ranks = ranks_of(nodes) - view().lost;
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    if ((nodes >> node & 1) != 0 && (promise_of_[node].report.gone & ranks) != (report_.gone & ranks)) {
      return false;
    }
  }
  return true;
}

ViewValue ViewChange::next_value(uint64_t nodes) const {
  ViewValue value;
  value.made = ballot_;
  value.view = view();
  ++value.view.epoch;
  value.view.lost |= ranks_of(members() & ~nodes) | (report_.gone & ranks_of(nodes));
  base::RankSet readmit;
  uint64_t last = view().from - 1;
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    if ((nodes >> node & 1) != 0) {
      value.view.excluded |= promise_of_[node].report.exclude;
      readmit |= promise_of_[node].report.readmit;
      last = std::max(last, promise_of_[node].report.last);
    }
  }
  value.view.excluded -= readmit;
  value.view.from = last + 1;
  if (value.view.lost == all_ranks()) {
    value.view.excluded = {};  // nobody is left, and with all of them it would be the successor's view
  }
  const bool same_ranks = nodes == members() && value.view.lost == view().lost && value.view.excluded.empty();
  if (same_ranks && promised_to_move(nodes, value.view.from)) {
    value.view = View::of_successor(value.view.epoch, value.view.from, all_ranks());
  }
  return value;
}

void ViewChange::propose_if_complete(uint64_t now_ns) {
  const uint32_t own = placement_.own_node;
  if (phase_ != Phase::kPreparing || (living() & ~promises_) != 0) {
    return;
  }
  promise_of_[own] = {report_, accepted_, promised_value()};
  const uint64_t nodes = mutual_nodes();
  if (!is_majority(nodes)) {
    end(ViewEnd::kMinority);  // whom this node misses may be a majority without it
    return;
  }
  if (!told_alike(nodes)) {
    return;
  }
  // What may have been decided already stays what it is.
  ViewValue value = next_value(nodes);
  uint64_t highest = 0;
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    if ((promises_ & living()) >> node & 1 && promise_of_[node].accepted > highest) {
      highest = promise_of_[node].accepted;
      value = promise_of_[node].value;
    }
  }
  told_wishes_ = wishes_;
  phase_ = Phase::kAccepting;
  accepted_ = ballot_;
  accepted_value_ = value;
  accepts_ = 0;
  retry_at_ns_ = now_ns + options_.retry_ns;
  send_to(living(), message_of(ViewKind::kAccept));
  accepted_by(own, now_ns);
}

void ViewChange::accepted_by(uint32_t node, uint64_t now_ns) {
  accepts_ |= bit(node);
  if (!is_majority(accepts_)) {
    return;
  }
  ViewMessage message = message_of(ViewKind::kCommit);
  message.value = accepted_value_;
  message.epoch = message.value.view.epoch;
  send_to(living(), message);
  take_commit(message, now_ns);
}

// What was accepted before may leave out the node that brings it to its end.
bool ViewChange::leaves_out(const View& next) const {
  if (next.is_of_successor(all_ranks())) {
    return next.epoch != view().epoch + 1;  // it was left out in between
  }
  const base::RankSet own = ranks_of(bit(placement_.own_node));
  return (own - next.lost).empty() && (own - report_.gone).any();
}

void ViewChange::install(const ViewValue& value, uint64_t now_ns) {
  committed_ = value;
  promised_ = 0;
  accepted_ = 0;
  phase_ = Phase::kIdle;
  asked_ = false;
  promises_ = 0;
  accepts_ = 0;
  if (value.made == told_ballot_) {
    granted_ = told_wishes_;
    if (granted_ == wishes_) {
      report_.exclude = {};
      report_.readmit = {};
    }
  }
  told_ballot_ = 0;
  since_ns_ = 0;
  retry_at_ns_ = now_ns;
  ready_of_ = {};
  tell_ready_ns_ = now_ns;
  ready_ = ready_ && !has_moved();
  const bool held = (report_.lost_nodes & members()) != 0 || (report_.gone - view().lost).any();
  host_->install(value.view, held);
}

void ViewChange::end(ViewEnd end) {
  ended_ = end;
  since_ns_ = 0;
  host_->end(end);
  send_to(living(), message_of(ViewKind::kOut));
}

bool ViewChange::is_sane(const ViewMessage& message) const {
  const uint64_t beyond_nodes = placement_.nodes() >= 64 ? 0 : ~uint64_t{0} << placement_.nodes();
  const ViewReport& report = message.report;
  const View& next = message.value.view;
  return (report.lost_nodes & beyond_nodes) == 0 && next.from != 0 &&
         ((report.gone | report.exclude | report.readmit | next.lost | next.excluded) -
          base::RankSet::first(placement_.ranks()))
             .empty();
}

bool ViewChange::receive(uint32_t node, const ViewMessage& message, uint64_t now_ns) {
  if (node >= placement_.nodes() || node == placement_.own_node || !is_sane(message)) {
    return false;
  }
  if (is_lost(node)) {
    return true;
  }
  if (ended_ != ViewEnd::kNone) {
    if (message.kind != ViewKind::kOut) {
      send_to(bit(node), message_of(ViewKind::kOut));  // it has not heard so yet
    }
    return true;
  }
  if (message.kind == ViewKind::kOut) {
    node_lost(node, now_ns);
    return true;
  }
  heard_ready_ |= message.kind == ViewKind::kReady ? bit(node) : 0;
  if (message.kind == ViewKind::kCommit) {
    take_commit(message, now_ns);
    return true;
  }
  if (message.epoch <= view().epoch) {
    send_commit(node);  // it has missed a view, or is left out of it
    return true;
  }
  if (message.epoch > view().epoch + 1) {
    send_to(bit(node), message_of(ViewKind::kReport));  // this node has
    return true;
  }
  if (message.kind == ViewKind::kReady) {
    ready_of_[node] = {true, message.accepted, message.ballot};
    advance(now_ns);
    return true;
  }
  top_ballot_ = std::max(top_ballot_, message.ballot);
  switch (message.kind) {
    case ViewKind::kReport:
      asked_ = true;
      break;
    case ViewKind::kPrepare:
      take_prepare(node, message, now_ns);
      break;
    case ViewKind::kPromise:
      take_promise(node, message, now_ns);
      break;
    case ViewKind::kAccept:
      take_accept(node, message, now_ns);
      break;
    case ViewKind::kAccepted:
      if (phase_ == Phase::kAccepting && message.ballot == ballot_) {
        accepted_by(node, now_ns);
      }
      break;
    default:
      return false;
  }
  advance(now_ns);
  return true;
}

void ViewChange::take_prepare(uint32_t node, const ViewMessage& message, uint64_t now_ns) {
  if (message.ballot >= promised_) {
    step_back(message.ballot, now_ns);
    report_.last = host_->hold();
  }
  send_promise(node);  // of the higher ballot, if there is one
}

void ViewChange::take_promise(uint32_t node, const ViewMessage& message, uint64_t now_ns) {
  if (phase_ == Phase::kIdle) {
    return;
  }
  if (message.ballot > promised_) {
    // Somebody else is at it. When that comes to nothing this node tries again, later the higher its number.
    phase_ = Phase::kIdle;
    retry_at_ns_ = now_ns + options_.retry_ns * (2 + placement_.own_node);
  } else if (phase_ == Phase::kPreparing && message.ballot == ballot_) {
    // Promises overtake each other; what is lost stays lost.
    const ViewReport before = (promises_ >> node & 1) != 0 ? promise_of_[node].report : ViewReport{};
    promises_ |= bit(node);
    promise_of_[node] = {message.report, message.accepted, message.value};
    promise_of_[node].report.lost_nodes |= before.lost_nodes;
    promise_of_[node].report.gone |= before.gone;
    propose_if_complete(now_ns);
  }
}

void ViewChange::take_accept(uint32_t node, const ViewMessage& message, uint64_t now_ns) {
  if (message.ballot < promised_) {
    send_promise(node);
    return;
  }
  step_back(message.ballot, now_ns);
  (void)host_->hold();
  accepted_ = message.ballot;
  accepted_value_ = message.value;
  ViewMessage answer = message_of(ViewKind::kAccepted);
  answer.ballot = message.ballot;
  send_to(bit(node), answer);
}

// Another node's ballot is the highest: an own one is over, and is not begun again before that one had its time.
void ViewChange::step_back(uint64_t ballot, uint64_t now_ns) {
  promised_ = ballot;
  phase_ = Phase::kIdle;
  retry_at_ns_ = now_ns + options_.retry_ns * (2 + placement_.own_node);
}

void ViewChange::take_commit(const ViewMessage& message, uint64_t now_ns) {
  if (message.epoch <= view().epoch || message.value.view.epoch != message.epoch) {
    return;
  }
  if (leaves_out(message.value.view)) {
    end(ViewEnd::kLeftOut);
    return;
  }
  const bool member = (members_of(message.value.view.lost) >> placement_.own_node & 1) != 0;
  // A node without ranks may miss views: nobody asks it, and it decides nothing.
  if (!member || message.epoch == view().epoch + 1) {
    install(message.value, now_ns);
    advance(now_ns);
  }
}

ViewMessage ViewChange::message_of(ViewKind kind) const {
  ViewMessage message;
  message.kind = kind;
  message.epoch = kind == ViewKind::kCommit ? view().epoch : view().epoch + 1;
  message.ballot = ballot_;
  if (kind == ViewKind::kCommit) {
    message.value = committed_;
  } else if (kind == ViewKind::kPromise) {
    message.value = promised_value();
  } else if (kind == ViewKind::kAccept) {
    message.value = accepted_value_;
  }
  return message;
}

void ViewChange::send_promise(uint32_t node) {
  ViewMessage message = message_of(ViewKind::kPromise);
  message.ballot = promised_;
  message.accepted = accepted_;
  message.report = report_;
  note_promise();
  send_to(bit(node), message);
}

void ViewChange::send_commit(uint32_t node) {
  send_to(bit(node), message_of(ViewKind::kCommit));
}

void ViewChange::send_to(uint64_t nodes, const ViewMessage& message) {
  for (uint32_t node = 0; node < placement_.nodes(); ++node) {
    if (node != placement_.own_node && (nodes >> node & 1) != 0) {
      host_->send(node, message);
    }
  }
}

}  // namespace expertd::engine
