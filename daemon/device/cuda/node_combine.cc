// SPDX-License-Identifier: Apache-2.0
// A combine over nodes: what this rank pulls from other nodes in windows of its tokens, and what it sums for them.
#include <algorithm>
#include <bit>
#include <cstring>

#include "daemon/device/cuda/node_chain.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::device::cuda {

namespace cu = kernels::cuda;

void CudaDevice::NodeChain::begin_pulls() {
  nodes_.head = {};
  const bool weights = nodes_.params.op.out.topk_weights != nullptr;
  nodes_.head.flags = weights && shape_.kind == kernels::OpKind::kCombine ? kernels::kMessageWeights : 0;
  nodes_.head.flags |= shape_.order_last_lane != 0 ? kernels::kMessageLastLane : 0;
  nodes_.sums_layout = kernels::sums_layout(shape_, nodes_.head);
  const uint64_t room = nodes_.message_bytes - sizeof(nodes_.head);
  uint64_t tokens = std::min<uint64_t>(cu::kMostPullTokens, room / nodes_.sums_layout.stride);
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    nodes_.layouts[node] = kernels::pulls_layout(shape_, nodes_.op.node_ranks(node));
    tokens = std::min<uint64_t>(tokens, room / nodes_.layouts[node].stride);
  }
  nodes_.window_tokens = static_cast<uint32_t>(std::max<uint64_t>(tokens, 1));
}

/// Opens the next window with a buffer for each node; false: there are none, or no window is free.
bool CudaDevice::NodeChain::open_window(Batch* batch, cu::PackPullsJob* job) {
  const auto end_of_windows = nodes_.windows.begin() + nodes_.window_count;
  const auto free = std::find_if(nodes_.windows.begin(), end_of_windows,
                                 [](const NodeWindow& window) { return window.stage == NodeWindow::Stage::kFree; });
  const uint32_t others = other_nodes();
  if (free == end_of_windows || job->windows + others > cu::kPullWindows) {
    return false;
  }
  const uint32_t before = batch->filled_count;
  const auto index = static_cast<uint32_t>(free - nodes_.windows.begin());
  const uint32_t begin = nodes_.packed_tokens;
  const uint32_t end = std::min(shape_.tokens, begin + nodes_.window_tokens);
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    if (!nodes_.op.exchanges_with(node)) {
      continue;
    }
    const engine::SendBuffer buffer = nodes_.op.fabric->take(part_.rank, nodes_.op.lane);
    if (buffer.data == nullptr) {
      for (; batch->filled_count != before; --batch->filled_count) {
        nodes_.op.fabric->drop(part_.rank, batch->filled[batch->filled_count - 1].buffer);
      }
      return false;
    }
    batch->filled[batch->filled_count++] = {
        .buffer = buffer, .node = node, .window = index, .last = end == shape_.tokens};
  }
  for (uint32_t i = before; i < batch->filled_count; ++i) {
    const NodeBatch::Filled& filled = batch->filled[i];
    cu::PackPullsJob::Window& window = job->window[job->windows++];
    window.node = filled.node;
    window.begin = begin;
    window.end = end;
    window.layout = nodes_.layouts[filled.node];
    window.entries = reinterpret_cast<char*>(message_entries(filled.buffer));
    window.packed = &nodes_.device_facts()->packed[index_of(*batch)][i];
  }
  *free = NodeWindow{.stage = NodeWindow::Stage::kPacking, .begin = begin, .end = end};
  nodes_.packed_tokens = end;
  nodes_.all_packed = end == shape_.tokens;
  batch->windows |= uint64_t{1} << index;
  return true;
}

bool CudaDevice::NodeChain::pack_pulls(bool* moved) {
  while (!nodes_.all_packed) {
    Batch* batch = take_batch(Batch::Kind::kPulls);
    if (batch == nullptr) {
      return true;
    }
    cu::PackPullsJob job;
    job.positions = nodes_.positions();
    while (!nodes_.all_packed && open_window(batch, &job)) {
    }
    if (batch->windows == 0) {
      give_back(batch);
      return true;
    }
    *moved = true;
    if ((job.windows != 0 && cu::launch_node_pack_pulls(nodes_.params, nodes_.table, job, stream_) != cudaSuccess) ||
        !put_tick(batch)) {
      return false;
    }
  }
  return true;
}

