// SPDX-License-Identifier: Apache-2.0
// Runs the daemon's kernels with all ranks of a group on one GPU and one kernel at a time, so that no kernel ever needs
// another one to run: what a rank would hear from the others, their words and rows of the count matrix, the test writes
// when it wants the rank to have heard it. For compute-sanitizer, which lets kernels run one after the other and many
// times slower. Every tensor and table is an allocation of its own, of exactly its size. Device tests only, one thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/kernels/cuda/arm_params.h"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/part_params.h"
#include "tests/device/placed_tensors.h"

namespace expertd::device_test {

inline constexpr uint32_t kSerialMultiprocessors = 16;  // so that grids are small

/// Which kernels run the operations. kLinked: those of chain.cc for GPUs that all reach each other, the generic ones
/// where they do not serve the operation.
enum class Kernels : uint32_t { kGeneric, kRelay, kLinked, kCaptured };

/// When a rank hears of the others: before its first kernel; of the last exchange behind it; of both behind kernels
/// that did not wait so long; never, because the part was aborted before.
enum class Heard : uint32_t { kAtOnce, kLastLate, kAllLate, kAborted };

/// The memory of one rank that outlasts its operations.
struct SerialRank {
  explicit SerialRank(const kernels::OpShape& shape);
  /// Everything of it that is a part's own.
  void set_tables(kernels::cuda::PartParams* params) const;

  Memory page, sent_page;                         // what the others tell this rank, and what it tells them
  Memory matrix, sent_matrix;                     // the same of the count matrix
  Memory token_rank, token_expert, topk, counts;  // the handle
  Memory plan, plan_work, block_rows, chunk_counts, chunk_errors, rows, left_blocks;
  Memory state, facts, progress, words;
  Memory staging, relay;
  Memory lane, entry;  // of a capture lane: its state, and the one captured operation of its table
};

/// What others read or write of a rank's tensors in an operation.
void set_tensors_of(const kernels::OpShape& shape, const Tensors& tensors, kernels::PeerView* view);

class SerialGroup {
 public:
  /// For operations of `shape`'s group on the current GPU. Loads what its kernels need.
  SerialGroup(const kernels::OpShape& shape, Kernels which);
  ~SerialGroup();
  SerialGroup(const SerialGroup&) = delete;
  SerialGroup& operator=(const SerialGroup&) = delete;

  /// Runs one operation on every active rank; outputs come back into step.gpu, but those of an aborted one.
  void run(const CaseStep& step, Heard heard);
  /// The same of a barrier.
  void run_barrier(uint64_t active_ranks, Heard heard);
  /// A layout of rank 0's ids.
  void run_layout(const RandomCase& made, GroupMemory* gpu);

  /// Of the last operation.
  kernels::cuda::PartFacts facts(uint32_t rank) const;
  /// Its completion and result word, 0 before, and its doorbell.
  std::array<uint64_t, 3> words(uint32_t rank) const;
  /// What the completion word is at its end.
  uint64_t seq() const;
  uint64_t part() const { return part_; }

  /// An arm of rank 0 whose doorbell holds something that names no operation.
  void ring_captured(uint64_t rung, bool by_kernel);
  /// Its lane as it was at first.
  void renew_lane() { ranks_[0]->lane.put(std::vector<kernels::cuda::LaneState>(1)); }

 private:
  using Params = kernels::cuda::PartParams;

  void load();
  void abort_part(uint32_t rank);
  void fill(const CaseStep& step);
  void begin(uint64_t active_ranks);
  Params params_of(uint32_t rank, const OpParams& host);
  void set_peers(const CaseStep& step, const std::vector<Tensors>& tensors, Params* params);
  void set_relay(const CaseStep& step, Params* params);
  void set_low_latency(const CaseStep& step, const std::vector<Tensors>& tensors, Params* params);
  void hear_counts(const CaseStep& step, uint32_t rank);
  /// The words that the others write at rank's: of the first exchange, or of both.
  void hear(uint32_t rank, bool moved);
  void hear_rows(uint32_t rank, uint32_t source, kernels::cuda::SyncPage* page);
  void expect_told(const CaseStep& step, uint32_t rank);

  /// Launches for one rank, waits for the end, and expects that all went well.
  void ran(const char* what, cudaError_t launched);
  template <typename Launch>
  void each(const char* what, const Launch& launch);
  void doorbell(Params* params);
  void flags(uint32_t rank, bool moved);

  void run_generic();
  void run_link(Heard heard);
  void run_low_latency(Heard heard);
  void rehearse();
  void launch_ll(uint32_t rank, kernels::cuda::LowLatencyEntry place);
  kernels::cuda::ArmParams arm_of(uint32_t rank);

  const kernels::OpShape shape_;
  const Kernels which_;
  cudaStream_t stream_ = nullptr;
  std::vector<std::unique_ptr<SerialRank>> ranks_;
  PlacedTensors placed_;
  std::vector<Params> params_;  // [R]
  uint64_t active_ = 0;
  uint64_t part_ = 100;
  uint64_t group_op_ = 0;
  uint64_t seq_ = 0;
  bool aborted_ = false;
  bool by_kernels_ = false;  // waits are those of kernels, as under MPS
};

}  // namespace expertd::device_test
