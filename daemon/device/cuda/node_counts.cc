// SPDX-License-Identifier: Apache-2.0
// What ranks of other nodes agree to and count, and what follows from it.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/node_chain.h"
#include "daemon/kernels/host/tables.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::device::cuda {

namespace {

CUdeviceptr address_of(const void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

}  // namespace

// Every rank of a node has a matrix of its own, so all of them are told.
bool CudaDevice::NodeChain::send_counts() {
  bool moved = false;
  for (uint32_t node = 0; nodes_.counts_for != 0 && node < nodes_.nodes; ++node) {
    if ((nodes_.counts_for >> node & 1) == 0) {
      continue;
    }
    const engine::SendBuffer buffer = nodes_.op.fabric->take(part_.rank, nodes_.op.lane);
    if (buffer.data == nullptr) {
      break;
    }
    const NodeNotice& notice = nodes_.notices[part_.rank];
    const uint64_t bytes = uint64_t{notice.row_ints} * sizeof(int32_t);
    std::memcpy(buffer.data, &notice, sizeof(notice));
    std::memcpy(buffer.data + sizeof(notice), nodes_.row(part_.rank) + nodes_.row_ints - notice.row_ints, bytes);
    send(buffer, engine::MessageKind::kCounts, node, 1, places_of(node), sizeof(notice) + bytes);
    nodes_.counts_for &= ~(uint64_t{1} << node);
    moved = true;
  }
  return moved;
}

bool CudaDevice::NodeChain::take_counts(const engine::Arrival& arrival) {
  const uint32_t source = arrival.header.source_rank;
  if ((nodes_.counted >> source & 1) != 0) {
    return false;
  }
  NodeNotice& notice = nodes_.notices[source];
  const uint32_t counts = nodes_.row_ints - kernels::kCountRowErrorInts;
  int32_t* row = nodes_.row(source);
  bool good = arrival.bytes >= sizeof(notice);
  if (good) {
    std::memcpy(&notice, arrival.data, sizeof(notice));
    good = (notice.row_ints == nodes_.row_ints || notice.row_ints == kernels::kCountRowErrorInts) &&
           arrival.bytes == sizeof(notice) + uint64_t{notice.row_ints} * sizeof(int32_t);
  }
  std::fill_n(row, nodes_.row_ints, 0);
  if (good) {
    std::memcpy(row + nodes_.row_ints - notice.row_ints, arrival.data + sizeof(notice), arrival.bytes - sizeof(notice));
    const int64_t most = int64_t{base::kMaxTokens} * base::kMaxTopK;  // as on host devices
    good = std::all_of(row, row + counts, [most](int32_t rows) { return rows >= 0 && rows <= most; });
  }
  if (!good) {  // then all ranks of this node end as if the source had been refused
    std::fill_n(row, nodes_.row_ints, 0);
    notice = nodes_.notices[part_.rank];
    notice.reason = EXPERTD_REASON_INTERNAL;
  }
  nodes_.counted |= uint64_t{1} << source;
  nodes_.counts_ns[source] = arrival.arrived_ns;
  return good;
}

/// What another rank of this node has for operations in this order; null when it is not there.
const NodeGroup* CudaDevice::NodeChain::local_peer(uint32_t rank) const {
  const GroupEntry* peer = device_.find_peer(nodes_.spec, rank);
  if (peer == nullptr || nodes_.lane == 0) {
    return peer == nullptr ? nullptr : peer->nodes.get();
  }
  const NodeLane* lane = peer->node_lanes[nodes_.lane - 1].get();
  return lane == nullptr ? nullptr : lane->nodes.get();
}

uint64_t CudaDevice::NodeChain::missing_counts() const {
  uint64_t missing = 0;
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    if (!nodes_.op.takes_part(rank) || rank == part_.rank) {
      continue;
    }
    bool there = (nodes_.counted >> rank & 1) != 0;
    if (nodes_.op.placement->is_local(rank)) {
      const NodeGroup* peer = local_peer(rank);
      there = peer != nullptr && load_word(peer->facts()->progress.routed) >= part_.group_op;
    }
    missing |= uint64_t{there ? 0U : 1U} << rank;
  }
  return missing;
}

