// SPDX-License-Identifier: Apache-2.0
#include "tests/support/node_world.h"

#include <algorithm>

namespace expertd::test {

namespace host = kernels::host;

namespace {

constexpr uint32_t kHandle = 1;

uint64_t least_message_bytes(const support::RandomCase& random_case, const engine::Placement& placement) {
  kernels::OpShape shape = random_case.shape;
  uint64_t bytes = device::counts_message_bytes(shape.ranks, shape.experts);
  const kernels::MessageHead head{kernels::kMessageWeights, shape.side_elements, shape.side_element_bytes, 0};
  for (const std::vector<uint32_t>& node : placement.ranks_of) {
    const auto ranks = static_cast<uint32_t>(node.size());
    bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::rows_layout(shape, head, ranks).stride);
    bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::pulls_layout(shape, ranks).stride);
    bytes = std::max<uint64_t>(bytes, sizeof(head) + kernels::sums_layout(shape, head).stride);
  }
  return bytes;
}

}  // namespace

std::vector<engine::Placement> random_placements(support::Random* random, uint32_t ranks, uint32_t nodes) {
  std::vector<uint32_t> node_of(ranks);
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    node_of[rank] = rank < nodes ? rank : random->below(nodes);
  }
  for (uint32_t rank = ranks; random->chance(70) && rank-- > 1;) {
    std::swap(node_of[rank], node_of[random->below(rank + 1)]);
  }
  std::vector<int32_t> number_of(nodes, -1);  // nodes are numbered in the order of their lowest rank
  engine::Placement placement;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    int32_t& number = number_of[node_of[rank]];
    if (number < 0) {
      number = static_cast<int32_t>(placement.ranks_of.size());
      placement.ranks_of.emplace_back();
    }
    std::vector<uint32_t>& own = placement.ranks_of[static_cast<uint32_t>(number)];
    placement.node_of.push_back(static_cast<uint32_t>(number));
    placement.index_of.push_back(static_cast<uint32_t>(own.size()));
    own.push_back(rank);
  }
  std::vector<engine::Placement> placements(nodes, placement);
  for (uint32_t node = 0; node < nodes; ++node) {
    placements[node].own_node = node;
  }
  return placements;
}

NodeWorld::NodeWorld(const support::RandomCase& random_case, uint32_t nodes, uint64_t seed)
    : random_(seed), wakes_(nodes), awake_(random_case.shape.ranks) {
  const kernels::OpShape& shape = random_case.shape;
  auto placements = random_placements(&random_, shape.ranks, nodes);
  FakeNetworkSettings settings;
  const uint64_t least = least_message_bytes(random_case, placements[0]);
  settings.message_bytes = least + random_.below(static_cast<uint32_t>(least) * 3);
  settings.send_buffers = random_.between(1, 3);
  settings.receive_buffers = random_.between(1, 3);
  network = std::make_unique<FakeNetwork>(settings, std::move(placements), &random_);
  network->stirred = [this](uint32_t /*node*/, uint32_t rank) { awake_[rank] = true; };
  shape_.id = base::GroupId{7};
  shape_.ranks = shape.ranks;
  shape_.experts = shape.experts;
  shape_.hidden = shape.hidden;
  shape_.top_k = shape.top_k;
  shape_.max_tokens = shape.max_tokens;
  for (uint32_t node = 0; node < nodes; ++node) {
    directories_.push_back(std::make_unique<device::HostGroupDirectory>());
    wakes_[node].world = this;
    wakes_[node].node = node;
  }
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    const base::DeviceIndex index{placement().index_of[rank]};
    devices_.push_back(std::make_unique<device::HostDevice>(
        index, index.value, directories_[placement().node_of[rank]].get(), &wakes_[placement().node_of[rank]], 0));
    engine::GroupShape own = shape_;
    own.rank = rank;
    if (!devices_.back()->create_group(own, 4).is_ok()) {
      std::abort();
    }
  }
}

void NodeWorld::give(RankOp* op, uint32_t tensor, const void* data) {
  if (data == nullptr) {
    return;
  }
  op->mappings.emplace_back();
  op->mappings.back().base.fill(const_cast<void*>(data));
  op->request.tensors[tensor] = {&op->mappings.back(), 0};
}

void NodeWorld::fill_request(const kernels::OpParams& params, RankOp* op) {
  op->request.shape = params.shape;
  give(op, EXPERTD_IN_X, params.in.x);
  give(op, EXPERTD_IN_TOPK_IDX, params.in.topk_idx);
  give(op, EXPERTD_IN_TOPK_WEIGHTS, params.in.topk_weights);
  give(op, EXPERTD_IN_SIDE, params.in.side);
  give(op, EXPERTD_IN_BIAS0, params.in.bias0);
  give(op, EXPERTD_IN_BIAS1, params.in.bias1);
  give(op, EXPERTD_IN_TOKEN_RANK_MASK, params.in.token_rank_mask);
  give(op, EXPERTD_OUT_X, params.out.x);
  give(op, EXPERTD_OUT_SIDE, params.out.side);
  give(op, EXPERTD_OUT_TOPK_IDX, params.out.topk_idx);
  give(op, EXPERTD_OUT_TOPK_WEIGHTS, params.out.topk_weights);
  give(op, EXPERTD_OUT_EXPERT_COUNTS, params.out.expert_counts);
  give(op, EXPERTD_OUT_RANK_PREFIX, params.out.rank_prefix);
  give(op, EXPERTD_OUT_SRC_INFO, params.out.src_info);
  give(op, EXPERTD_OUT_LAYOUT_RANGE, params.out.layout_range);
  give(op, EXPERTD_OUT_STATS, params.out.stats);
}

