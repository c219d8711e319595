// SPDX-License-Identifier: Apache-2.0
// Dispatch, high throughput and low latency: copies this rank's rows into the outputs of their destinations. Rows of
// different sources never overlap, so that no synchronisation is needed between ranks.
#include <algorithm>
#include <array>
#include <cstring>

#include "daemon/kernels/host/tables.h"
#include "daemon/kernels/numerics.h"

namespace expertd::kernels::host {
namespace {

/// Numbers of a run of rows.
struct Sent {
  uint64_t local = 0;
  uint64_t remote = 0;
};

struct Dispatcher {
  const OpParams& params;
  const PeerView* peers;
  Bases bases;
  Sent sent;
  // FP8: the current token, quantised once for all its destinations.
  alignas(64) std::array<uint8_t, base::kMaxHidden> payload;
  std::array<float, base::kMaxHidden / kScaleGroup> scales;
};

void compute_bases(const OpParams& params, Bases* bases) {
  const OpShape& shape = params.shape;
  const int32_t* matrix = matrix_of(params);
  if (!rows_by_expert(shape)) {
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      bases->rank[rank] = static_cast<int32_t>(rank_rows(shape, matrix, rank, shape.rank));
    }
    return;
  }
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    uint64_t start = 0;
    for (uint32_t expert = rank * shape.local_experts; expert < (rank + 1) * shape.local_experts; ++expert) {
      bases->expert[expert] = static_cast<int32_t>(start + expert_rows(shape, matrix, expert, shape.rank));
      if (!is_ll(shape)) {
        start += round_up(expert_rows(shape, matrix, expert, shape.ranks), shape.expert_alignment);
      }
    }
  }
}

template <typename Element>
void gather_side(const char* in, int64_t stride, uint32_t elements, char* out) {
  for (uint32_t i = 0; i < elements; ++i) {
    std::memcpy(out + size_t{i} * sizeof(Element), in + static_cast<int64_t>(i) * stride, sizeof(Element));
  }
}

