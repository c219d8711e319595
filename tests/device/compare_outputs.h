// SPDX-License-Identifier: Apache-2.0
// Compares what an operation left on a GPU with what the host kernels left. Tests only.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "tests/support/random_case_buffers.h"

namespace expertd::device_test {

inline std::vector<std::pair<const char*, support::PoisonedBuffer support::RankMemory::*>> output_buffers() {
  return {{"x", &support::RankMemory::x},
          {"side", &support::RankMemory::out_side},
          {"topk_idx", &support::RankMemory::out_topk_idx},
          {"topk_weights", &support::RankMemory::out_topk_weights},
          {"expert_counts", &support::RankMemory::expert_counts},
          {"rank_prefix", &support::RankMemory::rank_prefix},
          {"src_info", &support::RankMemory::src_info},
          {"layout_range", &support::RankMemory::layout_range},
          {"stats", &support::RankMemory::stats},
          {"token_rank_mask", &support::RankMemory::token_rank_mask}};
}

inline void expect_equal_outputs(const support::RankMemory& host, const support::RankMemory& gpu) {
  for (const auto& [name, member] : output_buffers()) {
    const support::PoisonedBuffer& a = host.*member;
    const support::PoisonedBuffer& b = gpu.*member;
    ASSERT_EQ(a.bytes(), b.bytes());
    const auto* first = a.as<uint8_t>();
    const auto* other = b.as<uint8_t>();
    const auto at = std::mismatch(first, first + a.bytes(), other).first - first;
    EXPECT_EQ(static_cast<size_t>(at), a.bytes()) << name << " differs at byte " << at;
  }
}

inline void expect_equal_reports(const kernels::OpReport& host, const kernels::OpReport& gpu) {
  EXPECT_EQ(host.reason, gpu.reason);
  EXPECT_EQ(host.argument, gpu.argument);
  EXPECT_EQ(host.value, gpu.value);
  EXPECT_EQ(host.minimum, gpu.minimum);
  EXPECT_EQ(host.maximum, gpu.maximum);
  EXPECT_EQ(host.rank, gpu.rank);
  if (host.reason != 0) {
    return;
  }
  EXPECT_EQ(host.recv_rows, gpu.recv_rows);
  EXPECT_EQ(host.local_bytes, gpu.local_bytes);
  EXPECT_EQ(host.remote_bytes, gpu.remote_bytes);
  EXPECT_EQ(host.expert_count_entries, gpu.expert_count_entries);
  for (uint32_t e = 0; e < host.expert_count_entries; ++e) {
    EXPECT_EQ(host.expert_counts[e], gpu.expert_counts[e]) << "expert " << e;
  }
}

/// What a failed dispatch leaves: indices -1, counts 0.
inline void expect_failed_outputs(const kernels::OpShape& shape, const support::RankMemory& gpu) {
  const auto all = [](const support::PoisonedBuffer& buffer, uint8_t byte) {
    return std::all_of(buffer.as<uint8_t>(), buffer.as<uint8_t>() + buffer.bytes(),
                       [byte](uint8_t b) { return b == byte; });
  };
  EXPECT_TRUE(shape.kind != kernels::OpKind::kDispatch || all(gpu.out_topk_idx, 0xff));
  EXPECT_TRUE(all(gpu.expert_counts, 0));
}

}  // namespace expertd::device_test
