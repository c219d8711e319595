// SPDX-License-Identifier: Apache-2.0
// The layout of the caller's ids: counts per rank, node and expert and the token x rank mask, as one kernel on the
// caller's stream.
#include "client/src/local_kernels/publish.cuh"

namespace expertd::client {
namespace {

constexpr uint32_t kOwnerWords = kLayoutRanksMax / 32;

struct Shared {
  uint32_t counts[kLayoutCountsMax];
  uint32_t owners[kLayoutChunkTokens * kOwnerWords];  // a bit per rank of each token of the chunk
  uint32_t nodes[kLayoutChunkTokens * kOwnerWords];   // a bit per node
  uint32_t first_bad;                                 // as in LocalScratch
  uint32_t is_last;
};

/// What follows from the parameters and is used often.
struct Shape {
  uint32_t per_rank;
  uint32_t nodes;
  uint32_t owner_words;
  uint32_t node_words;
  uint32_t counts;
};

__device__ Shape shape_of(const LayoutParams& p) {
  const uint32_t nodes = (p.ranks + p.ranks_per_node - 1) / p.ranks_per_node;
  return {p.experts / p.ranks, nodes, (p.ranks + 31) / 32, (nodes + 31) / 32, p.experts + p.ranks + nodes};
}

__device__ bool was_set(uint32_t* words, uint32_t bit) {
  const uint32_t mask = 1u << (bit % 32);
  return (atomicOr(words + bit / 32, mask) & mask) != 0;
}

__device__ int64_t load_id(const LayoutParams& p, uint32_t position) {
  return p.idx_bytes == 8 ? __ldg(static_cast<const long long*>(p.topk_idx) + position)
                          : __ldg(static_cast<const int*>(p.topk_idx) + position);
}

/// Whoever sets a token's bit first counts the token.
__device__ void count_id(const LayoutParams& p, const Shape& shape, Shared* s, uint32_t first, uint32_t lane,
                         int64_t id) {
  if (id < 0 || id >= int64_t{p.experts}) {
    if (id != -1) {
      atomicMax(&s->first_bad, ~(first * p.top_k + lane));
    }
    return;
  }
  const uint32_t expert = static_cast<uint32_t>(id);
  const uint32_t token = lane / p.top_k;
  const uint32_t rank = expert / shape.per_rank;
  atomicAdd(&s->counts[expert], 1u);
  if (was_set(s->owners + token * shape.owner_words, rank)) {
    return;
  }
  atomicAdd(&s->counts[p.experts + rank], 1u);
  const uint32_t node = rank / p.ranks_per_node;
  if (!was_set(s->nodes + token * shape.node_words, node)) {
    atomicAdd(&s->counts[p.experts + p.ranks + node], 1u);
  }
}

__device__ uint32_t chunk_tokens(const LayoutParams& p, uint32_t first) {
  return first < p.tokens ? min(kLayoutChunkTokens, p.tokens - first) : 0;
}

__device__ int64_t join(int low, int high) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}

/// 16 bytes of the chunk's ids; behind the last of them -1, which counts nowhere.
__device__ int4 load_ids(const LayoutParams& p, uint32_t first, uint32_t lane) {
  const uint32_t lanes = chunk_tokens(p, first) * p.top_k;
  const uint32_t per_vector = 16 / p.idx_bytes;
  const char* ids = static_cast<const char*>(p.topk_idx) + uint64_t{first} * p.top_k * p.idx_bytes;
  if (lane + per_vector <= lanes) {
    return __ldg(reinterpret_cast<const int4*>(ids + uint64_t{lane} * p.idx_bytes));
  }
  int words[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t word = lane * p.idx_bytes / 4 + i;
    words[i] = word < lanes * p.idx_bytes / 4 ? __ldg(reinterpret_cast<const int*>(ids) + word) : -1;
  }
  return {words[0], words[1], words[2], words[3]};
}

/// `ids` are the thread's first ones of the chunk, loaded before the shared memory was cleared.
__device__ void count_chunk(const LayoutParams& p, const Shape& shape, Shared* s, uint32_t first, int4 ids) {
  const uint32_t lanes = chunk_tokens(p, first) * p.top_k;
  const uint32_t per_vector = 16 / p.idx_bytes;
  for (uint32_t lane = threadIdx.x * per_vector; lane < lanes;) {
    if (p.idx_bytes == 8) {
      count_id(p, shape, s, first, lane, join(ids.x, ids.y));
      count_id(p, shape, s, first, lane + 1, join(ids.z, ids.w));
    } else {
      count_id(p, shape, s, first, lane, ids.x);
      count_id(p, shape, s, first, lane + 1, ids.y);
      count_id(p, shape, s, first, lane + 2, ids.z);
      count_id(p, shape, s, first, lane + 3, ids.w);
    }
    lane += kLayoutThreads * per_vector;
    ids = load_ids(p, first, lane);
  }
}

__device__ uint32_t owns(const Shape& shape, const Shared& s, uint32_t token, uint32_t rank) {
  return s.owners[token * shape.owner_words + rank / 32] >> (rank % 32) & 1;
}

/// The chunk's rows of the mask lie one behind the other and begin at a multiple of 16 bytes.
__device__ void write_mask(const LayoutParams& p, const Shape& shape, const Shared& s, uint32_t first) {
  if (p.token_rank_mask == nullptr) {
    return;
  }
  const uint32_t bytes = chunk_tokens(p, first) * p.ranks;
  uint8_t* mask = p.token_rank_mask + uint64_t{first} * p.ranks;
  for (uint32_t at = threadIdx.x * 4; at < bytes; at += kLayoutThreads * 4) {
    uint32_t token = at / p.ranks;
    uint32_t rank = at % p.ranks;
    const uint32_t here = min(4u, bytes - at);
    uint32_t word = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      word |= (i < here ? owns(shape, s, token, rank) : 0) << (i * 8);
      ++rank;
      token += rank == p.ranks ? 1 : 0;
      rank = rank == p.ranks ? 0 : rank;
    }
    if (here == 4) {
      *reinterpret_cast<uint32_t*>(mask + at) = word;
    } else {
      for (uint32_t i = 0; i < here; ++i) {
        mask[at + i] = static_cast<uint8_t>(word >> (i * 8));
      }
    }
  }
}