/// One token's side row, from any strides to row-major.
void copy_side(const OpParams& params, uint32_t token, void* out_side, uint64_t row) {
  const OpShape& shape = params.shape;
  const size_t bytes = size_t{shape.side_elements} * shape.side_element_bytes;
  if (params.in.side == nullptr || out_side == nullptr || bytes == 0) {
    return;
  }
  const char* in = static_cast<const char*>(params.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
  char* out = static_cast<char*>(out_side) + row * bytes;
  if (shape.side_element_stride == static_cast<int64_t>(shape.side_element_bytes)) {
    std::memcpy(out, in, bytes);
  } else if (shape.side_element_bytes == 1) {
    gather_side<uint8_t>(in, shape.side_element_stride, shape.side_elements, out);
  } else if (shape.side_element_bytes == 2) {
    gather_side<uint16_t>(in, shape.side_element_stride, shape.side_elements, out);
  } else {
    gather_side<uint32_t>(in, shape.side_element_stride, shape.side_elements, out);
  }
}

/// Scales of the current token into the column-major tensor of its destination.
void store_scales(const Dispatcher& run, void* out_side, uint64_t expert, uint64_t row) {
  const OpShape& shape = run.params.shape;
  const uint64_t groups = shape.hidden / kScaleGroup;
  const uint64_t slots = shape.slots_per_expert;
  if (out_side == nullptr) {
    return;
  }
  if (shape.scale != ScaleForm::kUe8m0) {
    auto* out = static_cast<float*>(out_side) + expert * slots * groups + row;
    for (uint64_t group = 0; group < groups; ++group) {
      out[group * slots] = run.scales[group];
    }
    return;
  }
  auto* out = static_cast<uint32_t*>(out_side) + expert * slots * (groups / 4) + row;
  for (uint64_t word = 0; word < groups / 4; ++word) {
    const float* four = run.scales.data() + word * 4;
    out[word * slots] = uint32_t{scale_to_ue8m0(four[0])} | uint32_t{scale_to_ue8m0(four[1])} << 8 |
                        uint32_t{scale_to_ue8m0(four[2])} << 16 | uint32_t{scale_to_ue8m0(four[3])} << 24;
  }
}

const void* token_payload(const Dispatcher& run, uint32_t token) {
  const OpParams& params = run.params;
  if (params.shape.payload == Payload::kFp8) {
    return run.payload.data();
  }
  return static_cast<const char*>(params.in.x) + size_t{token} * params.shape.row_bytes;
}

void count_row(const OpShape& shape, uint32_t rank, Sent* sent) {
  (rank == shape.rank ? sent->local : sent->remote) += 1;
}

void store_index(const OpShape& shape, void* out_topk_idx, uint64_t index, int64_t local) {
  if (out_topk_idx == nullptr) {
    return;
  }
  if (shape.topk_idx_bytes == 4) {
    static_cast<int32_t*>(out_topk_idx)[index] = static_cast<int32_t>(local);
  } else {
    static_cast<int64_t*>(out_topk_idx)[index] = local;
  }
}

/// The top-k of a whole token as its destination sees it: local experts, -1 for those of other ranks.
void store_top_k(const OpParams& params, uint32_t token, const PeerView& peer, uint32_t rank, uint64_t row) {
  const OpShape& shape = params.shape;
  const int64_t first = static_cast<int64_t>(rank) * shape.local_experts;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const size_t at = size_t{token} * shape.top_k + lane;
    const uint64_t to = row * shape.top_k + lane;
    // The ids that route checked and stored, not those of the client, who may have changed them since.
    const int64_t local = params.routing.topk[at] - first;
    const bool owned = params.routing.topk[at] >= 0 && local >= 0 && local < static_cast<int64_t>(shape.local_experts);
    store_index(shape, peer.out_topk_idx, to, owned ? local : -1);
    if (params.in.topk_weights != nullptr && peer.out_topk_weights != nullptr) {
      const bool zero = !owned && shape.zero_foreign_weights != 0;
      peer.out_topk_weights[to] = zero ? 0.0f : params.in.topk_weights[at];
    }
  }
}

void dispatch_token(Dispatcher* run, uint32_t token) {
  const OpParams& params = run->params;
  const OpShape& shape = params.shape;
  int32_t* rows = params.routing.token_rank + size_t{token} * shape.ranks;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (rows[rank] < 0 || !is_active(shape, rank)) {
      continue;
    }
    if (shape.cached == 0) {
      rows[rank] += run->bases.rank[rank];
    }
    const auto row = static_cast<uint64_t>(rows[rank]);
    const PeerView& peer = run->peers[rank];
    // The outputs are a client's and end with its capacity, which check_matrix held against the rows of a matrix. Rows
    // of a handle were numbered for other outputs, so each is held against these once more.
    if (row >= peer.capacity_rows || peer.out_x == nullptr) {
      continue;
    }
    std::memcpy(static_cast<char*>(peer.out_x) + row * shape.out_row_bytes, token_payload(*run, token),
                shape.out_row_bytes);
    copy_side(params, token, peer.out_side, row);
    count_row(shape, rank, &run->sent);
    if (shape.cached == 0) {
      store_top_k(params, token, peer, rank, row);
      if (peer.out_src_info != nullptr) {
        peer.out_src_info[row] = static_cast<int32_t>(token);
      }
    }
  }
}

