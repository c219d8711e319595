// SPDX-License-Identifier: Apache-2.0
// HostGroupTables: count matrices and handles of one group on host devices. The matrices are shared by the ranks, each
// of which writes its own row; the handles of a rank are touched by that rank's loop thread alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/engine/ports.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

class HostGroupTables {
 public:
  explicit HostGroupTables(const engine::GroupShape& shape);

  base::GroupId id() const { return id_; }
  void add_rank(uint32_t rank, uint32_t handle_limit);
  /// True when the last rank left.
  bool remove_rank(uint32_t rank);

  int32_t* counts(uint32_t page) { return counts_.data() + page * matrix_ints_; }
  /// Zeroes the rows of ranks that do not take part, which nobody else writes.
  void clear_inactive_rows(uint32_t page, uint64_t active_ranks);
  /// The tables of a handle, allocated at its first use (the first ones at join); null beyond the limit.
  kernels::Routing routing(uint32_t rank, uint32_t handle_index);
  uint32_t handle_capacity(uint32_t rank) const { return static_cast<uint32_t>(per_rank_[rank].handles.size()); }
  uint64_t bytes() const;

 private:
  struct Handle {
    std::unique_ptr<int32_t[]> storage;
  };
  struct RankTables {
    bool present = false;
    std::vector<Handle> handles;
  };
  void allocate(Handle& handle) const;

  base::GroupId id_;
  uint32_t ranks_;
  uint32_t experts_;
  uint32_t top_k_;
  uint32_t max_tokens_;
  uint64_t matrix_ints_;
  std::vector<int32_t> counts_;
  std::vector<RankTables> per_rank_;
};

}  // namespace expertd::device