__device__ void write_count(const LayoutParams& p, uint32_t index, uint32_t value) {
  int32_t* output = p.tokens_per_expert;
  if (index >= p.experts + p.ranks) {
    output = p.tokens_per_node;
    index -= p.experts + p.ranks;
  } else if (index >= p.experts) {
    output = p.tokens_per_rank;
    index -= p.experts;
  }
  if (output != nullptr) {
    output[index] = static_cast<int32_t>(value);
  }
}

/// Adds the block's counts to those of the others; true in the block that is the last to do so.
__device__ bool add_counts(const LayoutParams& p, const Shape& shape, Shared* s) {
  for (uint32_t i = threadIdx.x; i < shape.counts; i += kLayoutThreads) {
    if (s->counts[i] != 0) {
      atomicAdd(&p.scratch->counts[i], s->counts[i]);
    }
  }
  if (threadIdx.x == 0 && s->first_bad != 0) {
    atomicMax(&p.scratch->first_bad, s->first_bad);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // Device scope: the first fence hands on what the barrier collected of this block, the second takes that of others.
    __threadfence();
    s->is_last = atomicAdd(&p.scratch->arrived, 1u) == gridDim.x - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  return s->is_last != 0;
}

/// The sums of all blocks to the outputs, and the scratch as it was.
__device__ void write_sums(const LayoutParams& p, const Shape& shape, Shared* s) {
  for (uint32_t i = threadIdx.x; i < shape.counts; i += kLayoutThreads) {
    write_count(p, i, __ldcg(&p.scratch->counts[i]));
    p.scratch->counts[i] = 0;
  }
  if (threadIdx.x == 0) {
    s->first_bad = __ldcg(&p.scratch->first_bad);
    p.scratch->first_bad = 0;
    p.scratch->arrived = 0;
  }
}

}  // namespace
}  // namespace expertd::client

// layout. Grid: min(T/64, 128) blocks of 256 threads, at least one; chunks of 64 tokens are dealt out in turn. Every
// thread reads ids of the chunk 16 bytes at a time and counts in shared memory: experts by id, ranks and nodes once per
// token, whose bits also become the mask rows. Then the blocks add their counts in the slot's scratch, and the one that
// arrives last writes the outputs, clears the scratch and publishes: record->seq, then scratch->seq, behind one fence.
// With one block there is no scratch. It waits for nobody. Ids out of range count nowhere; the first of them in the
// order of (token, lane) goes to the record. Bytes per token: K ids, R of the mask. Bound by latency: one read, one
// round of atomics, one counter, one read back, one store to the host.
extern "C" __global__ void __launch_bounds__(expertd::client::kLayoutThreads)
    expertd_local_layout(const __grid_constant__ expertd::client::LayoutParams p) {
  using namespace expertd::client;
  __shared__ Shared s;
  const Shape shape = shape_of(p);
  uint32_t first = blockIdx.x * kLayoutChunkTokens;
  const uint32_t own_lane = threadIdx.x * (16 / p.idx_bytes);
  int4 ahead = load_ids(p, first, own_lane);
  for (uint32_t i = threadIdx.x; i < shape.counts; i += kLayoutThreads) {
    s.counts[i] = 0;
  }
  if (threadIdx.x == 0) {
    s.first_bad = 0;
  }
  for (; first < p.tokens; first += gridDim.x * kLayoutChunkTokens) {
    for (uint32_t i = threadIdx.x; i < kLayoutChunkTokens * shape.owner_words; i += kLayoutThreads) {
      s.owners[i] = 0;
    }
    for (uint32_t i = threadIdx.x; i < kLayoutChunkTokens * shape.node_words; i += kLayoutThreads) {
      s.nodes[i] = 0;
    }
    __syncthreads();
    count_chunk(p, shape, &s, first, ahead);
    ahead = load_ids(p, first + gridDim.x * kLayoutChunkTokens, own_lane);
    __syncthreads();
    write_mask(p, shape, s, first);
    __syncthreads();
  }
  __syncthreads();
  if (gridDim.x == 1) {
    for (uint32_t i = threadIdx.x; i < shape.counts; i += kLayoutThreads) {
      write_count(p, i, s.counts[i]);
    }
  } else if (add_counts(p, shape, &s)) {
    write_sums(p, shape, &s);
  } else {
    return;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (s.first_bad != 0) {
      p.record->value = load_id(p, ~s.first_bad);
      p.record->failed = 1;
    }
    publish(p.scratch, p.record, p.seq);
  }
}