bool NodeWorld::launch(Op* op, uint32_t rank) {
  const uint32_t node = placement().node_of[rank];
  engine::LaunchSpec spec;
  spec.own = &op->ranks[rank].request;
  spec.group = shape_.id;
  spec.group_op = op->number;
  spec.ranks = shape_.ranks;
  spec.rank = rank;
  spec.active_ranks = active_of ? active_of(rank) : op->active;
  spec.epoch = kView;
  spec.page = static_cast<uint32_t>(op->number % engine::kExchangePages);
  spec.flags = &op->flags[node];
  spec.placement = &network->placement(node);
  spec.fabric = network->port(node);
  for (const uint32_t local : placement().ranks_of[node]) {
    const uint32_t place = spec.place_of(local);
    spec.devices[place] = base::DeviceIndex{place};
    spec.requests[place] = op->active.contains(local) ? &op->ranks[local].request : nullptr;
  }
  return devices_[rank]->launch(spec, {}, &op->ranks[rank].part);
}

void NodeWorld::start(const support::RandomCase& random_case, const NodeOpSettings& settings,
                      const std::vector<uint32_t>* in_rows, support::GroupMemory* memory) {
  if (finished_) {
    running_.clear();
    finished_ = false;
  }
  Op& op = running_.emplace_back();
  op.number = ++number_;
  op.active = random_case.shape.active_ranks;
  op.memory = memory;
  op.flags.resize(wakes_.size());
  for (engine::ExchangeFlags& flags : op.flags) {
    flags.size_for(shape_.ranks);
  }
  op.ranks.resize(shape_.ranks);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    engine::Request& request = op.ranks[rank].request;
    fill_request(memory->params[rank], &op.ranks[rank]);
    op.ranks[rank].ended = !op.active.contains(rank);
    request.session = base::SessionId{rank + 1};
    request.handle_index = kHandle;
    request.handle_generation = settings.generation;
    request.with_weights = settings.with_weights;
    request.traffic = settings.low_latency ? engine::Traffic::kLatency : engine::Traffic::kThroughput;
    if (in_rows != nullptr) {
      request.shape.capacity_rows = (*in_rows)[rank];
    }
    if (change) {
      change(rank, &request);
    }
  }
}

// Each rank launches its part of the next operation when it comes to it, in order.
bool NodeWorld::launch_next(uint32_t rank) {
  for (Op& op : running_) {
    if (!op.ranks[rank].ended && op.ranks[rank].part == 0) {
      return launch(&op, rank);
    }
  }
  return false;
}

void NodeWorld::poll(uint32_t rank) {
  for (Op& op : running_) {
    RankOp& own = op.ranks[rank];
    if (own.part != 0 && !own.ended) {
      own.ended = devices_[rank]->poll(own.part, &own.outcome);
    }
  }
}

// A rank is polled only when its device says that it may advance, or something woke its loop: a part that should have
// said so and did not is found as one that does not end.
std::vector<uint32_t> NodeWorld::ready_ranks() const {
  std::vector<uint32_t> ready;
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    const auto left = [rank](const Op& op) { return !op.ranks[rank].ended; };
    const auto unlaunched = [rank](const Op& op) { return !op.ranks[rank].ended && op.ranks[rank].part == 0; };
    const bool stirs = awake_[rank] || devices_[rank]->busy();
    if (std::any_of(running_.begin(), running_.end(), unlaunched) ||
        (stirs && std::any_of(running_.begin(), running_.end(), left))) {
      ready.push_back(rank);
    }
  }
  return ready;
}

std::string NodeWorld::finish() {
  awake_.assign(shape_.ranks, false);
  for (bool stirs = true; stirs;) {
    const std::vector<uint32_t> ready = ready_ranks();
    stirs = (ready.empty() || random_.chance(40)) && network->deliver();
    if (ready.empty()) {
      continue;
    }
    stirs = true;
    const uint32_t rank = ready[random_.below(static_cast<uint32_t>(ready.size()))];
    if ((random_.chance(50) || !(awake_[rank] || devices_[rank]->busy())) && launch_next(rank)) {
      continue;
    }
    awake_[rank] = false;
    poll(rank);
  }
  finished_ = true;
  const std::string stuck = abort_rest();
  for (Op& op : running_) {
    for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
      op.memory->reports[rank] = op.ranks[rank].outcome.report;
    }
  }
  return stuck;
}

std::string NodeWorld::abort_rest() {
  std::string stuck;
  aborted = {};
  missed.assign(shape_.ranks, {0, {}});
  for (Op& op : running_) {
    for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
      RankOp& own = op.ranks[rank];
      if (own.ended) {
        continue;
      }
      base::RankSet missing;
      const uint32_t what = devices_[rank]->missing(own.part, &missing);
      stuck += " in operation " + std::to_string(op.number) + " rank " + std::to_string(rank) + " misses " +
               std::to_string(what) + " of rank " + std::to_string(missing.lowest()) + " and others";
      missed[rank] = {what, missing};
      aborted.add(rank);
      devices_[rank]->abort(own.part, EXPERTD_REASON_TIMEOUT);
      while (!devices_[rank]->poll(own.part, &own.outcome)) {
      }
    }
  }
  return stuck.empty() ? stuck : "did not end:" + stuck;
}

}  // namespace expertd::test
