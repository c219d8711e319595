// SPDX-License-Identifier: Apache-2.0
// AtomicRankSet: ranks of one group where threads share them. Lock-free; any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "daemon/base/rank_set.h"

namespace expertd::base {

/// Each word is read and written at once, the set is not: a load beside a change of several words may have some of its
/// ranks and not yet others, and not in the order in which they came. So it is for sets of which every rank counts for
/// itself: those that only grow while they are looked at (who is lost, whose counts are there), where a rank that is
/// not seen yet is seen with the next look; and those that are written before a word is stored with release, whose
/// readers have loaded that word. Orders of memory are those of each word, so what is said of one rank holds for it.
class AtomicRankSet {
 public:
  RankSet load(std::memory_order order) const {
    RankSet set;
    for (uint32_t i = 0; i < RankSet::kWords; ++i) {
      set.words[i] = words_[i].load(order);
    }
    return set;
  }
  void store(const RankSet& set, std::memory_order order) {
    for (uint32_t i = 0; i < RankSet::kWords; ++i) {
      words_[i].store(set.words[i], order);
    }
  }
  bool contains(uint32_t rank, std::memory_order order) const {
    return rank < kMaxRanks && (words_[rank / 64].load(order) >> rank % 64 & 1) != 0;
  }
  /// True: it was not there.
  bool add(uint32_t rank, std::memory_order order) {
    const uint64_t bit = uint64_t{1} << rank % 64;
    return rank < kMaxRanks && (words_[rank / 64].fetch_or(bit, order) & bit) == 0;
  }
  /// One word after the other. Who wants to know whether the set is whole now loads it afterwards, seq_cst like this:
  /// of two that add its last ranks at once one then sees both.
  void add(const RankSet& ranks, std::memory_order order) {
    for (uint32_t i = 0; i < RankSet::kWords; ++i) {
      if (ranks.words[i] != 0) {
        words_[i].fetch_or(ranks.words[i], order);
      }
    }
  }

 private:
  std::array<std::atomic<uint64_t>, RankSet::kWords> words_{};
};

}  // namespace expertd::base
