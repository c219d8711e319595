// SPDX-License-Identifier: Apache-2.0
// LoopPort: what the session service asks of a device loop. Any control thread; requests are bounded tasks that the
// loop runs between operations.
#pragma once

#include <cstdint>
#include <functional>

#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/session/ring_memory.h"
#include "daemon/session/session_tables.h"

namespace expertd::session {

class LoopPort {
 public:
  virtual ~LoopPort() = default;
  /// Starts serving the session's ring. Returns when the loop has taken it; after an error it never will.
  virtual base::Status add_session(SessionTables* tables, RingMemory* ring, void* flag_page) = 0;
  /// Stops admitting, ends what is in flight; `drained` runs on the loop thread when nothing of the session is left.
  /// Fails only when the loop has ended, and with it whatever could touch the session.
  virtual base::Status close_session(base::SessionId session, std::function<void()> drained) = 0;
  /// Runs `task` on the loop thread and returns when it has run; after an error it has not run and never will.
  virtual base::Status run(std::function<void()> task) = 0;
  /// Whether an operation in flight of the session, open or closing, names `mapping`; loop thread, inside run().
  virtual bool uses(base::SessionId session, const engine::Mapping* mapping) = 0;
  /// Whether an operation in flight of the session, open or closing, belongs to the rank; loop thread, inside run().
  virtual bool uses_group(base::SessionId session, const engine::RankState* rank) = 0;
  /// Raises session flags (draining) in every ring, also in those to come; loop thread, inside run().
  virtual void raise_session_flags(uint32_t flags) = 0;
  virtual void wake() = 0;
};

}  // namespace expertd::session
