// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/node_group.h"

#include <algorithm>
#include <string>

namespace expertd::device::cuda {
namespace {

constexpr uint64_t kAlign = 256;

uint64_t align_up(uint64_t value) {
  return (value + kAlign - 1) / kAlign * kAlign;
}

/// Bytes of the largest message of pulls that a rank sends for one window.
uint64_t most_pulls_bytes(const engine::GroupShape& shape, uint32_t node_ranks) {
  kernels::OpShape widest;
  widest.kind = kernels::OpKind::kLlCombine;  // weights travel, and a row number per lane
  widest.top_k = std::max(shape.top_k, node_ranks);
  return sizeof(kernels::MessageHead) +
         uint64_t{kernels::cuda::kMostPullTokens} * kernels::pulls_layout(widest, node_ranks).stride;
}

}  // namespace

NodeGroup::NodeGroup(const engine::GroupShape& shape, uint64_t bytes_of_message)
    : nodes(shape.placement->nodes()),
      ranks(shape.ranks),
      row_ints(kernels::count_row_ints(shape.ranks, shape.experts)),
      message_bytes(bytes_of_message),
      window_count(windows_of(shape, bytes_of_message, kNodeWindows)),
      inbox(shape.ranks, counts_message_bytes(shape.ranks, shape.experts)),
      outbox(shape.ranks),
      notices(shape.ranks),
      sources(shape.ranks),
      counts_ns(shape.ranks),
      pulls_waiting(size_t{shape.ranks} * kNodeWindows) {
  table.nodes = nodes;
  table.own_node = shape.placement->own_node;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    table.node_of[rank] = static_cast<uint8_t>(shape.placement->node_of[rank]);
    table.index_of[rank] = static_cast<uint8_t>(shape.placement->index_of[rank]);
  }
}

base::Result<std::unique_ptr<NodeGroup>> NodeGroup::create(const Reach& reach, Pool* pool,
                                                           const engine::GroupShape& shape) {
  if (shape.fabric == nullptr) {
    return base::Status(EXPERTD_REASON_INTERNAL, "a group over several nodes without a fabric");
  }
  auto group = std::make_unique<NodeGroup>(shape, shape.fabric->message_bytes());
  if (!group->inbox.ok()) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "the host has no memory for counts of other nodes");
  }
  group->totals_at = align_up((uint64_t{group->nodes} + 1) * sizeof(uint32_t));
  group->positions_at = align_up(group->totals_at + sizeof(kernels::cuda::NodeTotals));
  group->sums_at = align_up(group->positions_at + uint64_t{shape.max_tokens} * group->nodes * sizeof(int32_t));
  const uint32_t node_ranks = shape.placement->ranks_on(shape.placement->own_node);
  group->pulls_bytes = align_up(most_pulls_bytes(shape, node_ranks));
  group->pulls_entries_at =
      align_up(group->sums_at + uint64_t{group->window_count} * group->nodes * group->message_bytes);
  const uint64_t kept_pulls = shape.fabric->has_gpu_memory() ? uint64_t{shape.ranks} * kNodeWindows : 0;
  const uint64_t device_bytes = group->pulls_entries_at + kept_pulls * group->pulls_bytes;
  auto memory = VmmMemory::create(reach, device_bytes, pool);
  if (!memory.is_ok()) {
    return memory.status().with_context("memory for what other nodes send");
  }
  group->memory = std::move(memory).value();
  group->rows_at = align_up(sizeof(NodeFacts));
  group->pulls_at = align_up(group->rows_at + uint64_t{shape.ranks} * group->row_ints * sizeof(int32_t));
  const uint64_t pinned_bytes = group->pulls_at + uint64_t{shape.ranks} * kNodeWindows * group->pulls_bytes;
  auto pinned = PinnedMemory::create(*reach.driver, reach.home.context, pinned_bytes, reach.closer);
  if (!pinned.is_ok()) {
    return pinned.status().with_context("pinned memory for what other nodes send");
  }
  group->pinned = std::move(pinned).value();
  return group;
}

void NodeGroup::restart() {
  stage = Stage::kRouting;
  inbox.open(op.fabric, op.rank, op.number);
  outbox.open(&op);
  std::fill(sources.begin(), sources.end(), NodeSource{});
  counts_for = 0;
  for (uint32_t node = 0; node < nodes; ++node) {
    counts_for |= uint64_t{op.exchanges_with(node) ? 1U : 0U} << node;
  }
  counted = 0;
  spoiled = 0;
  bad_rank = -1;
  report = {};
  report.rank = -1;
  peer_reason = 0;
  exchanged = {};
  std::fill(counts_ns.begin(), counts_ns.end(), 0);
  packed_tokens = 0;
  moved_tokens = 0;
  all_packed = false;
  all_sent = false;
  messages.fill(0);
  windows.fill(NodeWindow{});
  rows_waiting_count = 0;
  pulls_first = 0;
  pulls_count = 0;
}

}  // namespace expertd::device::cuda
