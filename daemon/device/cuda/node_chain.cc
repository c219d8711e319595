// SPDX-License-Identifier: Apache-2.0
// What every operation over several nodes has: counts, the decision, launches and their ends.
#include "daemon/device/cuda/node_chain.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/host/tables.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::device::cuda {

namespace {

using kernels::OpKind;
using kernels::cuda::NodeTotals;

constexpr uint32_t kTurnArrivals = 64;

CUdeviceptr address_of(const void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

}  // namespace

bool CudaDevice::NodeChain::dispatches() const {
  return shape_.kind == OpKind::kDispatch || shape_.kind == OpKind::kLlDispatch;
}

bool CudaDevice::NodeChain::combines() const {
  return shape_.kind == OpKind::kCombine || shape_.kind == OpKind::kLlCombine;
}

bool CudaDevice::NodeChain::begin() {
  using namespace kernels::cuda;
  const uint64_t cleared = nodes_.totals_at + sizeof(NodeTotals);
  nodes_.facts()->plan_reason = 0;
  nodes_.facts()->totals = {};
  if ((part_.waits_doorbell && !device_.enqueue_doorbell(part_, nodes_.params)) ||
      driver_.cuMemsetD8Async(nodes_.memory->address(), 0, cleared, stream_) != CUDA_SUCCESS) {
    return false;
  }
  if (routes()) {
    const CUdeviceptr row = address_of(nodes_.params.op.counts + uint64_t{part_.rank} * nodes_.row_ints);
    if (launch_route_count(nodes_.params, stream_) != cudaSuccess ||
        launch_route_scan(nodes_.params, stream_) != cudaSuccess ||
        driver_.cuMemcpyAsync(address_of(nodes_.row(part_.rank)), row, nodes_.row_ints * sizeof(int32_t), stream_) !=
            CUDA_SUCCESS) {
      return false;
    }
  }
  return launch_signal(nodes_.params, SignalStep::kRouted, stream_) == cudaSuccess &&
         (!routes() || launch_route_number(nodes_.params, stream_) == cudaSuccess);
}

bool CudaDevice::NodeChain::turn(bool* moved) {
  *moved |= retire();
  *moved |= receive();
  if (nodes_.stage == Stage::kRouting && load_word(nodes_.facts()->progress.routed) >= part_.group_op) {
    nodes_.stage = Stage::kCounting;
    nodes_.counts_ns[part_.rank] = base::now_ns();
    *moved = true;
  }
  if (nodes_.stage == Stage::kCounting) {
    *moved |= send_counts();
    see_peers();
    if (!counts_are_there()) {
      return spread_rows(moved);
    }
    *moved = true;
    note_last();
    note_bytes();
    if (!decide()) {
      nodes_.stage = Stage::kClosed;
      return true;
    }
    if (shape_.kind == OpKind::kBarrier) {
      return end();
    }
    if (!begin_moving()) {
      return false;
    }
    nodes_.stage = Stage::kMoving;
  }
  if (nodes_.stage != Stage::kMoving) {
    return spread_rows(moved);
  }
  if (driver_failed_) {
    return false;
  }
  const bool went_on =
      dispatches() ? pack_rows(moved) && spread_rows(moved) : pack_pulls(moved) && serve_pulls(moved) && combine(moved);
  return went_on && (!is_complete() || end());
}

void CudaDevice::NodeChain::spoil(uint32_t rank) {
  nodes_.bad_rank = nodes_.bad_rank < 0 ? static_cast<int32_t>(rank) : nodes_.bad_rank;
  nodes_.spoiled |= uint64_t{1} << rank;
  const uint64_t node = uint64_t{1} << nodes_.op.placement->node_of[rank];
  for (NodeWindow& window : nodes_.windows) {
    window.waits &= ~node;
  }
}

uint64_t CudaDevice::NodeChain::places_of(uint32_t node) const {
  uint64_t places = 0;
  for (const uint32_t rank : nodes_.op.placement->ranks_of[node]) {
    places |= nodes_.op.takes_part(rank) ? nodes_.op.place_bit(rank) : 0;
  }
  return places;
}

void CudaDevice::NodeChain::send(const engine::SendBuffer& buffer, engine::MessageKind kind, uint32_t node,
                                 uint32_t entries, uint64_t targets, uint64_t bytes) {
  engine::MessageHeader header;
  header.kind = kind;
  header.node = node;
  header.targets = targets;
  header.entries = entries;
  nodes_.outbox.send(buffer, header, bytes);
}

bool CudaDevice::NodeChain::receive() {
  engine::Arrival arrival;
  uint32_t taken = 0;
  while (taken < kTurnArrivals && nodes_.rows_waiting_count < kWaitingRows && has_batch() &&
         nodes_.inbox.next(&arrival)) {
    ++taken;
    const engine::MessageHeader& header = arrival.header;
    const bool member =
        nodes_.op.is_elsewhere(header.source_rank) && nodes_.op.placement->node_of[header.source_rank] == header.node;
    // What comes of another view is of a node that the others have left out, or of one of its ranks.
    if (!member || header.view != nodes_.op.view || spoiled(header.source_rank)) {
      nodes_.inbox.release(arrival);
    } else if (!take(arrival)) {
      spoil(header.source_rank);
    }
  }
  return taken != 0;
}

// Whoever takes an arrival releases it, also when it is bad.
bool CudaDevice::NodeChain::take(const engine::Arrival& arrival) {
  if (arrival.header.kind == engine::MessageKind::kCounts) {
    const bool good = take_counts(arrival);
    nodes_.inbox.release(arrival);
    return good;
  }
  kernels::MessageHead head;
  if (arrival.bytes >= sizeof(head)) {
    std::memcpy(&head, arrival.data, sizeof(head));
    if (arrival.header.kind == engine::MessageKind::kRows) {
      return take_rows(arrival, head);
    }
    if (arrival.header.kind == engine::MessageKind::kPulls) {
      return take_pulls(arrival, head);
    }
    if (arrival.header.kind == engine::MessageKind::kSums) {
      return take_sums(arrival, head);
    }
  }
  nodes_.inbox.release(arrival);
  return false;
}

bool CudaDevice::NodeChain::begin_moving() {
  using namespace kernels::cuda;
  const auto* plan = nodes_.params.scratch.plan;
  if (!put_rows() || !device_.enqueue_exchange_wait(part_, stream_, false) ||
      launch_plan(nodes_.params, stream_) != cudaSuccess ||
      driver_.cuMemcpyAsync(address_of(&nodes_.device_facts()->plan_reason), address_of(&plan->reason),
                            sizeof(uint32_t), stream_) != CUDA_SUCCESS) {
    return false;
  }
  if (dispatches()) {
    begin_rows();
    return launch_dispatch_move(nodes_.params, stream_) == cudaSuccess &&
           launch_signal(nodes_.params, SignalStep::kMoved, stream_) == cudaSuccess;
  }
  begin_pulls();
  return true;
}

/// Whether what arrived is what the counts announced. False: the Reason is in the report.
bool CudaDevice::NodeChain::judge() {
  const NodeTotals& totals = nodes_.facts()->totals;
  for (uint32_t rank = 0; rank < nodes_.ranks && nodes_.facts()->plan_reason == 0; ++rank) {
    const bool bad = (totals.bad_ranks >> rank & 1) != 0;
    const bool counted = routes() && nodes_.op.is_elsewhere(rank) && !spoiled(rank);
    if (bad || (counted && totals.landed[rank] != announced_rows(rank))) {
      spoil(rank);
    }
  }
  if (nodes_.bad_rank >= 0) {
    nodes_.report.reason = EXPERTD_REASON_INTERNAL;
    nodes_.report.rank = nodes_.bad_rank;
  }
  return nodes_.bad_rank < 0;
}

/// Rows of a rank of another node for this one.
uint64_t CudaDevice::NodeChain::announced_rows(uint32_t source) const {
  const int32_t* row = nodes_.row(source);
  if (!kernels::host::rows_by_expert(shape_)) {
    return static_cast<uint32_t>(row[shape_.rank]);
  }
  uint64_t rows = 0;
  for (uint32_t local = 0; local < shape_.local_experts; ++local) {
    rows += static_cast<uint32_t>(row[shape_.ranks + shape_.rank * shape_.local_experts + local]);
  }
  return rows;
}

bool CudaDevice::NodeChain::end() {
  using namespace kernels::cuda;
  nodes_.stage = Stage::kClosed;
  if (!judge()) {
    return true;
  }
  const bool barrier = shape_.kind == OpKind::kBarrier;
  if (combines() && launch_signal(nodes_.params, SignalStep::kMoved, stream_) != cudaSuccess) {
    return false;
  }
  return device_.enqueue_exchange_wait(part_, stream_, !barrier) &&
         launch_finish(nodes_.params, stream_) == cudaSuccess;
}

bool CudaDevice::NodeChain::close() {
  nodes_.stage = Stage::kClosed;
  return kernels::cuda::launch_finish(nodes_.params, stream_) == cudaSuccess;
}

NodeBatch* CudaDevice::NodeChain::take_batch(Batch::Kind kind) {
  Batch& batch = nodes_.batches[nodes_.ticks % kNodeBatches];
  if (batch.kind != Batch::Kind::kFree) {
    return nullptr;
  }
  batch.kind = kind;
  batch.last = false;
  batch.filled_count = 0;
  batch.arrival_count = 0;
  batch.windows = 0;
  return &batch;
}

/// Of a batch that is not launched after all.
void CudaDevice::NodeChain::give_back(Batch* batch) {
  for (uint32_t i = 0; i < batch->filled_count; ++i) {
    nodes_.op.fabric->drop(part_.rank, batch->filled[i].buffer);
  }
  batch->kind = Batch::Kind::kFree;
}

bool CudaDevice::NodeChain::put_tick(Batch* batch) {
  batch->tick = ++nodes_.ticks;
  return driver_.cuStreamWriteValue64(stream_, address_of(&nodes_.device_facts()->ticks), batch->tick,
                                      CU_STREAM_WRITE_VALUE_DEFAULT) == CUDA_SUCCESS;
}

bool CudaDevice::NodeChain::retire() {
  const uint64_t seen = load_word(nodes_.facts()->ticks);
  const bool moved = nodes_.retired != seen;
  while (nodes_.retired != seen) {
    Batch& batch = nodes_.batches[nodes_.retired++ % kNodeBatches];
    end_batch(&batch);
    batch.kind = Batch::Kind::kFree;
  }
  return moved;
}

void CudaDevice::NodeChain::end_batch(Batch* batch) {
  switch (batch->kind) {
    case Batch::Kind::kRows:
      end_rows(batch);
      break;
    case Batch::Kind::kPulls:
      end_pulls(batch);
      break;
    case Batch::Kind::kServed:
      end_served(batch);
      break;
    case Batch::Kind::kCombined:
    case Batch::Kind::kKept:
    case Batch::Kind::kSums:
    case Batch::Kind::kSpread:
    case Batch::Kind::kFree:
      break;
  }
  for (uint32_t i = 0; i < batch->arrival_count; ++i) {
    nodes_.op.fabric->release(part_.rank, batch->arrivals[i]);
  }
  for (uint32_t i = 0; batch->kind == Batch::Kind::kCombined && i < kNodeWindows; ++i) {
    NodeWindow& window = nodes_.windows[i];
    if ((batch->windows >> i & 1) != 0) {
      nodes_.moved_tokens += window.end - window.begin;
      window.stage = NodeWindow::Stage::kFree;
    }
  }
}

/// Behind kernels that take what arrived.
bool CudaDevice::NodeChain::put_totals() {
  return driver_.cuMemcpyAsync(address_of(&nodes_.device_facts()->totals), address_of(nodes_.totals()),
                               sizeof(NodeTotals), stream_) == CUDA_SUCCESS;
}

bool CudaDevice::NodeChain::is_complete() const {
  if (nodes_.retired != nodes_.ticks || !nodes_.all_sent || nodes_.rows_waiting_count != 0) {
    return false;
  }
  return missing_rows() == 0 && (!combines() || nodes_.moved_tokens == shape_.tokens);
}

uint64_t CudaDevice::NodeChain::missing_rows() const {
  uint64_t missing = 0;
  if (nodes_.stage != Stage::kMoving || nodes_.facts()->plan_reason != 0) {
    return missing;
  }
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    const NodeSource& source = nodes_.sources[rank];
    const bool owes = dispatches() ? nodes_.op.is_elsewhere(rank) : nodes_.op.serves(rank);
    const uint32_t through = dispatches() ? source.arrived : source.served;
    missing |= uint64_t{owes && !spoiled(rank) && (source.expected == 0 || through < source.expected) ? 1U : 0U}
               << rank;
  }
  for (const NodeWindow& window : nodes_.windows) {
    for (uint32_t node = 0; combines() && node < nodes_.nodes; ++node) {
      const bool waits = window.stage == NodeWindow::Stage::kWaiting && (window.waits >> node & 1) != 0;
      missing |= waits ? uint64_t{1} << nodes_.op.server_at(node, part_.rank) : 0;
    }
  }
  return missing;
}

