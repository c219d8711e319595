// SPDX-License-Identifier: Apache-2.0
// OpTable: the operations in flight and the results of the last ones, so that an event can be asked after its ring slot
// was used again. Any thread; a short lock inside, held longer only while outputs of unknown pointers are copied back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "client/src/completion_source.h"
#include "client/src/status.h"

namespace expertd::client {

class Staging;

/// Which bytes of a staged output an operation has written.
enum class CopyBack { kAll, kReceivedRows, kExpertRows };

struct StagedOutput {
  void* destination = nullptr;
  const void* source = nullptr;
  uint64_t bytes = 0;
  uint64_t row_bytes = 0;
  CopyBack rows = CopyBack::kAll;
};

struct OpRecord {
  uint64_t event = 0;  // incarnation and sequence
  uint64_t seq = 0;
  uint32_t op = 0;
  uint32_t rows_per_expert = 0;
  uint64_t submit_ns = 0;
  uint64_t deadline_ns = 0;
  int32_t staging_chunk = -1;
  std::vector<StagedOutput> outputs;
};

/// What is kept of a completion: everything in front of the counts.
struct OpOutcome {
  uint64_t event = 0;
  uint64_t submit_ns = 0;
  expertd_completion completion{};
  /// Null when the counts were overwritten by later operations.
  const uint32_t* expert_counts = nullptr;
};

/// The operation's status, and the caller's form of its result where one is wanted.
Status result_of(const OpOutcome& outcome, expertd_op_result_t* result);

enum class Lookup { kDone, kInFlight, kForgotten, kLost };

class OpTable {
 public:
  static constexpr uint32_t kHistory = 1024;
  /// More than the 64 operations for which the counts of a result are promised.
  static constexpr uint32_t kCountTables = 128;

  /// Null staging: no operation has a chunk of it.
  explicit OpTable(Staging* staging);

  /// Before the record's slot is written; the slot's earlier operation has been collected.
  void begin(OpRecord record, uint32_t slot);
  /// Moves a completed operation of the ring, or other source, into the history.
  void collect(const CompletionSource& ring, uint64_t seq);
  void collect_all(const CompletionSource& ring);
  /// The operation has an event and was not collected yet; false for what tells the daemon of a refusal.
  bool holds(const CompletionSource& ring, uint64_t seq);
  /// Looks at the history, and at the ring when it is the event's own.
  Lookup find(const CompletionSource* ring, uint64_t event, uint64_t seq, OpOutcome* outcome, uint64_t* deadline_ns);
  /// The ring is gone: whatever had not completed is lost.
  void forget_in_flight();

 private:
  struct Kept {
    uint64_t event = 0;
    uint64_t submit_ns = 0;
    std::array<std::byte, offsetof(expertd_completion, expert_counts)> head{};
  };
  struct Counts {
    uint64_t event = 0;
    std::array<uint32_t, EXPERTD_COMPLETION_EXPERTS> values{};
  };

  void collect_locked(const CompletionSource& ring, OpRecord* record);
  bool find_kept_locked(uint64_t event, OpOutcome* outcome);
  Kept& kept_at(uint64_t event) { return (*kept_)[event % kHistory]; }
  Counts& counts_at(uint64_t event) { return (*counts_)[event % kCountTables]; }

  Staging* const staging_;
  std::mutex mutex_;
  std::array<OpRecord, EXPERTD_RING_SLOTS_MAX> in_flight_{};
  std::unique_ptr<std::array<Kept, kHistory>> kept_;
  std::unique_ptr<std::array<Counts, kCountTables>> counts_;
};

/// What an event gets whose result was kept and is not any more.
Status forgotten_status();

}  // namespace expertd::client