/// One (token, lane) row of the expanded form or of LL.
void dispatch_lane(Dispatcher* run, uint32_t token, uint32_t lane) {
  const OpParams& params = run->params;
  const OpShape& shape = params.shape;
  const size_t at = size_t{token} * shape.top_k + lane;
  const int32_t id = params.routing.topk[at];
  if (id < 0 || id >= static_cast<int32_t>(shape.experts) || params.routing.token_expert[at] < 0) {
    return;
  }
  const auto expert = static_cast<uint32_t>(id);
  const uint32_t rank = expert / shape.local_experts;
  if (!is_active(shape, rank)) {
    return;
  }
  if (shape.cached == 0) {
    params.routing.token_expert[at] += run->bases.expert[expert];
  }
  const uint64_t local = expert % shape.local_experts;
  const auto row = static_cast<uint64_t>(params.routing.token_expert[at]);
  const uint64_t slot = is_ll(shape) ? local * shape.slots_per_expert + row : row;
  const PeerView& peer = run->peers[rank];
  if (row >= (is_ll(shape) ? shape.slots_per_expert : peer.capacity_rows) || peer.out_x == nullptr) {
    return;  // as in dispatch_token
  }
  std::memcpy(static_cast<char*>(peer.out_x) + slot * shape.out_row_bytes, token_payload(*run, token),
              shape.out_row_bytes);
  if (shape.payload == Payload::kFp8) {
    store_scales(*run, peer.out_side, local, row);
  } else {
    copy_side(params, token, peer.out_side, slot);
  }
  count_row(shape, rank, &run->sent);
  if (shape.cached != 0) {
    return;
  }
  if (peer.out_src_info != nullptr) {
    peer.out_src_info[slot] = static_cast<int32_t>(token);
  }
  if (!is_ll(shape)) {
    store_index(shape, peer.out_topk_idx, slot, static_cast<int64_t>(local));
    if (params.in.topk_weights != nullptr && peer.out_topk_weights != nullptr) {
      peer.out_topk_weights[slot] = params.in.topk_weights[at];
    }
  }
}

/// The largest magnitude of a group. Magnitudes order like their bits, and integer maxima vectorise; NaNs count as
/// zero.
float group_amax(const uint16_t* __restrict in) {
  int32_t largest = 0;
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    const int32_t magnitude = in[i] & 0x7fff;
    const int32_t counted = magnitude > 0x7f80 ? 0 : magnitude;
    largest = counted > largest ? counted : largest;
  }
  return bf16_to_float(static_cast<uint16_t>(largest));
}

/// A function of its own, so that the compiler believes `restrict` and vectorises without checks for overlap.
void encode_group(const uint16_t* __restrict in, float scale, uint8_t* __restrict out) {
  for (uint32_t i = 0; i < kScaleGroup; ++i) {
    out[i] = float_to_e4m3(divide_exact(bf16_to_float(in[i]), scale));
  }
}

bool has_rows(const OpParams& params, uint32_t token) {
  const int32_t* rows = params.routing.token_expert + size_t{token} * params.shape.top_k;
  return std::any_of(rows, rows + params.shape.top_k, [](int32_t row) { return row >= 0; });
}

}  // namespace

void quantise_row(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales) {
  for (uint32_t group = 0; group < hidden / kScaleGroup; ++group) {
    const size_t at = size_t{group} * kScaleGroup;
    const float exact = group_scale(group_amax(row + at));
    scales[group] = form == ScaleForm::kFloat32 ? exact : round_scale(exact);
    encode_group(row + at, scales[group], payload + at);
  }
}

void dispatch_range(const OpParams& params, const PeerView* peers, uint32_t token_begin, uint32_t token_end,
                    OpReport* report) {
  const OpShape& shape = params.shape;
  Dispatcher run{params, peers, {}, {}, {}, {}};
  if (shape.cached == 0) {
    compute_bases(params, &run.bases);
  }
  for (uint32_t token = token_begin; token < token_end; ++token) {
    if (!rows_by_expert(shape)) {
      dispatch_token(&run, token);
      continue;
    }
    if (shape.payload == Payload::kFp8 && has_rows(params, token)) {
      const auto* row =
          reinterpret_cast<const uint16_t*>(static_cast<const char*>(params.in.x) + size_t{token} * shape.row_bytes);
      quantise_row(row, shape.hidden, shape.scale, run.payload.data(), run.scales.data());
    }
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      dispatch_lane(&run, token, lane);
    }
  }
  report->local_bytes += run.sent.local * landed_row_bytes(shape);
  report->remote_bytes += run.sent.remote * landed_row_bytes(shape);
}

}  // namespace expertd::kernels::host
