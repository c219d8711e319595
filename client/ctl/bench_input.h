// SPDX-License-Identifier: Apache-2.0
// Seeded inputs of all ranks: every value is a function of (seed, iteration, stream, place), so that each rank computes
// the others' inputs instead of being told. The same on every platform. Pure, any thread.
#pragma once

#include <cstdint>
#include <span>

#include "client/ctl/bench_options.h"

namespace expertd::ctl {

/// What a value is for; streams are independent of each other.
enum class BenchStream : uint64_t { kTokens = 1, kSide, kRouting, kWeights, kBias0, kBias1, kExperts, kRowWeights };

class BenchInput {
 public:
  BenchInput(uint64_t seed, uint32_t iteration, const BenchExpertGroups& groups = {});

  /// Finite values of mixed size and either sign.
  void bf16_row(BenchStream stream, uint64_t owner, uint64_t row, std::span<uint16_t> out) const;
  void byte_row(BenchStream stream, uint64_t owner, uint64_t row, std::span<uint8_t> out) const;
  /// In (0, 1].
  float weight(BenchStream stream, uint64_t owner, uint64_t row, uint64_t lane) const;
  /// `top_k` different experts, uniform over those of the token's groups; -1 for a lane without one. Of each rank's
  /// tokens the last goes nowhere and the one before lacks its first lane, so that both cases are always there.
  void experts_of(uint64_t owner, uint64_t token, uint64_t tokens, uint32_t experts, std::span<int32_t> out) const;

 private:
  uint64_t key(BenchStream stream, uint64_t owner, uint64_t row) const;

  /// One bit per group that the token may use.
  uint64_t groups_of(uint64_t start) const;

  uint64_t base_;
  BenchExpertGroups groups_;
};

}  // namespace expertd::ctl