void CudaDevice::NodeChain::end_pulls(Batch* batch) {
  const bool runs = nodes_.stage == Stage::kMoving;
  const uint32_t* packed = nodes_.facts()->packed[index_of(*batch)];
  for (uint32_t i = 0; i < batch->filled_count; ++i) {
    const NodeBatch::Filled& filled = batch->filled[i];
    NodeWindow& window = nodes_.windows[filled.window];
    const uint32_t entries = std::min(packed[i], window.end - window.begin);
    if (!runs || (entries == 0 && !filled.last)) {
      nodes_.op.fabric->drop(part_.rank, filled.buffer);
      continue;
    }
    const uint32_t server = nodes_.op.server_at(filled.node, part_.rank);
    kernels::MessageHead head = nodes_.head;
    ++nodes_.messages[filled.node];
    head.last = filled.last ? nodes_.messages[filled.node] : 0;
    std::memcpy(filled.buffer.data, &head, sizeof(head));
    window.asked[filled.node] = entries;
    window.number[filled.node] = nodes_.messages[filled.node];
    window.waits |= entries != 0 && !spoiled(server) ? uint64_t{1} << filled.node : 0;
    send(filled.buffer, engine::MessageKind::kPulls, filled.node, entries, nodes_.op.place_bit(server),
         sizeof(head) + uint64_t{entries} * nodes_.layouts[filled.node].stride);
  }
  for (uint32_t i = 0; i < kNodeWindows; ++i) {
    if ((batch->windows >> i & 1) != 0) {
      nodes_.windows[i].stage = NodeWindow::Stage::kWaiting;
      nodes_.all_sent = nodes_.all_sent || nodes_.windows[i].end == shape_.tokens;
    }
  }
}

/// Puts a copy of the pulls into a place of their source, so that they hold no buffer of the fabric while they wait.
void CudaDevice::NodeChain::keep_pulls(const engine::Arrival& arrival) {
  const uint32_t rank = arrival.header.source_rank;
  NodeSource& source = nodes_.sources[rank];
  const uint32_t index = source.arrived % kNodeWindows;
  engine::Arrival copy = arrival;
  std::byte* place = nodes_.pulls_place(rank, index);
  std::memcpy(place, arrival.data, arrival.entries == nullptr ? arrival.bytes : engine::kMessageHeadBytes);
  copy.data = place;
  if (arrival.entries != nullptr) {
    Batch* batch = take_batch(Batch::Kind::kKept);  // receive() has seen that there is one
    batch->arrivals[batch->arrival_count++] = arrival;
    copy.entries = nodes_.pulls_entries(rank, index);
    driver_failed_ = driver_.cuMemcpyAsync(reinterpret_cast<CUdeviceptr>(copy.entries),
                                           reinterpret_cast<CUdeviceptr>(arrival.entries),
                                           arrival.bytes - engine::kMessageHeadBytes, stream_) != CUDA_SUCCESS ||
                     driver_failed_;
    driver_failed_ = !put_tick(batch) || driver_failed_;
  }
  ++source.arrived;
  ++source.waiting;
  nodes_.pulls_waiting[(nodes_.pulls_first + nodes_.pulls_count++) % nodes_.pulls_waiting.size()] = copy;
}

bool CudaDevice::NodeChain::take_pulls(const engine::Arrival& arrival, const kernels::MessageHead& head) {
  const uint32_t rank = arrival.header.source_rank;
  const uint32_t entries = arrival.header.entries;
  NodeSource& source = nodes_.sources[rank];
  const kernels::EntryLayout pulls = kernels::pulls_layout(shape_, nodes_.op.node_ranks(nodes_.op.placement->own_node));
  const uint64_t sums = sizeof(head) + uint64_t{entries} * kernels::sums_layout(shape_, head).stride;
  const bool good = combines() && nodes_.op.serves(rank) &&
                    (head.flags & ~(kernels::kMessageWeights | kernels::kMessageLastLane)) == 0 &&
                    arrival.bytes == sizeof(head) + uint64_t{entries} * pulls.stride &&
                    arrival.bytes <= nodes_.pulls_bytes && sums <= nodes_.message_bytes &&
                    source.waiting < kNodeWindows && (head.last == 0 || source.expected == 0) &&
                    (head.last != 0 || entries != 0);
  if (good) {
    source.expected = head.last != 0 ? head.last : source.expected;
    if (entries == 0) {
      ++source.served;
    } else {
      keep_pulls(arrival);
    }
  }
  if (!good || entries == 0 || arrival.entries == nullptr) {
    nodes_.inbox.release(arrival);
  }
  return good;
}

bool CudaDevice::NodeChain::serve_pulls(bool* moved) {
  while (nodes_.pulls_count != 0) {
    Batch* batch = take_batch(Batch::Kind::kServed);
    if (batch == nullptr) {
      return true;
    }
    cu::ServePullsJob job;
    job.pulls = kernels::pulls_layout(shape_, nodes_.op.node_ranks(nodes_.op.placement->own_node));
    job.totals = nodes_.totals();
    for (const uint32_t rank : nodes_.op.placement->ranks_of[nodes_.op.placement->own_node]) {
      job.local_ranks |= nodes_.op.takes_part(rank) ? 1U << rank : 0U;
      job.place_rank[nodes_.op.placement->index_of[rank]] = rank;
    }
    while (nodes_.pulls_count != 0 && job.messages < cu::kNodeMessages) {
      const engine::SendBuffer buffer = nodes_.op.fabric->take(part_.rank, nodes_.op.lane);
      if (buffer.data == nullptr) {
        break;
      }
      const engine::Arrival pulls = nodes_.pulls_waiting[nodes_.pulls_first];
      nodes_.pulls_first = (nodes_.pulls_first + 1) % static_cast<uint32_t>(nodes_.pulls_waiting.size());
      --nodes_.pulls_count;
      kernels::MessageHead head;
      std::memcpy(&head, pulls.data, sizeof(head));
      cu::ServePullsJob::Message& message = job.message[job.messages++];
      message.pulls = reinterpret_cast<const char*>(message_entries(pulls));
      message.count = pulls.header.entries;
      message.source = pulls.header.source_rank;
      message.flags = head.flags;
      message.layout = kernels::sums_layout(shape_, head);
      message.sums = reinterpret_cast<char*>(message_entries(buffer));
      batch->filled[batch->filled_count++] = {
          .buffer = buffer, .node = pulls.header.node, .pulls = pulls, .head = head};
    }
    if (job.messages == 0) {
      give_back(batch);
      return true;
    }
    *moved = true;
    if (cu::launch_node_serve_pulls(nodes_.params, nodes_.table, job, stream_) != cudaSuccess || !put_totals() ||
        !put_tick(batch)) {
      return false;
    }
  }
  return true;
}

