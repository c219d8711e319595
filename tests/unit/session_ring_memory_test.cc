// SPDX-License-Identifier: Apache-2.0
// The memory file of a ring as the daemon hands it out.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <unistd.h>

#include "daemon/session/ring_memory.h"

namespace expertd::session {
namespace {

TEST(RingMemory, IsSealedAgainstEveryChangeOfSize) {
  const auto ring = std::move(RingMemory::create(base::SessionId{1}, 2, 64)).value();
  EXPECT_EQ(::fcntl(ring->fd(), F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(::ftruncate(ring->fd(), 4096), 0);
  EXPECT_NE(::ftruncate(ring->fd(), static_cast<off_t>(ring->bytes()) * 2), 0);
}

TEST(RingMemory, FormatsTheHeaderAndLeavesTheRestZero) {
  const auto ring = std::move(RingMemory::create(base::SessionId{21}, 34, 16)).value();
  const expertd_ring_header& header = *ring->header();
  EXPECT_EQ(header.magic, EXPERTD_RING_MAGIC);
  EXPECT_EQ(header.abi_major, EXPERTD_ABI_MAJOR);
  EXPECT_EQ(header.slot_count, 16U);
  EXPECT_EQ(header.session_id, 21U);
  EXPECT_EQ(header.generation, 34U);
  EXPECT_EQ(header.slots_offset, 4096U);
  EXPECT_EQ(header.completions_offset, 4096U + 16 * 512);
  EXPECT_EQ(header.total_bytes, ring->bytes());
  EXPECT_EQ(header.submit_tail, 0U);
  EXPECT_EQ(header.session_flags, 0U);
  EXPECT_EQ(ring->completions()[15].seq, 0U);
}

}  // namespace
}  // namespace expertd::session
