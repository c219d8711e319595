// SPDX-License-Identifier: Apache-2.0
// LastWord: tells every session why the process ends, through the ring memory that the clients keep, without the loops:
// one of them may be stuck in the driver. Any thread. Its lock is never held over anything that can block, so that
// nothing which is stuck keeps the word back.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/session/ring_memory.h"

namespace expertd::session {

class LastWord {
 public:
  /// From now on the word goes to the ring too; at once when it was said already. Rings that nobody else holds any more
  /// are forgotten, so there are never more than sessions.
  void add(base::SessionId session, const std::shared_ptr<RingMemory>& ring);
  /// Writes `reason` into every ring, closes the sessions and wakes their clients. The first word counts; a completion
  /// that is there already does too.
  void say(base::Reason reason);
  /// NONE: nothing was said.
  base::Reason said() const;

 private:
  static void write(RingMemory& ring, base::Reason reason);

  mutable std::mutex mutex_;
  std::map<uint64_t, std::weak_ptr<RingMemory>> rings_;  // by session
  base::Reason said_ = EXPERTD_REASON_NONE;
};

}  // namespace expertd::session
