// SPDX-License-Identifier: Apache-2.0
// HandleTable: which handle places of a session are free and which generation each has. Groups of a session share it,
// so that their indices are disjoint. Any thread; a short lock inside.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "client/src/status.h"

namespace expertd::client {

class HandleTable {
 public:
  /// All places free; generations go on where they were, so that a handle from before a re-attach stays stale.
  void reset(uint32_t capacity);
  uint32_t capacity() const;
  /// HANDLE_LIMIT when no place is free.
  Status take(uint64_t owner, expertd_handle_t* handle);
  /// The next generation of a place that stays taken (low-latency rotation).
  expertd_handle_t renew(uint32_t index);
  /// Who executed the dispatch that the handle is of: copy engines. Until it is told, and of other generations, not.
  void set_copies(expertd_handle_t handle);
  bool is_of_copies(expertd_handle_t handle) const;
  /// STALE_HANDLE unless the place is taken by this owner in this generation.
  Status check(uint64_t owner, expertd_handle_t handle) const;
  Status give_back(uint64_t owner, expertd_handle_t handle);
  /// Frees every place of an owner.
  void give_back_all(uint64_t owner);

 private:
  struct Place {
    uint64_t owner = 0;  // 0: free
    uint32_t generation = 0;
    uint32_t copies_generation = 0;  // the last one whose routing copy engines left; 0: none
  };

  Status check_locked(uint64_t owner, expertd_handle_t handle) const;

  mutable std::mutex mutex_;
  std::vector<Place> places_;
  std::vector<uint32_t> free_;
};

}  // namespace expertd::client