void CudaDevice::NodeChain::end_served(Batch* batch) {
  for (uint32_t i = 0; i < batch->filled_count; ++i) {
    const NodeBatch::Filled& filled = batch->filled[i];
    const uint32_t rank = filled.pulls.header.source_rank;
    NodeSource& source = nodes_.sources[rank];
    --source.waiting;
    ++source.served;
    if (spoiled(rank) || nodes_.stage != Stage::kMoving) {
      nodes_.op.fabric->drop(part_.rank, filled.buffer);
      continue;
    }
    const kernels::MessageHead head{.flags = filled.head.flags & kernels::kMessageWeights,
                                    .last = filled.pulls.header.sequence + 1};
    std::memcpy(filled.buffer.data, &head, sizeof(head));
    send(filled.buffer, engine::MessageKind::kSums, filled.node, filled.pulls.header.entries, nodes_.op.place_bit(rank),
         sizeof(head) + uint64_t{filled.pulls.header.entries} * kernels::sums_layout(shape_, filled.head).stride);
  }
}

// The sums go into the device at once, so that they hold no buffer of the fabric while others are awaited.
bool CudaDevice::NodeChain::take_sums(const engine::Arrival& arrival, const kernels::MessageHead& head) {
  const uint32_t node = arrival.header.node;
  const uint64_t bytes = arrival.bytes - sizeof(head);
  const kernels::EntryLayout& layout = nodes_.sums_layout;
  NodeWindow* found = nullptr;
  if (combines() && nodes_.stage == Stage::kMoving && arrival.header.entries != 0 &&
      head.flags == (nodes_.head.flags & kernels::kMessageWeights) &&
      bytes == uint64_t{arrival.header.entries} * layout.stride) {
    for (NodeWindow& window : nodes_.windows) {
      const bool of_it = window.number[node] == head.last && window.asked[node] == arrival.header.entries;
      if (window.stage == NodeWindow::Stage::kWaiting && (window.waits >> node & 1) != 0 && of_it) {
        found = &window;
      }
    }
  }
  Batch* batch = found == nullptr ? nullptr : take_batch(Batch::Kind::kSums);
  if (batch == nullptr) {
    nodes_.inbox.release(arrival);
    return false;
  }
  const auto index = static_cast<uint32_t>(found - nodes_.windows.data());
  batch->arrivals[batch->arrival_count++] = arrival;
  found->waits &= ~(uint64_t{1} << node);
  found->here |= uint64_t{1} << node;
  driver_failed_ = driver_failed_ || driver_.cuMemcpyAsync(reinterpret_cast<CUdeviceptr>(nodes_.sums(index, node)),
                                                           reinterpret_cast<CUdeviceptr>(message_entries(arrival)),
                                                           bytes, stream_) != CUDA_SUCCESS;
  driver_failed_ = !put_tick(batch) || driver_failed_;
  return true;
}

bool CudaDevice::NodeChain::combine(bool* moved) {
  Batch* batch = nullptr;
  for (uint32_t i = 0; i < kNodeWindows; ++i) {
    NodeWindow& window = nodes_.windows[i];
    if (window.stage != NodeWindow::Stage::kWaiting || window.waits != 0) {
      continue;
    }
    if (batch == nullptr) {
      batch = take_batch(Batch::Kind::kCombined);
    }
    if (batch == nullptr) {
      return true;
    }
    cu::CombineNodesJob job;
    job.begin = window.begin;
    job.end = window.end;
    job.layout = nodes_.sums_layout;
    job.positions = nodes_.positions();
    job.totals = nodes_.totals();
    for (uint32_t node = 0; node < nodes_.nodes; ++node) {
      job.sums[node] = (window.here >> node & 1) != 0 ? nodes_.sums(i, node) : nullptr;
      job.server[node] = nodes_.op.exchanges_with(node) ? nodes_.op.server_at(node, part_.rank) : 0;
    }
    window.stage = NodeWindow::Stage::kCombining;
    batch->windows |= uint64_t{1} << i;
    if (cu::launch_node_combine(nodes_.params, nodes_.table, job, stream_) != cudaSuccess) {
      return false;
    }
  }
  if (batch == nullptr) {
    return true;
  }
  *moved = true;
  return put_totals() && put_tick(batch);
}

}  // namespace expertd::device::cuda
