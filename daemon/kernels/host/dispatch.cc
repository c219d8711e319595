// SPDX-License-Identifier: Apache-2.0
// Dispatch, high throughput and low latency: copies this rank's rows into the outputs of their destinations. Rows of
// different sources never overlap, so that no synchronisation is needed between ranks.
#include <algorithm>
#include <array>
#include <cstring>

#include "daemon/kernels/host/landing.h"
#include "daemon/kernels/host/node_ops.h"
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
  LandingRow row;  // the current token
  // FP8: the current token, quantised once for all its destinations.
  alignas(64) std::array<uint8_t, base::kMaxHidden> payload;
  std::array<float, base::kMaxHidden / kScaleGroup> scales;
  std::array<uint32_t, base::kMaxHidden / kScaleGroup> scale_words;
};

void compute_bases(const OpParams& params, Bases* bases) {
  const OpShape& shape = params.shape;
  const int32_t* matrix = matrix_of(params);
  if (!rows_by_expert(shape)) {
    add_columns(shape, matrix, 0, shape.ranks, shape.rank, bases->rank.data());
    return;
  }
  add_columns(shape, matrix, shape.ranks, shape.experts, shape.rank, bases->expert.data());
  if (is_ll(shape)) {
    return;
  }
  const Totals totals(shape, matrix);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    uint64_t start = 0;
    for (uint32_t expert = rank * shape.local_experts; expert < (rank + 1) * shape.local_experts; ++expert) {
      bases->expert[expert] += static_cast<uint32_t>(start);
      start += round_up(totals.rows[expert], shape.expert_alignment);
    }
  }
}

void count_row(const OpShape& shape, uint32_t rank, Sent* sent) {
  (rank == shape.rank ? sent->local : sent->remote) += 1;
}

/// The id of a lane whose row goes to an active rank; -1: none does.
int32_t lane_id(const OpParams& params, size_t at) {
  const OpShape& shape = params.shape;
  const int32_t id = params.routing.topk[at];
  if (id < 0 || id >= static_cast<int32_t>(shape.experts) || params.routing.token_expert[at] < 0) {
    return -1;
  }
  return is_active(shape, static_cast<uint32_t>(id) / shape.local_experts) ? id : -1;
}

/// Adds the bases to the row numbers of a token, once.
void number_rows(Dispatcher* run, uint32_t token) {
  const OpParams& params = run->params;
  const OpShape& shape = params.shape;
  if (shape.cached != 0) {
    return;
  }
  if (!rows_by_expert(shape)) {
    int32_t* rows = params.routing.token_rank + size_t{token} * shape.ranks;
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      rows[rank] += rows[rank] >= 0 && is_active(shape, rank) ? run->bases.rank[rank] : 0;
    }
    return;
  }
  const size_t first = static_cast<size_t>(token) * shape.top_k;
  for (size_t at = first; at < first + shape.top_k; ++at) {
    const int32_t id = lane_id(params, at);
    params.routing.token_expert[at] += id >= 0 ? run->bases.expert[static_cast<size_t>(id)] : 0;
  }
}

void land_in_ranks(Dispatcher* run, uint32_t token) {
  const OpShape& shape = run->params.shape;
  const int32_t* rows = run->params.routing.token_rank + size_t{token} * shape.ranks;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (rows[rank] >= 0 && is_active(shape, rank) &&
        land_token(shape, run->row, run->peers[rank], rank, static_cast<uint64_t>(rows[rank]))) {
      count_row(shape, rank, &run->sent);
    }
  }
}

/// The (token, lane) rows of the expanded form or of LL.
void land_in_experts(Dispatcher* run, uint32_t token) {
  const OpShape& shape = run->params.shape;
  for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
    const size_t at = size_t{token} * shape.top_k + lane;
    const int32_t id = lane_id(run->params, at);
    if (id < 0) {
      continue;
    }
    const uint32_t rank = static_cast<uint32_t>(id) / shape.local_experts;
    const auto row = static_cast<uint64_t>(run->params.routing.token_expert[at]);
    if (land_lane(shape, run->row, run->peers[rank], lane, row)) {
      count_row(shape, rank, &run->sent);
    }
  }
}

bool has_rows(const OpParams& params, uint32_t token) {
  const int32_t* rows = params.routing.token_expert + size_t{token} * params.shape.top_k;
  return std::any_of(rows, rows + params.shape.top_k, [](int32_t row) { return row >= 0; });
}

/// Makes `token` the current one; what route checked and stored counts, not the client's ids, which may have changed.
void take_token(Dispatcher* run, uint32_t token) {
  const OpParams& params = run->params;
  const OpShape& shape = params.shape;
  const size_t first_lane = size_t{token} * shape.top_k;
  LandingRow& row = run->row;
  row.token = token;
  row.topk = params.routing.topk + first_lane;
  row.weights = params.in.topk_weights == nullptr ? nullptr : params.in.topk_weights + first_lane;
  const char* in = static_cast<const char*>(params.in.x) + size_t{token} * shape.row_bytes;
  if (shape.payload != Payload::kFp8) {
    row.payload = in;
    row.side_stride = shape.side_element_stride;
    row.side = params.in.side == nullptr
                   ? nullptr
                   : static_cast<const char*>(params.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
    return;
  }
  row.payload = run->payload.data();
  row.scales = run->scale_words.data();
  if (has_rows(params, token)) {
    quantise_row(reinterpret_cast<const uint16_t*>(in), shape.hidden, shape.scale, run->payload.data(),
                 run->scales.data());
    pack_scales(shape, run->scales.data(), run->scale_words.data());
  }
}

}  // namespace

uint32_t dispatch_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, RowPacker* packer,
                        OpReport* report) {
  const OpShape& shape = params.shape;
  Dispatcher run{params, peers, {}, {}, {}, {}, {}, {}};
  if (shape.cached == 0) {
    compute_bases(params, &run.bases);
  }
  uint32_t token = tokens.begin;
  for (; token < tokens.end; ++token) {
    take_token(&run, token);
    if (packer == nullptr || !packer->resumes(token)) {
      number_rows(&run, token);
    }
    // First what has a long way to go.
    if (packer != nullptr && !packer->pack(run.row)) {
      break;
    }
    if (rows_by_expert(shape)) {
      land_in_experts(&run, token);
    } else {
      land_in_ranks(&run, token);
    }
  }
  report->local_bytes += run.sent.local * landed_row_bytes(shape);
  report->remote_bytes += run.sent.remote * landed_row_bytes(shape);
  return token;
}

}  // namespace expertd::kernels::host
