// SPDX-License-Identifier: Apache-2.0
// What the nodes of a group send each other to agree on its views; daemon/engine/view_change.h says when. Values only.
#pragma once

#include <cstdint>

#include "daemon/base/rank_set.h"

namespace expertd::engine {

inline constexpr uint32_t kViewNodes = base::kMaxNodes;

/// A generation of a group's membership: who takes part in operations from `from` on.
struct View {
  uint64_t epoch = 1;
  uint64_t from = 1;
  base::RankSet lost{};      // gone, or of lost nodes
  base::RankSet excluded{};  // by request
  base::RankSet out() const { return lost | excluded; }
  /// The last one of a group that goes on as another: from here on all its ranks are in its successor.
  static View of_successor(uint64_t epoch, uint64_t from, const base::RankSet& all_ranks) {
    return {epoch, from, all_ranks, all_ranks};
  }
  bool is_of_successor(const base::RankSet& all_ranks) const { return lost == all_ranks && excluded == all_ranks; }
  friend bool operator==(const View&, const View&) = default;
};

enum class ViewKind : uint32_t {
  kReport = 1,    // a node wants a change, or to hear of one that it missed
  kPrepare = 2,   // a ballot of the next view
  kPromise = 3,   // to the ballot, or that a higher one has it
  kAccept = 4,    // the next view, as the ballot has it
  kAccepted = 5,  // the ballot's view
  kCommit = 6,    // the view is decided
  kOut = 7,       // the sender takes no part in the group any more
  kReady = 8,     // the sender may go over to the group's successor; `accepted` and `ballot` as below
};
inline constexpr uint32_t kViewKinds = 8;

/// A view that was proposed, and the ballot that it was first proposed with: whose promises it is made of. In a promise
/// without one `made` is the operation that the sender holds at to go over to the group's successor, 0: it does not.
struct ViewValue {
  View view;
  uint64_t made = 0;
};

/// What a node knows and wishes.
struct ViewReport {
  uint64_t last = 0;        // the last operation that was decided there
  uint64_t lost_nodes = 0;  // bits of nodes that it has lost
  base::RankSet gone;       // that it was told of, or its own
  base::RankSet exclude;    // that it wants excluded
  base::RankSet readmit;    // and back
};

struct ViewMessage {
  ViewKind kind = ViewKind::kReport;
  uint64_t epoch = 0;     // of the view that is to be agreed on; kCommit: of the one that was
  uint64_t ballot = 0;    // grows; the low bits are the node whose it is. kReady: the last operation decided there
  uint64_t accepted = 0;  // kPromise: the ballot with which `value` was accepted; 0: none was. kReady: the operation
                          // that the sender holds at; 0: there is none yet
  ViewValue value;        // kPromise, kAccept, kCommit
  ViewReport report;      // kPromise
};

}  // namespace expertd::engine
