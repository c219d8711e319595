// SPDX-License-Identifier: Apache-2.0
// Packing: the caller's tensors to the out block of the exchange window, header, counts, lanes and rows. A numbering
// warp reads all ids, which lie in the second-level cache. Device code only, of expertd_exchange_dispatch.
#pragma once

#include "client/src/local_kernels/exchange.cuh"

namespace expertd::client::exchange {
namespace {

constexpr uint32_t kIdsAhead = 8;  // of a numbering warp, under way together

/// Of the group's (token, lane). Mostly the operation has as many lanes as the group: no division then.
__device__ int64_t id_of(const ExchangeParams& p, uint32_t position) {
  return p.top_k == p.table_top_k ? load_id(p, position) : id_at(p, position / p.table_top_k, position % p.table_top_k);
}

/// Numbers this source's rows for one expert in the order of (token, lane); the warp behind the last expert has the
/// lanes without one, the first bad id and the header. Whole warp.
__device__ void number_rows(const ExchangeParams& p, char* block, uint32_t expert) {
  const uint32_t positions = p.topk_idx == nullptr ? 0 : p.tokens * p.table_top_k;
  const bool rest = expert == p.experts;
  auto* lanes = reinterpret_cast<int2*>(block + p.layout.lanes);
  uint32_t count = 0;
  uint32_t bad = ~0u;
#pragma unroll 1
  for (uint32_t first = 0; first < positions; first += 32 * kIdsAhead) {
    int64_t ids[kIdsAhead];
#pragma unroll
    for (uint32_t i = 0; i < kIdsAhead; ++i) {
      const uint32_t position = first + i * 32 + lane_id();
      ids[i] = position < positions ? id_of(p, position) : -1;
    }
#pragma unroll
    for (uint32_t i = 0; i < kIdsAhead; ++i) {
      const uint32_t position = first + i * 32 + lane_id();
      const bool none = ids[i] < 0 || ids[i] >= int64_t{p.experts};
      const bool mine = position < positions && (rest ? none : ids[i] == int64_t{expert});
      const uint32_t all = __ballot_sync(kFullWarp, mine);
      if (mine) {
        const uint32_t row = count + __popc(all & ((1u << lane_id()) - 1));
        lanes[position] = rest ? int2{-1, -1} : int2{static_cast<int>(expert), static_cast<int>(row)};
        bad = rest && ids[i] != -1 ? min(bad, position) : bad;
      }
      count += __popc(all);
    }
  }
  bad = __reduce_min_sync(kFullWarp, bad);
  if (lane_id() != 0) {
    return;
  }
  if (!rest) {
    reinterpret_cast<int32_t*>(block + sizeof(expertd_exchange_header))[expert] = static_cast<int32_t>(count);
    return;
  }
  auto* header = reinterpret_cast<expertd_exchange_header*>(block);
  header->tokens = p.tokens;
  header->error = bad == ~0u ? EXPERTD_REASON_NONE : EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
  header->error_value = bad == ~0u ? 0 : id_of(p, bad);
}

/// 16 channels per lane, 8 lanes per scale: as daemon/kernels/cuda/quantise.cuh, bit for bit. Whole warp.
__device__ void quantise_part(const ExchangeParams& p, char* row, uint32_t part, const uint4* v) {
  const uint32_t channel = (part * 32 + lane_id()) * 16;
  float amax = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    amax = fmaxf(amax, fabsf(bf16_at(v[i / 8], i % 8)));
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  }
  float scale = __fdiv_rn(amax > 1e-4f ? amax : 1e-4f, 448.0f);
  if (p.payload != ExchangePayload::kFp8) {
    scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  }
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 16; ++i) {
    words[i / 4] |= to_e4m3(__fdiv_rn(bf16_at(v[i / 8], i % 8), scale)) << (8 * (i % 4));
  }
  uint32_t packed = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    packed |= (__shfl_sync(kFullWarp, __float_as_uint(scale), static_cast<int>(i * 8)) >> 23 & 0xffu) << (8 * i);
  }
  if (channel >= p.hidden) {
    return;
  }
  *reinterpret_cast<uint4*>(row + channel) = {words[0], words[1], words[2], words[3]};
  auto* scales = reinterpret_cast<uint32_t*>(row + p.out_row_bytes);
  if (p.payload == ExchangePayload::kUe8m0) {
    if (lane_id() == 0) {
      scales[channel / 512] = packed;
    }
  } else if (lane_id() % 8 == 0) {
    scales[channel / 128] = __float_as_uint(scale);
  }
}

/// One part of a token to its row. Whole warp.
__device__ void pack_part(const ExchangeParams& p, char* row, uint32_t token, uint32_t part) {
  const bool fp8 = p.payload != ExchangePayload::kPlain;
  const uint32_t pieces = p.row_bytes / 16;
  const uint32_t base = part * (kExchangePartBytes / 16);
  const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(p.x) + uint64_t{token} * p.row_bytes);
  uint4 v[2];
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t piece = base + (fp8 ? lane_id() * 2 + i : i * 32 + lane_id());
    v[i] = piece < pieces ? x[piece] : uint4{};
    if (!fp8 && piece < pieces) {
      reinterpret_cast<uint4*>(row)[piece] = v[i];
    }
  }
  if (fp8) {
    quantise_part(p, row, part, v);
  } else if (part == 0 && p.side != nullptr) {
    const char* side = static_cast<const char*>(p.side) + int64_t{token} * p.side_row_stride;
#pragma unroll 1
    for (uint32_t i = lane_id(); i < p.side_elements; i += 32) {
      copy_element(row + p.out_row_bytes + i * p.side_element_bytes, side + int64_t{i} * p.side_element_stride,
                   p.side_element_bytes);
    }
  }
}

/// One unit of packing: the first ones number rows, the others move them. Whole block.
__device__ void pack_unit(const ExchangeParams& p, uint32_t unit) {
  char* block = p.buffer + p.layout.out_block;
  const uint32_t routing = exchange_route_units(p.experts);
  if (unit < routing) {
    const uint32_t expert = unit * kExchangeWarps + threadIdx.x / 32;
    if (expert <= p.experts) {
      number_rows(p, block, expert);
    }
    return;
  }
  const uint32_t parts = exchange_parts(p.row_bytes, kExchangePartBytes);
  const Warps warps = warps_of(unit - routing, exchange_pack_units(p) - routing);
#pragma unroll 1
  for (uint32_t part = warps.first; part < p.tokens * parts; part += warps.step) {
    const uint32_t token = part / parts;
    pack_part(p, block + p.layout.rows + token * p.row_stride, token, part % parts);
  }
}

}  // namespace
}  // namespace expertd::client::exchange
