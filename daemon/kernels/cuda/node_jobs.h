// SPDX-License-Identifier: Apache-2.0
// What GPUs do for a group whose ranks sit on several nodes: kernels that pack rows and pulls into messages, spread the
// rows of messages, sum what another node pulls, and combine with the sums of other nodes. A job is what one launch
// does; the loop thread fills it (device/cuda/node_*), and the kernels read and write messages where the fabric has
// them, in pinned memory of the host. Launchers as in launch.h. The bytes of messages: kernels/node_message.h.
//
// Whatever arrived is untrusted: numbers, ids and tokens in it are checked before anything is read or written by them.
// An entry that no honest rank sends marks its source in NodeTotals::bad_ranks and does nothing more.
#pragma once

#include <cuda_runtime_api.h>

#include "daemon/kernels/cuda/part_params.h"
#include "daemon/kernels/node_message.h"

namespace expertd::kernels::cuda {

/// Nodes of such a group at most: each has a rank.
inline constexpr uint32_t kMaxGpuNodes = base::kMaxGpuRanks;
inline constexpr uint32_t kPackBuffers = 32;      // of one launch, all nodes together
inline constexpr uint32_t kNodeMessages = 8;      // of one launch
inline constexpr uint32_t kPullWindows = 16;      // of one launch
inline constexpr uint32_t kMostPullTokens = 256;  // of one window

/// Who sits where, as engine::Placement has it.
struct NodeTable {
  uint32_t nodes = 0;
  uint32_t own_node = 0;
  uint8_t node_of[base::kMaxGpuRanks] = {};   // per rank
  uint8_t index_of[base::kMaxGpuRanks] = {};  // per rank: its place among those of its node
};

/// What the kernels of one operation find in messages; device memory, zero when the operation begins.
struct NodeTotals {
  unsigned long long landed[base::kMaxGpuRanks];  // by source: row numbers for this rank, landed or left out
  uint32_t bad_ranks;                             // bits
  uint32_t unused;
};

/// Rows of the own tokens [begin, end) for all other nodes. The k-th entry that is packed for a node goes into the
/// node's buffer k / per_message, as its entry k % per_message; in which order is left open. A node's buffers hold as
/// many entries as there are tokens.
struct PackRowsJob {
  uint32_t begin = 0;
  uint32_t end = 0;
  MessageHead head;                  // which of weights and side travel; writing heads is the host's
  EntryLayout layout[kMaxGpuNodes];  // rows_layout() of each node; the own one's is not read
  uint32_t per_message[kMaxGpuNodes] = {};
  uint32_t first_buffer[kMaxGpuNodes] = {};
  char* buffers[kPackBuffers] = {};  // where the first entry goes
  uint32_t* packed = nullptr;        // [nodes], pinned: entries of each node, written when all are packed
  uint32_t* counters = nullptr;      // [nodes + 1], device: zero before and after
};

/// Rows of messages, of which the own rank takes its own.
struct SpreadRowsJob {
  struct Message {
    const char* entries = nullptr;
    uint32_t count = 0;
    uint32_t source = 0;  // rank
    MessageHead head;     // checked by the host: its side fits the own shape
    EntryLayout layout;   // rows_layout() of the own node
  };
  uint32_t messages = 0;
  Message message[kNodeMessages];
  NodeTotals* totals = nullptr;
};

/// Pulls: of the tokens [begin, end) those with rows at `node`, in ascending order.
struct PackPullsJob {
  struct Window {
    uint32_t node = 0;
    uint32_t begin = 0;
    uint32_t end = 0;  // at most kMostPullTokens behind it
    EntryLayout layout;
    char* entries = nullptr;     // room for all tokens of the window
    uint32_t* packed = nullptr;  // pinned: how many entries
  };
  uint32_t windows = 0;
  Window window[kPullWindows];
  int32_t* positions = nullptr;  // [max_tokens, nodes], device: the token's entry in its window of the node, -1: none
};

/// Sums that other nodes pulled from the ranks of this one: entry i of `sums` is that of entry i of `pulls`.
struct ServePullsJob {
  struct Message {
    const char* pulls = nullptr;
    uint32_t count = 0;
    uint32_t source = 0;
    uint32_t flags = 0;  // kMessageWeights, kMessageLastLane
    char* sums = nullptr;
    EntryLayout layout;  // sums_layout() by the flags
  };
  uint32_t messages = 0;
  Message message[kNodeMessages];
  EntryLayout pulls;                             // pulls_layout() of the own node
  uint32_t local_ranks = 0;                      // bits: of this node, that take part
  uint32_t place_rank[base::kMaxGpuRanks] = {};  // by place of the own node: its rank
  NodeTotals* totals = nullptr;
};

/// Finishes the tokens [begin, end) of a combine: the rows of this node first, as combine_pull() adds them, then the
/// sums of the other nodes in the order of the nodes.
struct CombineNodesJob {
  uint32_t begin = 0;
  uint32_t end = 0;
  const char* sums[kMaxGpuNodes] = {};  // by node: entries, device memory; null: none
  uint32_t server[kMaxGpuNodes] = {};   // by node: the rank that summed, for bad_ranks
  EntryLayout layout;                   // sums_layout()
  const int32_t* positions = nullptr;   // as PackPullsJob wrote them
  NodeTotals* totals = nullptr;
};

cudaError_t launch_node_pack_rows(const PartParams& params, const NodeTable& nodes, const PackRowsJob& job,
                                  cudaStream_t stream);
cudaError_t launch_node_spread_rows(const PartParams& params, const NodeTable& nodes, const SpreadRowsJob& job,
                                    cudaStream_t stream);
cudaError_t launch_node_pack_pulls(const PartParams& params, const NodeTable& nodes, const PackPullsJob& job,
                                   cudaStream_t stream);
cudaError_t launch_node_serve_pulls(const PartParams& params, const NodeTable& nodes, const ServePullsJob& job,
                                    cudaStream_t stream);
cudaError_t launch_node_combine(const PartParams& params, const NodeTable& nodes, const CombineNodesJob& job,
                                cudaStream_t stream);

}  // namespace expertd::kernels::cuda
