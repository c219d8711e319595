// SPDX-License-Identifier: Apache-2.0
// Nodes, configurations and answers for tests of the rendezvous. One thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/group/rendezvous.h"

namespace expertd::group {

inline session::GroupConfig config_of(uint32_t ranks) {
  session::GroupConfig config;
  config.expert_parallel_size = ranks;
  config.num_experts = ranks * 4;
  config.hidden = 512;
  config.top_k = 4;
  config.max_tokens = 64;
  config.mode = session::GroupMode::kAuto;
  config.on_rank_loss = session::OnRankLoss::kFail;
  return config;
}

inline NodeIdentity node_of(uint64_t id, const std::string& name = {}) {
  return {id, name.empty() ? "n" + std::to_string(id) : name, "", {{0, "lane of " + std::to_string(id)}}};
}

struct Answer {
  int count = 0;
  session::ErrorDetail error;
  std::shared_ptr<const Placed> placed;

  base::Reason reason() const { return error.status.reason(); }
  std::string text() const { return error.status.message(); }
};

}  // namespace expertd::group
