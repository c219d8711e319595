// SPDX-License-Identifier: Apache-2.0
// HostGroupTables: count matrices and handles of one group on host devices. The matrices are shared by the ranks, each
// of which writes its own row; the handles of a rank are touched by that rank's loop thread alone. All of it is
// allocated when a rank joins and freed when it leaves, by control threads: a loop never allocates.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/device.h"
#include "daemon/device/host/node_exchange.h"
#include "daemon/engine/ports.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

/// Bytes of the handles that one rank of a group may hold: as many as on a GPU, so that a group that fits there fits
/// here. Large groups get fewer handles (handle_capacity), never none.
inline constexpr uint64_t kMaxHandleTableBytes = 256ULL << 20;

/// What a rank of a group of this shape takes, and the counts that its ranks share. Pure.
GroupMemory host_group_memory(const engine::GroupShape& shape, uint32_t handle_limit);

/// Which dispatch left a handle's tables; generation 0: none that succeeded.
struct HandleUse {
  uint32_t generation = 0;
  uint32_t tokens = 0;
  uint32_t top_k = 0;
  uint32_t expanded = 0;
  friend bool operator==(const HandleUse&, const HandleUse&) = default;
};

class HostGroupTables {
 public:
  /// Null when there is no memory.
  static std::unique_ptr<HostGroupTables> create(const engine::GroupShape& shape);

  base::GroupId id() const { return id_; }
  /// POOL_EXHAUSTED when there is no memory for the handles.
  base::Status add_rank(uint32_t rank, uint32_t handle_limit);
  /// Frees the rank's handles; true when the last rank left.
  bool remove_rank(uint32_t rank);
  bool empty() const;

  int32_t* counts(uint32_t page) { return counts_.get() + page * matrix_ints_; }
  /// Zeroes the rows of ranks that do not take part, which nobody else writes.
  void clear_inactive_rows(uint32_t page, const base::RankSet& active_ranks);
  /// The tables of a handle; null beyond the capacity.
  kernels::Routing routing(uint32_t rank, uint32_t handle_index);
  /// What the handle is good for; null beyond the capacity. Lives until the rank leaves.
  HandleUse* use(uint32_t rank, uint32_t handle_index);
  /// What the ranks of a group over several nodes tell each other of an operation, one per rank.
  std::span<NodeNotice> notices(uint32_t page) { return {notices_.data() + size_t{page} * ranks_, ranks_}; }
  /// What a rank's part in the page knows of all ranks; null when the rank is not here. No two parts of a rank have one
  /// page at a time.
  kernels::PeerView* peers(uint32_t rank, uint32_t page) {
    std::vector<kernels::PeerView>& peers = per_rank_[rank].peers;
    return peers.empty() ? nullptr : peers.data() + static_cast<size_t>(page) * ranks_;
  }
  /// Null when the rank is not here. Lives until it leaves.
  NodeExchange* exchange(uint32_t rank) { return per_rank_[rank].exchange.get(); }
  uint32_t experts() const { return experts_; }
  uint32_t handle_capacity(uint32_t rank) const { return static_cast<uint32_t>(per_rank_[rank].uses.size()); }
  uint64_t handle_bytes() const { return handle_ints() * sizeof(int32_t); }

 private:
  struct Free {
    void operator()(int32_t* ints) const { std::free(ints); }
  };
  /// Zeroed memory from calloc, which the kernel hands out page by page at the first use.
  using Ints = std::unique_ptr<int32_t[], Free>;
  struct RankTables {
    Ints handles;
    std::vector<HandleUse> uses;  // one per handle; empty: the rank is not here
    std::unique_ptr<NodeExchange> exchange;
    std::vector<kernels::PeerView> peers;  // by page and rank
  };
  explicit HostGroupTables(const engine::GroupShape& shape);
  static Ints allocate(uint64_t ints);
  uint64_t handle_ints() const { return handle_ints_; }

  base::GroupId id_;
  uint32_t ranks_;
  uint32_t experts_;
  uint32_t top_k_;
  uint32_t max_tokens_;
  uint64_t matrix_ints_;
  uint64_t handle_ints_;
  Ints counts_;
  std::vector<NodeNotice> notices_;  // by page and rank
  std::vector<RankTables> per_rank_;
};

/// Finds the tables of a group; shared by the host devices of a process. Control threads write, loops read.
class HostGroupDirectory {
 public:
  static constexpr uint32_t kMaxGroups = 1024;
  HostGroupDirectory() = default;
  ~HostGroupDirectory();
  HostGroupDirectory(const HostGroupDirectory&) = delete;
  HostGroupDirectory& operator=(const HostGroupDirectory&) = delete;

  base::Status add_rank(const engine::GroupShape& shape, uint32_t handle_limit);
  void remove_rank(base::GroupId group, base::Rank rank);
  /// Of a rank that is here; 0 for others.
  uint64_t handle_table_bytes(base::GroupId group, base::Rank rank);
  /// Lock-free; null when the group is not known.
  HostGroupTables* find(base::GroupId group) const;

 private:
  std::mutex mutex_;
  std::array<std::atomic<HostGroupTables*>, kMaxGroups> tables_{};
};

}  // namespace expertd::device
