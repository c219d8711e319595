// SPDX-License-Identifier: Apache-2.0
// Runs the daemon's kernels for a group over several nodes with all its ranks on one GPU, one kernel at a time: ranks
// of other nodes have no memory in a rank's tables, and the test carries messages between them, in pinned memory
// between guards. What messages, jobs and totals are: daemon/kernels/cuda/node_jobs.h. Device tests only, one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "daemon/engine/ports.h"
#include "daemon/kernels/cuda/node_jobs.h"
#include "tests/device/serial_group.h"

namespace expertd::device_test {

/// Pinned memory of the host between guards, all of it poison at first.
class Pinned {
 public:
  explicit Pinned(size_t bytes);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  template <typename T = char>
  T* at(uint64_t offset = 0) const {
    return reinterpret_cast<T*>(data_ + kGuardBytes + offset);
  }
  size_t bytes() const { return bytes_; }
  bool guards_intact() const;
  bool untouched() const;

 private:
  static constexpr size_t kGuardBytes = 256;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

class NodesGroup {
 public:
  /// For operations of `shape`'s group on the current GPU.
  NodesGroup(const kernels::OpShape& shape, const engine::Placement& placement, support::Random* random);
  ~NodesGroup();
  NodesGroup(const NodesGroup&) = delete;
  NodesGroup& operator=(const NodesGroup&) = delete;

  /// Runs one operation on every active rank; outputs come back into step.gpu. `matrix`: of the handle's dispatch.
  /// `step.host` has the host's tables.
  void run(const CaseStep& step, const std::vector<int32_t>& matrix);
  /// Of the last operation.
  kernels::cuda::PartFacts facts(uint32_t rank) const;
  uint64_t part() const { return part_; }

  /// Instead of what is packed, entries with any tables are spread and served: outputs mean nothing then, but nothing
  /// outside them is written.
  bool garbage = false;

 private:
  using Params = kernels::cuda::PartParams;
  struct Message {  // rows
    uint32_t source = 0;
    uint32_t node = 0;
    uint32_t count = 0;
    kernels::MessageHead head;
    char* entries = nullptr;
  };
  struct Pull {  // a window of a rank's tokens at one node
    uint32_t rank = 0;
    uint32_t node = 0;
    uint32_t begin = 0;
    uint32_t end = 0;
    uint32_t server = 0;
    uint32_t count = 0;
    char* entries = nullptr;
    char* sums = nullptr;
  };

  void fill(const CaseStep& step);
  Params params_of(uint32_t rank, const CaseStep& step, const std::vector<Tensors>& tensors);
  void set_view(const CaseStep& step, const std::vector<Tensors>& tensors, uint32_t peer, Params* params);
  void hear_counts(const CaseStep& step, uint32_t rank);
  kernels::cuda::NodeTable table_of(uint32_t rank) const;
  uint32_t node_ranks(uint32_t node) const { return static_cast<uint32_t>(placement_.ranks_of[node].size()); }
  bool active(uint32_t rank) const { return ((active_ >> rank) & 1) != 0; }
  /// Another node with ranks that take part: there are buffers for no other.
  bool exchanges(uint32_t rank, uint32_t node) const;

  void ran(const char* what, cudaError_t launched);
  template <typename Launch>
  void each(const char* what, const Launch& launch);
  void each_of(const char* what, cudaError_t (*launch)(const Params&, cudaStream_t));
  void signal(kernels::cuda::SignalStep step);
  char* take_pinned(size_t bytes);

  void run_dispatch();
  void pack_rows(uint32_t rank);
  uint32_t fill_pack_job(uint32_t rank, uint32_t begin, kernels::cuda::PackRowsJob* job);
  void spread_rows(uint32_t rank);
  kernels::cuda::NodeTotals spread(uint32_t rank, const std::vector<Message>& messages);
  void spread_bad_entries(uint32_t rank, const std::vector<Message>& messages);
  void spread_garbage(uint32_t rank, const std::vector<Message>& messages);
  uint64_t landing_rows(uint32_t source, uint32_t rank) const;

  void run_combine(const CaseStep& step);
  void pack_pulls(uint32_t rank, const CaseStep& step);
  void expect_host_pulls(const Pull& pull, const CaseStep& step);
  kernels::MessageHead pulls_head(uint32_t rank) const;
  kernels::cuda::NodeTotals serve(uint32_t server, const std::vector<const Pull*>& pulls);
  void serve_all();
  void serve_bad_entries(const Pull& pull);
  void serve_garbage(const Pull& pull);
  uint32_t combine(uint32_t rank, uint32_t begin, uint32_t end, uint32_t spoiled_node);
  void combine_with_bad_sums(uint32_t rank);

  const kernels::OpShape shape_;
  const engine::Placement placement_;
  support::Random* random_;
  const uint32_t nodes_;
  cudaStream_t stream_ = nullptr;
  std::vector<std::unique_ptr<SerialRank>> ranks_;
  std::vector<std::unique_ptr<Memory>> positions_;  // by rank
  PlacedTensors placed_;
  std::vector<Params> params_;     // [R]
  std::vector<int32_t> matrix_;    // of the handle's dispatch
  std::vector<Message> messages_;  // of the operation
  std::vector<Pull> pulls_;        // the same
  std::deque<Pinned> pinned_;      // the same
  uint64_t active_ = 0;
  uint64_t part_ = 100;
  uint64_t group_op_ = 0;
};

}  // namespace expertd::device_test
