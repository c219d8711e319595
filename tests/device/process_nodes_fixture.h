// SPDX-License-Identifier: Apache-2.0
// Daemons as nodes, each with as many GPUs as it has ranks, and a client per rank. They share GPUs where there are
// fewer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tests/device/process_fixture.h"
#include "tests/support/daemon_cluster.h"

namespace expertd::device_test {

inline constexpr seconds kNodesStart(60);

class NodesTest : public ProcessTest {
 protected:
  /// `ranks_each`: GPUs of each daemon, and ranks.
  NodesTest(uint32_t ranks_each, uint32_t nodes)
      : ProcessTest(ranks_each, seconds(155)), ranks_each_(ranks_each), nodes_(nodes) {}

  void SetUp() override {
    ProcessTest::SetUp();
    if (IsSkipped()) {
      return;
    }
    cluster_ = std::make_unique<support::DaemonCluster>(nodes_, machine().host ? 2 : 0);
    cluster_->set_start_limit(kNodesStart);
    for (uint32_t node = 0; node < nodes_ && !machine().host; ++node) {
      std::string gpus;
      for (uint32_t i = 0; i < ranks_each_; ++i) {
        gpus += (i == 0 ? "" : ",") + std::to_string(gpu_of(node, i));
      }
      cluster_->add_flags(node, {"--device-gpus=" + gpus});
    }
    ASSERT_TRUE(cluster_->start());
    for (uint32_t rank = 0; rank < ranks_each_ * nodes_; ++rank) {
      clients_.push_back(make_client());
      const uint32_t node = rank / ranks_each_;
      ASSERT_TRUE(is_ok(expect_ok(*clients_.back(), "attach " + cluster_->node(node).attach_socket() + " " +
                                                        device(gpu_of(node, rank % ranks_each_)) + " rank" +
                                                        std::to_string(rank))));
      ASSERT_TRUE(is_ok(expect_ok(*clients_.back(), "memory malloc")));
    }
  }

  /// Devices of the host are each daemon's own.
  uint32_t gpu_of(uint32_t node, uint32_t index) const {
    const auto count = static_cast<uint32_t>(machine().uuids.size());
    return machine().host ? index : (node * ranks_each_ + index) % count;
  }
  FaultClient& client(uint32_t rank) { return *clients_[rank]; }
  std::vector<FaultClient*> some(const std::vector<uint32_t>& ranks) {
    std::vector<FaultClient*> found;
    for (const uint32_t rank : ranks) {
      found.push_back(clients_[rank].get());
    }
    return found;
  }
  std::vector<FaultClient*> all() {
    std::vector<FaultClient*> found;
    for (const auto& client : clients_) {
      found.push_back(client.get());
    }
    return found;
  }

  void join(const std::string& mode) {
    const std::string count = std::to_string(clients_.size());
    ASSERT_TRUE(all_ok(all(), "join nodes # " + count + " " + mode));
  }
  const uint32_t ranks_each_;
  const uint32_t nodes_;
  std::unique_ptr<support::DaemonCluster> cluster_;
  std::vector<std::unique_ptr<FaultClient>> clients_;
};

}  // namespace expertd::device_test
