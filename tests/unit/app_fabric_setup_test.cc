// SPDX-License-Identifier: Apache-2.0
// From the configuration to what groups take of the fabric.
#include "daemon/app/fabric_setup.h"

#include <gtest/gtest.h>

namespace expertd::app {
namespace {

config::FabricConfig defaults() {
  config::FabricConfig config;
  config.message_bytes = 256 * 1024;
  config.messages_per_peer = 4;
  return config;
}

fabric::GroupLink sized(uint32_t nodes, bool gpus, const config::FabricConfig& config = defaults()) {
  fabric::GroupLink link;
  size_messages(config, nodes, gpus, &link);
  return link;
}

uint64_t receive_bytes_per_node(const fabric::GroupLink& link) {
  return link.lanes * (link.receive_buffers * link.message_bytes + link.eager_messages * link.eager_bytes);
}

TEST(AppFabricSetup, FewNodesHaveAllBuffersAndManyShareThem) {
  EXPECT_EQ(sized(2, false).receive_buffers, 4U);
  EXPECT_EQ(sized(13, false).receive_buffers, 4U);
  EXPECT_EQ(sized(14, false).receive_buffers, 3U);
  EXPECT_EQ(sized(64, false).receive_buffers, 1U);
  for (uint32_t nodes = 2; nodes <= fabric::kMaxNodes; ++nodes) {
    const fabric::GroupLink link = sized(nodes, false);
    const uint64_t bytes = receive_bytes_per_node(link);
    EXPECT_GE(link.receive_buffers, 1U) << nodes;
    EXPECT_LE(bytes, nodes >= 26 ? 640 * 1024U : 2304 * 1024U) << nodes << " nodes";
    EXPECT_LE(bytes * (nodes - 1), 64 * 640 * 1024U) << nodes << " nodes";
  }
}

TEST(AppFabricSetup, TheConfiguredNumberIsTheMost) {
  config::FabricConfig config = defaults();
  config.messages_per_peer = 2;
  EXPECT_EQ(sized(2, false, config).receive_buffers, 2U);
  config.messages_per_peer = 64;
  EXPECT_EQ(sized(2, false, config).receive_buffers, 48U);
}

TEST(AppFabricSetup, MessagesOfGpusAreLargerAndBounded) {
  EXPECT_EQ(sized(2, true).message_bytes, 1024 * 1024U);
  EXPECT_EQ(sized(2, true).send_buffers, 8U);
  EXPECT_EQ(sized(16, true).send_buffers, 30U);
  config::FabricConfig config = defaults();
  config.message_bytes = fabric::kMaxMessageBytes;
  EXPECT_EQ(sized(2, true, config).message_bytes, fabric::kMaxMessageBytes);
  EXPECT_EQ(fabric_options(defaults(), "a", true).window_bytes,
            4 * fabric_options(defaults(), "a", false).window_bytes);
}

}  // namespace
}  // namespace expertd::app
