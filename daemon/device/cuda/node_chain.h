// SPDX-License-Identifier: Apache-2.0
// A part of a group over several nodes as the loop drives it. Its chain is enqueued in pieces, because the host is in
// the way of what crosses:
//
//   at launch           wait doorbell; of a dispatch route_count, route_scan, the own row to the host; signal(routed);
//                       of a dispatch route_number
//   all counts there    rows of other nodes into the matrix; wait routed of this node's ranks; plan, its Reason to the
//                       host; of a dispatch dispatch_move (what stays on the node), signal(moved)
//   dispatch            node_pack_rows for as many tokens as there are buffers, sent when they are packed;
//                       node_spread_rows of what arrived
//   combine             node_pack_pulls of windows of tokens; node_serve_pulls of what others pull, sent when summed;
//                       sums of others into the device; node_combine of windows whose sums are there; signal(moved)
//   all sent and there  wait moved of this node's ranks; finish
//
// Messages are read and written by kernels where the fabric has them, in pinned memory; behind each such launch the
// stream counts `ticks`, and until then its buffers are not sent, nor given back. Loop thread, with the context
// current; every function that enqueues is false when the driver refused something.
#pragma once

#include <cstdint>

#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/node_group.h"

namespace expertd::device::cuda {

class CudaDevice::NodeChain {
 public:
  /// `nodes`: of the group's calls, or of a capture lane; `stream`: where the chain goes.
  NodeChain(const CudaDevice& device, const Part& part, NodeGroup* nodes, CUstream stream)
      : device_(device),
        driver_(device.driver_),
        part_(part),
        nodes_(*nodes),
        shape_(nodes_.params.op.shape),
        stream_(stream) {}

  /// The first piece. The parameters are in the NodeGroup.
  bool begin();
  /// Goes on as far as it can; false: the driver refused something. `moved`: something went on.
  bool turn(bool* moved);
  /// Nothing more is to be enqueued: the end of the chain is, or the operation does not run (report in the NodeGroup).
  bool is_through() const { return nodes_.stage == NodeGroup::Stage::kClosed; }
  /// Only the end, of a part that was aborted before.
  bool close();
  /// The chain has drained: everything of the fabric goes back.
  void drop();
  /// Ranks of other nodes whose counts, or rows or sums, are missing.
  uint64_t missing_counts() const;
  uint64_t missing_rows() const;
  /// Ranks of this node whose rows for the others of it are not there.
  uint64_t unmoved() const;

 private:
  using Stage = NodeGroup::Stage;
  using Batch = NodeBatch;

  bool dispatches() const;
  bool combines() const;
  bool routes() const { return dispatches() && shape_.cached == 0 && !nodes_.notice_only; }
  bool spoiled(uint32_t rank) const { return (nodes_.spoiled >> rank & 1) != 0; }
  void spoil(uint32_t rank);

  // node_chain.cc, node_counts.cc
  bool send_counts();
  bool receive();
  bool take(const engine::Arrival& arrival);
  bool take_counts(const engine::Arrival& arrival);
  bool counts_are_there() const;
  void see_peers();
  void note_last();
  void note_bytes();
  bool decide();
  bool replays_agree();
  const NodeGroup* local_peer(uint32_t rank) const;
  bool begin_moving();
  bool put_rows();
  bool end();
  Batch* take_batch(Batch::Kind kind);
  void give_back(Batch* batch);
  bool put_tick(Batch* batch);
  bool retire();
  void end_batch(Batch* batch);
  void send(const engine::SendBuffer& buffer, engine::MessageKind kind, uint32_t node, uint32_t entries,
            uint64_t targets, uint64_t bytes);
  uint64_t places_of(uint32_t node) const;
  bool put_totals();
  bool has_batch() const { return nodes_.batches[nodes_.ticks % kNodeBatches].kind == Batch::Kind::kFree; }
  uint32_t index_of(const Batch& batch) const { return static_cast<uint32_t>(&batch - nodes_.batches.data()); }
  uint32_t other_nodes() const;
  bool is_complete() const;
  bool judge();
  uint64_t announced_rows(uint32_t source) const;

  // node_dispatch.cc
  void begin_rows();
  bool take_rows(const engine::Arrival& arrival, const kernels::MessageHead& head);
  bool pack_rows(bool* moved);
  uint32_t take_row_buffers(Batch* batch, uint32_t tokens);
  void fill_job(const Batch& batch, kernels::cuda::PackRowsJob* job) const;
  bool spread_rows(bool* moved);
  void end_rows(Batch* batch);

  // node_combine.cc
  void begin_pulls();
  bool take_pulls(const engine::Arrival& arrival, const kernels::MessageHead& head);
  void keep_pulls(const engine::Arrival& arrival);
  bool take_sums(const engine::Arrival& arrival, const kernels::MessageHead& head);
  bool pack_pulls(bool* moved);
  bool serve_pulls(bool* moved);
  bool open_window(Batch* batch, kernels::cuda::PackPullsJob* job);
  bool combine(bool* moved);
  void end_pulls(Batch* batch);
  void end_served(Batch* batch);

  const CudaDevice& device_;
  const Driver& driver_;
  const Part& part_;
  NodeGroup& nodes_;
  const kernels::OpShape& shape_;
  const CUstream stream_;
  bool driver_failed_ = false;
};

}  // namespace expertd::device::cuda
