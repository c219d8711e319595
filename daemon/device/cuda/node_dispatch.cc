// SPDX-License-Identifier: Apache-2.0
// Rows of a dispatch: those that leave for other nodes, and those that come from there.
#include <algorithm>
#include <cstring>

#include "daemon/device/cuda/node_chain.h"

namespace expertd::device::cuda {

namespace {

namespace cu = kernels::cuda;

/// A side that this rank takes is of the shape that all ranks agreed on.
bool head_fits(const kernels::OpParams& own, const kernels::MessageHead& head) {
  const kernels::OpShape& shape = own.shape;
  if ((head.flags & ~kernels::kMessageFlags) != 0 || head.side_elements > base::kMaxHidden ||
      head.side_element_bytes > 4) {
    return false;
  }
  const bool same = head.side_elements == shape.side_elements && head.side_element_bytes == shape.side_element_bytes;
  return shape.payload == kernels::Payload::kFp8 || own.out.side == nullptr || same ||
         uint64_t{head.side_elements} * head.side_element_bytes == 0;
}

}  // namespace

uint32_t CudaDevice::NodeChain::other_nodes() const {
  uint32_t count = 0;
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    count += nodes_.op.exchanges_with(node) ? 1 : 0;
  }
  return count;
}

void CudaDevice::NodeChain::begin_rows() {
  const kernels::OpInputs& in = nodes_.params.op.in;
  nodes_.head = {};
  if (shape_.cached == 0 && in.topk_weights != nullptr) {
    nodes_.head.flags = kernels::kMessageWeights;
  }
  nodes_.head.flags |= shape_.zero_foreign_weights != 0 ? kernels::kMessageZeroForeign : 0;
  if (shape_.payload != kernels::Payload::kFp8 && in.side != nullptr) {
    nodes_.head.side_elements = shape_.side_elements;
    nodes_.head.side_element_bytes = shape_.side_element_bytes;
  }
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    nodes_.layouts[node] = kernels::rows_layout(shape_, nodes_.head, nodes_.op.node_ranks(node));
  }
}

// Rows may come before this rank knows that the operation runs: their source knows it, and all decide alike.
bool CudaDevice::NodeChain::take_rows(const engine::Arrival& arrival, const kernels::MessageHead& head) {
  NodeSource& source = nodes_.sources[arrival.header.source_rank];
  const uint32_t entries = arrival.header.entries;
  bool good = dispatches() && head_fits(nodes_.params.op, head);
  if (good) {
    const kernels::EntryLayout layout =
        kernels::rows_layout(shape_, head, nodes_.op.node_ranks(nodes_.op.placement->own_node));
    good =
        arrival.bytes == sizeof(head) + uint64_t{entries} * layout.stride && (head.last == 0 || source.expected == 0);
  }
  if (good) {
    ++source.arrived;
    source.expected = head.last != 0 ? head.last : source.expected;
    good = source.expected == 0 || source.arrived <= source.expected;
  }
  if (!good || entries == 0) {
    nodes_.inbox.release(arrival);
    return good;
  }
  nodes_.rows_waiting[nodes_.rows_waiting_count++] = arrival;
  return true;
}

bool CudaDevice::NodeChain::spread_rows(bool* moved) {
  uint32_t taken = 0;
  while (taken < nodes_.rows_waiting_count) {
    Batch* batch = take_batch(Batch::Kind::kSpread);
    if (batch == nullptr) {
      break;
    }
    cu::SpreadRowsJob job;
    job.totals = nodes_.totals();
    for (; taken < nodes_.rows_waiting_count && job.messages < cu::kNodeMessages; ++taken) {
      const engine::Arrival& arrival = nodes_.rows_waiting[taken];
      cu::SpreadRowsJob::Message& message = job.message[job.messages++];
      std::memcpy(&message.head, arrival.data, sizeof(message.head));
      message.entries = reinterpret_cast<const char*>(message_entries(arrival));
      message.count = arrival.header.entries;
      message.source = arrival.header.source_rank;
      message.layout = kernels::rows_layout(shape_, message.head, nodes_.op.node_ranks(nodes_.op.placement->own_node));
      batch->arrivals[batch->arrival_count++] = arrival;
    }
    *moved = true;
    if (cu::launch_node_spread_rows(nodes_.params, nodes_.table, job, stream_) != cudaSuccess || !put_totals() ||
        !put_tick(batch)) {
      return false;
    }
  }
  std::copy(nodes_.rows_waiting.begin() + taken, nodes_.rows_waiting.begin() + nodes_.rows_waiting_count,
            nodes_.rows_waiting.begin());
  nodes_.rows_waiting_count -= taken;
  return true;
}