void CudaDevice::NodeChain::see_peers() {
  const uint64_t missing = missing_counts();
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    if ((missing >> rank & 1) == 0 && nodes_.counts_ns[rank] == 0) {
      nodes_.counts_ns[rank] = base::now_ns();
    }
  }
}

bool CudaDevice::NodeChain::counts_are_there() const {
  return nodes_.counts_for == 0 && missing_counts() == 0;
}

/// For whom this rank waited. The words of this node's other ranks have no times: theirs is when they were seen.
void CudaDevice::NodeChain::note_last() {
  const uint64_t own_ns = nodes_.counts_ns[part_.rank];
  uint64_t last_ns = own_ns;
  nodes_.exchanged.last_rank = static_cast<int32_t>(part_.rank);
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    if (nodes_.op.takes_part(rank) && nodes_.counts_ns[rank] > last_ns) {
      last_ns = nodes_.counts_ns[rank];
      nodes_.exchanged.last_rank = static_cast<int32_t>(rank);
    }
  }
  nodes_.exchanged.waited_ns = last_ns - own_ns;
}

/// Rows for other nodes, as far as the host knows their number.
void CudaDevice::NodeChain::note_bytes() {
  const int32_t* row = nodes_.row(part_.rank);
  uint64_t rows = 0;
  for (uint32_t rank = 0; routes() && rank < nodes_.ranks; ++rank) {
    const bool by_expert = kernels::host::rows_by_expert(shape_);
    for (uint32_t local = 0; nodes_.op.is_elsewhere(rank) && local < (by_expert ? shape_.local_experts : 1); ++local) {
      rows += static_cast<uint32_t>(by_expert ? row[shape_.ranks + rank * shape_.local_experts + local] : row[rank]);
    }
  }
  nodes_.exchanged.fabric_bytes = rows * kernels::host::landed_row_bytes(shape_);
}

// All ranks of all nodes have the same notices before them.
bool CudaDevice::NodeChain::decide() {
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    if (nodes_.op.is_elsewhere(rank)) {
      kernels::PeerView& view = nodes_.params.peers.views[rank];
      view.capacity_rows = nodes_.notices[rank].capacity_rows;
      view.in_rows = nodes_.notices[rank].capacity_rows;
    }
  }
  kernels::OpShape shape = shape_;
  shape.rank = part_.rank;
  return notices_agree(nodes_.notices, shape, {&nodes_.report, &nodes_.peer_reason}) &&
         (nodes_.capture_number == 0 || replays_agree());
}

/// Whether all ranks replay the same captured operation. A notice without a Reason says in its value which it is.
bool CudaDevice::NodeChain::replays_agree() {
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    uint64_t replayed = nodes_.capture_number;
    if (nodes_.op.is_elsewhere(rank)) {
      replayed = static_cast<uint64_t>(nodes_.notices[rank].value);
    } else if (nodes_.op.takes_part(rank) && rank != part_.rank) {
      // Written before the rank's routed flag, which has been seen.
      replayed = local_peer(rank)->replays[part_.group_op % 2].load(std::memory_order_acquire);
    }
    if (replayed != nodes_.capture_number) {
      nodes_.report.reason = EXPERTD_REASON_OP_MISMATCH;
      nodes_.report.rank = static_cast<int32_t>(rank);
      return false;
    }
  }
  return true;
}

/// The rows that came over the fabric stand beside those that this node's ranks wrote.
bool CudaDevice::NodeChain::put_rows() {
  const uint64_t bytes = uint64_t{nodes_.row_ints} * sizeof(int32_t);
  for (uint32_t rank = 0; routes() && rank < nodes_.ranks; ++rank) {
    if (nodes_.op.is_elsewhere(rank) &&
        driver_.cuMemcpyAsync(address_of(nodes_.params.op.counts + uint64_t{rank} * nodes_.row_ints),
                              address_of(nodes_.row(rank)), bytes, stream_) != CUDA_SUCCESS) {
      return false;
    }
  }
  return true;
}

}  // namespace expertd::device::cuda