uint64_t CudaDevice::NodeChain::unmoved() const {
  uint64_t ranks = 0;
  for (uint32_t rank = 0; rank < nodes_.ranks; ++rank) {
    if (nodes_.op.takes_part(rank) && nodes_.op.placement->is_local(rank)) {
      const NodeGroup* peer = local_peer(rank);
      const bool moved = peer != nullptr && load_word(peer->facts()->progress.moved) >= part_.group_op;
      ranks |= uint64_t{moved ? 0U : 1U} << rank;
    }
  }
  return ranks;
}

void CudaDevice::NodeChain::drop() {
  const uint64_t ticks = nodes_.ticks;
  while (nodes_.retired != ticks) {
    Batch& batch = nodes_.batches[nodes_.retired++ % kNodeBatches];
    for (uint32_t i = 0; i < batch.filled_count; ++i) {
      nodes_.op.fabric->drop(part_.rank, batch.filled[i].buffer);
    }
    for (uint32_t i = 0; i < batch.arrival_count; ++i) {
      nodes_.op.fabric->release(part_.rank, batch.arrivals[i]);
    }
    batch.kind = Batch::Kind::kFree;
  }
  for (uint32_t i = 0; i < nodes_.rows_waiting_count; ++i) {
    nodes_.op.fabric->release(part_.rank, nodes_.rows_waiting[i]);
  }
  nodes_.rows_waiting_count = 0;
  // Where the driver refused a tick the word was never written.
  std::atomic_ref<uint64_t>(nodes_.facts()->ticks).store(nodes_.ticks, std::memory_order_release);
  nodes_.outbox.close();
  nodes_.stage = Stage::kIdle;
}

}  // namespace expertd::device::cuda