/// Takes buffers for up to `tokens` tokens, of each node as many, and says for how many they are; a node without any:
/// none, and everything has been given back.
uint32_t CudaDevice::NodeChain::take_row_buffers(Batch* batch, uint32_t tokens) {
  const uint32_t others = other_nodes();
  const uint32_t most = others == 0 ? 0 : cu::kPackBuffers / others;
  std::array<std::array<engine::SendBuffer, cu::kPackBuffers>, cu::kMaxGpuNodes> taken;
  uint32_t rounds = 0;
  uint32_t covered = others == 0 ? tokens : 0;
  bool empty = false;
  std::array<uint32_t, cu::kMaxGpuNodes> counts{};
  for (; rounds < most && !empty && (covered < tokens || rounds == 0); ++rounds) {
    covered = tokens;
    for (uint32_t node = 0; node < nodes_.nodes; ++node) {
      if (!nodes_.op.exchanges_with(node)) {
        continue;
      }
      const uint64_t per = (nodes_.message_bytes - sizeof(kernels::MessageHead)) / nodes_.layouts[node].stride;
      batch->per_message[node] = static_cast<uint32_t>(per);
      if (!empty && (counts[node] == 0 || counts[node] * per < tokens)) {
        const engine::SendBuffer buffer = nodes_.op.fabric->take(part_.rank, nodes_.op.lane);
        empty = buffer.data == nullptr;
        if (!empty) {
          taken[node][counts[node]++] = buffer;
        }
      }
      covered = static_cast<uint32_t>(std::min<uint64_t>(covered, counts[node] * per));
    }
  }
  bool all = true;
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    all = all && (counts[node] != 0 || !nodes_.op.exchanges_with(node));
  }
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    const uint32_t per = std::max(batch->per_message[node], 1U);
    const uint32_t needed = std::max((covered + per - 1) / per, 1U);
    for (uint32_t i = 0; i < counts[node]; ++i) {
      if (all && i < needed) {
        batch->filled[batch->filled_count++] = {.buffer = taken[node][i], .node = node};
      } else {
        nodes_.op.fabric->drop(part_.rank, taken[node][i]);
      }
    }
  }
  return all ? covered : 0;
}

void CudaDevice::NodeChain::fill_job(const Batch& batch, cu::PackRowsJob* job) const {
  job->head = nodes_.head;
  for (uint32_t i = batch.filled_count; i-- != 0;) {
    job->first_buffer[batch.filled[i].node] = i;
    job->buffers[i] = reinterpret_cast<char*>(message_entries(batch.filled[i].buffer));
  }
  for (uint32_t node = 0; node < nodes_.nodes; ++node) {
    job->layout[node] = nodes_.layouts[node];
    job->per_message[node] = batch.per_message[node];
  }
  job->packed = nodes_.device_facts()->packed[index_of(batch)];
  job->counters = nodes_.counters();
}

bool CudaDevice::NodeChain::pack_rows(bool* moved) {
  while (!nodes_.all_packed) {
    Batch* batch = take_batch(Batch::Kind::kRows);
    if (batch == nullptr) {
      return true;
    }
    const uint32_t left = shape_.tokens - nodes_.packed_tokens;
    const uint32_t tokens = take_row_buffers(batch, left);
    if (batch->filled_count == 0 && other_nodes() != 0) {
      give_back(batch);
      return true;
    }
    cu::PackRowsJob job;
    job.begin = nodes_.packed_tokens;
    job.end = nodes_.packed_tokens + tokens;
    fill_job(*batch, &job);
    nodes_.packed_tokens = job.end;
    nodes_.all_packed = job.end == shape_.tokens;
    batch->last = nodes_.all_packed;
    *moved = true;
    if (cu::launch_node_pack_rows(nodes_.params, nodes_.table, job, stream_) != cudaSuccess || !put_tick(batch)) {
      return false;
    }
  }
  return true;
}

// Everything of a launch goes to its nodes; the last message to each says how many there were.
void CudaDevice::NodeChain::end_rows(Batch* batch) {
  const bool runs = nodes_.facts()->plan_reason == 0 && nodes_.stage == Stage::kMoving;
  const uint32_t* packed = nodes_.facts()->packed[index_of(*batch)];
  uint32_t place = 0;  // of the buffer among those of its node
  for (uint32_t i = 0; i < batch->filled_count; ++i) {
    const NodeBatch::Filled& filled = batch->filled[i];
    const uint32_t node = filled.node;
    place = i != 0 && batch->filled[i - 1].node == node ? place + 1 : 0;
    const uint32_t per = batch->per_message[node];
    const uint32_t begin = std::min(packed[node], place * per);
    const uint32_t entries = std::min(packed[node] - begin, per);
    const bool ends = batch->last && packed[node] <= (place + 1) * per && (entries != 0 || place == 0);
    if (!runs || (entries == 0 && !ends)) {
      nodes_.op.fabric->drop(part_.rank, filled.buffer);
      continue;
    }
    ++nodes_.messages[node];
    kernels::MessageHead head = nodes_.head;
    head.last = ends ? nodes_.messages[node] : 0;
    std::memcpy(filled.buffer.data, &head, sizeof(head));
    send(filled.buffer, engine::MessageKind::kRows, node, entries, places_of(node),
         sizeof(head) + uint64_t{entries} * nodes_.layouts[node].stride);
  }
  nodes_.all_sent = nodes_.all_sent || batch->last || !runs;
}

}  // namespace expertd::device::cuda
