// SPDX-License-Identifier: Apache-2.0
// RingServer: the daemon's end of one session's ring. Copies each submitted slot once, has the copy admitted, and
// writes completions in place. The loop thread alone; the other end is hostile by assumption: nothing it writes is
// trusted.
#pragma once

#include <cstdint>

#include "daemon/engine/engine.h"
#include "daemon/session/ring_memory.h"
#include "daemon/session/session_tables.h"

namespace expertd::transport {

class RingServer final : public engine::CompletionPort {
 public:
  RingServer(session::SessionTables* tables, session::RingMemory* ring, void* flag_page, uint64_t default_timeout_ns);

  /// Takes new submissions into the engine; true when there were any. After a ring fault it takes nothing.
  bool poll(engine::Engine& engine, uint64_t now_ns);
  bool has_submissions() const;
  /// The client broke the ring protocol (RING_OVERFLOW); its session is to be closed.
  bool faulted() const { return faulted_; }
  void set_sleeping(bool sleeping);
  /// With DRAINING the ring takes from here on only what another rank waits for.
  void set_flags(uint32_t session_flags);

  void complete(const engine::Request& request, const expertd_completion& completion) override;

  engine::EngineSession& engine_session() { return engine_session_; }
  session::SessionTables& tables() { return *tables_; }
  session::RingMemory& ring() { return *ring_; }
  uint32_t slots_used() const { return engine_session_.outstanding(); }
  uint32_t slot_count() const { return slot_count_; }

 private:
  void drop_handle(const engine::Request& request);
  void wake_client();

  session::SessionTables* tables_;
  session::RingMemory* ring_;
  uint32_t slot_count_;
  uint64_t default_timeout_ns_;
  uint64_t head_ = 0;
  uint32_t in_flight_ = 0;  // submitted and not completed
  bool faulted_ = false;
  bool draining_ = false;  // the header's flags are the client's to write
  engine::EngineSession engine_session_;
};

}  // namespace expertd::transport
