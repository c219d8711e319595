// SPDX-License-Identifier: Apache-2.0
// What a rank does with rows that came from another node: each lands in its outputs as if the source had stored it. The
// GPU form of host/node_spread.cc and host/landing.cc; the bytes: kernels/node_message.h.
#include "daemon/kernels/cuda/dispatch_rows.cuh"
#include "daemon/kernels/cuda/node_rows.cuh"

namespace expertd::kernels::cuda {
namespace {

static_assert(kFitsParameters<SpreadRowsJob>);
static_assert(kNodeThreads == kMoveThreads, "copy_row() is for blocks of this size");

/// What was read of one entry and checked, so that what is used is what was checked.
struct SpreadShared {
  MoveShared move;
  uint32_t token;
  float weights[base::kMaxTopK];
};

/// The row that an entry names for this rank at row number `row`, in lane `lane` of the top-k where rows are numbered
/// per expert.
__device__ Target own_target(const OpShape& shape, uint32_t lane, int32_t id, int32_t row) {
  const auto slot_row = static_cast<uint32_t>(row);
  if (!per_expert_rows(shape)) {
    return {slot_row, shape.rank, 0, 0, 0};
  }
  const uint32_t local = static_cast<uint32_t>(id) % shape.local_experts;
  const uint64_t at =
      shape.kind == OpKind::kLlDispatch ? uint64_t{local} * shape.slots_per_expert + slot_row : uint64_t{slot_row};
  return {at, shape.rank, lane, local, slot_row};
}

/// Reads and checks the tables of an entry and collects where its row lands; warp 0 only. Nothing lands of an entry
/// that no honest rank sends.
__device__ void collect_landing(const PartParams& p, const NodeTable& nodes, const SpreadRowsJob::Message& message,
                                const char* entry, NodeTotals* totals, SpreadShared* s) {
  const OpShape& shape = p.op.shape;
  const EntryLayout& layout = message.layout;
  const PeerView& own = p.peers.views[shape.rank];
  const uint32_t lane = threadIdx.x;
  const bool by_lane = per_expert_rows(shape);
  const bool in_top_k = lane < shape.top_k;
  const auto* rows = reinterpret_cast<const int32_t*>(entry + layout.rows_at);
  const uint32_t token = *reinterpret_cast<const uint32_t*>(entry);
  const int32_t id = in_top_k ? reinterpret_cast<const int32_t*>(entry + layout.topk_at)[lane] : -1;
  int32_t row = -1;
  if (by_lane ? in_top_k : lane == 0) {
    row = rows[by_lane ? lane : nodes.index_of[shape.rank]];
  }
  float weight = 0.0f;
  if (in_top_k && layout.weights_at != 0) {
    weight = reinterpret_cast<const float*>(entry + layout.weights_at)[lane];
  }
  bool bad = token >= shape.max_tokens || !id_in_range(shape, id);
  const bool mine =
      row >= 0 && (!by_lane || (id >= 0 && static_cast<uint32_t>(id) / shape.local_experts == shape.rank));
  const uint32_t limit = shape.kind == OpKind::kLlDispatch ? shape.slots_per_expert : own.capacity_rows;
  const bool lands = mine && own.out_x != nullptr && static_cast<uint32_t>(row) < limit;
  // Rows of a handle may lie behind the outputs, those of a matrix that was checked may not.
  bad = bad || (mine && !lands && shape.cached == 0 && own.out_x != nullptr);
  bad = __any_sync(kFullWarp, bad) != 0;
  const uint32_t ballot = __ballot_sync(kFullWarp, lands && !bad);
  const uint32_t landed = __popc(__ballot_sync(kFullWarp, mine && !bad));
  s->move.experts[lane] = id;
  s->weights[lane] = weight;
  if (lands && !bad) {
    s->move.targets[__popc(ballot & lanes_below())] = own_target(shape, lane, id, row);
  }
  if (lane != 0) {
    return;
  }
  s->token = token;
  s->move.count = __popc(ballot);
  if (bad) {
    mark_bad(totals, message.source);
  } else if (landed != 0) {
    atomicAdd(&totals->landed[message.source], static_cast<unsigned long long>(landed));
  }
}

/// Scales into the own column-major tensor; a word is read once.
__device__ void land_scales(const PartParams& p, const uint32_t* scales, const MoveShared& s) {
  const OpShape& shape = p.op.shape;
  const uint64_t words = shape.hidden / kScaleGroup / (shape.scale == ScaleForm::kUe8m0 ? 4 : 1);
  const uint64_t slots = shape.slots_per_expert;
  auto* out = static_cast<uint32_t*>(p.peers.views[shape.rank].out_side);
  for (uint32_t word = threadIdx.x; out != nullptr && word < words; word += kNodeThreads) {
    const uint32_t value = scales[word];
    for (uint32_t t = 0; t < s.count; ++t) {
      out[(s.targets[t].expert * words + word) * slots + s.targets[t].slot_row] = value;
    }
  }
}

/// One entry's row to where it lands; whole block.
__device__ void land_entry(const PartParams& p, const SpreadRowsJob::Message& message, const char* entry,
                           const SpreadShared& s) {
  const OpShape& shape = p.op.shape;
  const EntryLayout& layout = message.layout;
  TokenSource source;
  source.weights = layout.weights_at != 0 ? s.weights : nullptr;
  source.zero_foreign_weights = (message.head.flags & kMessageZeroForeign) != 0;
  push_bytes(p, entry + layout.payload_at, shape.out_row_bytes, s.move);
  const Crew block{threadIdx.x, kNodeThreads};
  if (shape.payload == Payload::kFp8) {
    land_scales(p, reinterpret_cast<const uint32_t*>(entry + layout.side_at), s.move);
  } else if (layout.side_bytes != 0 && p.peers.views[shape.rank].out_side != nullptr) {
    // Only then the side is known to be of the own shape.
    source.side = entry + layout.side_at;
    source.side_element_stride = shape.side_element_bytes;
    source.side_elements = message.head.side_elements;
    push_side(p, source, s.move, block);
  }
  if (shape.cached == 0) {
    push_meta(p, source, s.token, s.move, block);
  }
}

// node_spread_rows. Grid: blocks of 256 threads, at most 4 per multiprocessor, the entries of all messages strided over
// blocks. Warp 0 reads an entry's tables and checks them; where this rank has a row in it, all warps read the row once
// over PCIe, four 16-byte loads per thread in flight, and store it to its places in this rank's outputs. Entries are
// untrusted: ids, tokens and rows are checked, and a bad entry marks its source. Runs behind the plan; reads no flag.
// Every thread fences at system scope at the end. Bytes per entry: its tables, and payload and side if they are wanted.
// Bound: PCIe.
__global__ __launch_bounds__(kNodeThreads) void node_spread_rows(const __grid_constant__ PartParams p,
                                                                 const __grid_constant__ NodeTable nodes,
                                                                 const __grid_constant__ SpreadRowsJob job) {
  __shared__ SpreadShared s;
  if (block_is_gated(p)) {
    return;
  }
  uint32_t m = 0;
  uint32_t index = 0;
  for (uint64_t item = blockIdx.x; find_entry(job.message, job.messages, item, &m, &index); item += gridDim.x) {
    const SpreadRowsJob::Message& message = job.message[m];
    const char* entry = message.entries + uint64_t{index} * message.layout.stride;
    if (threadIdx.x < 32) {
      collect_landing(p, nodes, message, entry, job.totals, &s);
    }
    __syncthreads();
    if (s.move.count != 0) {
      land_entry(p, message, entry, s);
    }
    __syncthreads();
  }
  fence_sys();
}

}  // namespace

cudaError_t launch_node_spread_rows(const PartParams& params, const NodeTable& nodes, const SpreadRowsJob& job,
                                    cudaStream_t stream) {
  const uint32_t blocks = node_blocks(params, count_entries(job.message, job.messages));
  node_spread_rows<<<blocks, kNodeThreads, 0, stream>>>(params, nodes, job);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
