// SPDX-License-Identifier: Apache-2.0
// RankSet: ranks of one group over all nodes, as a value (atomic_rank_set.h: where threads share it). Trivially
// copyable and without padding, so that a set may lie in the parameters of a kernel and in a message. Loops over the
// words have a constant length, which compilers make a few vector instructions of. Any thread.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "daemon/base/limits.h"

namespace expertd::base {

struct RankSet {
  static constexpr uint32_t kWords = kMaxRanks / 64;

  /// Rank r is bit r % 64 of word r / 64. For kernels, which call nothing of the host, and for messages.
  uint64_t words[kWords] = {};

  constexpr RankSet() = default;
  /// Ranks 0..63, one bit each.
  constexpr explicit RankSet(uint64_t lowest_64) : words{lowest_64} {}
  static constexpr RankSet one(uint32_t rank) {
    RankSet set;
    set.add(rank);
    return set;
  }
  /// Ranks 0..count-1; count is at most kMaxRanks.
  static constexpr RankSet first(uint32_t count) {
    RankSet set;
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t below = count > i * 64 ? count - i * 64 : 0;
      set.words[i] = below >= 64 ? ~uint64_t{0} : (uint64_t{1} << below) - 1;
    }
    return set;
  }

  /// A rank beyond kMaxRanks is in no set; adding or removing it does nothing.
  constexpr bool contains(uint32_t rank) const { return rank < kMaxRanks && (words[rank / 64] >> rank % 64 & 1) != 0; }
  constexpr void add(uint32_t rank) {
    if (rank < kMaxRanks) {
      words[rank / 64] |= uint64_t{1} << rank % 64;
    }
  }
  constexpr void remove(uint32_t rank) {
    if (rank < kMaxRanks) {
      words[rank / 64] &= ~(uint64_t{1} << rank % 64);
    }
  }
  constexpr bool any() const {
    uint64_t all = 0;
    for (const uint64_t word : words) {
      all |= word;
    }
    return all != 0;
  }
  constexpr bool empty() const { return !any(); }
  constexpr uint32_t count() const {
    int count = 0;
    for (const uint64_t word : words) {
      count += std::popcount(word);
    }
    return static_cast<uint32_t>(count);
  }
  /// -1: none.
  constexpr int32_t lowest() const {
    for (uint32_t i = 0; i < kWords; ++i) {
      if (words[i] != 0) {
        return static_cast<int32_t>(i * 64) + std::countr_zero(words[i]);
      }
    }
    return -1;
  }
  /// Ranks 0..63, as bits: all there are where ranks sit on one node.
  constexpr uint64_t low() const { return words[0]; }

  constexpr RankSet& operator|=(const RankSet& other) {
    for (uint32_t i = 0; i < kWords; ++i) {
      words[i] |= other.words[i];
    }
    return *this;
  }
  constexpr RankSet& operator&=(const RankSet& other) {
    for (uint32_t i = 0; i < kWords; ++i) {
      words[i] &= other.words[i];
    }
    return *this;
  }
  constexpr RankSet& operator-=(const RankSet& other) {
    for (uint32_t i = 0; i < kWords; ++i) {
      words[i] &= ~other.words[i];
    }
    return *this;
  }
  friend constexpr RankSet operator|(RankSet a, const RankSet& b) { return a |= b; }
  friend constexpr RankSet operator&(RankSet a, const RankSet& b) { return a &= b; }
  /// Ranks of `a` that are not in `b`.
  friend constexpr RankSet operator-(RankSet a, const RankSet& b) { return a -= b; }
  friend constexpr bool operator==(const RankSet&, const RankSet&) = default;

  /// Goes over the ranks, ascending, of a set that does not change meanwhile.
  class Iterator {
   public:
    constexpr Iterator(const RankSet* set, uint32_t index) : set_(set), index_(index) { skip(); }
    constexpr uint32_t operator*() const { return index_ * 64 + static_cast<uint32_t>(std::countr_zero(left_)); }
    constexpr Iterator& operator++() {
      left_ &= left_ - 1;
      if (left_ == 0) {
        ++index_;
        skip();
      }
      return *this;
    }
    constexpr bool operator!=(const Iterator& end) const { return index_ != end.index_; }

   private:
    constexpr void skip() {
      while (index_ < kWords && set_->words[index_] == 0) {
        ++index_;
      }
      left_ = index_ < kWords ? set_->words[index_] : 0;
    }
    const RankSet* set_;
    uint32_t index_;
    uint64_t left_ = 0;  // of the word
  };
  constexpr Iterator begin() const { return {this, 0}; }
  constexpr Iterator end() const { return {this, kWords}; }
};
static_assert(kMaxRanks % 64 == 0 && sizeof(RankSet) == kMaxRanks / 8 && std::is_trivially_copyable_v<RankSet>);

}  // namespace expertd::base
