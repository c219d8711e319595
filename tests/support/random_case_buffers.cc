// SPDX-License-Identifier: Apache-2.0
// Builds params over poisoned memory.
#include "tests/support/random_case_buffers.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpParams;
using kernels::OpShape;
using kernels::PeerView;

constexpr uint8_t kPoison = 0xab;
constexpr size_t kGuardBytes = 128;

bool all_poison(const uint8_t* begin, const uint8_t* end) {
  return std::all_of(begin, end, [](uint8_t byte) { return byte == kPoison; });
}

std::array<const PoisonedBuffer*, 10> buffers_of(const RankMemory& memory) {
  return {&memory.x,
          &memory.out_side,
          &memory.out_topk_idx,
          &memory.out_topk_weights,
          &memory.expert_counts,
          &memory.rank_prefix,
          &memory.src_info,
          &memory.layout_range,
          &memory.stats,
          &memory.token_rank_mask};
}

bool active(const OpShape& shape, uint32_t rank) {
  return shape.active_ranks.contains(rank);
}

std::vector<uint8_t> ids_at_width(const std::vector<int64_t>& ids, uint32_t width) {
  std::vector<uint8_t> bytes(ids.size() * width);
  for (size_t i = 0; i < ids.size(); ++i) {
    std::memcpy(bytes.data() + i * width, &ids[i], width);  // little-endian: the low bytes come first
  }
  return bytes;
}

/// Lays the dense side rows out at the strides of the case.
void place_side(const RandomCase& random_case, const RankInput& input, OpShape* shape, RankMemory* memory) {
  const int64_t element = shape->side_element_bytes;
  const int64_t elements = shape->side_elements;
  shape->side_element_stride = element;
  shape->side_row_stride = element * elements;
  if (random_case.side_layout == 1) {
    shape->side_element_stride = element * std::max<int64_t>(input.tokens, 1);
    shape->side_row_stride = element;
  } else if (random_case.side_layout == 2) {
    shape->side_element_stride = element * 3;
    shape->side_row_stride = shape->side_element_stride * elements + 16;
  }
  for (int64_t token = 0; token < input.tokens; ++token) {
    for (int64_t i = 0; i < elements; ++i) {
      const int64_t at = token * shape->side_row_stride + i * shape->side_element_stride;
      memory->side.resize(std::max(memory->side.size(), static_cast<size_t>(at + element)));
      std::memcpy(memory->side.data() + at, input.side.data() + (token * elements + i) * element,
                  static_cast<size_t>(element));
    }
  }
}

template <typename T>
T* make(PoisonedBuffer* buffer, size_t elements, size_t element_bytes = sizeof(T)) {
  *buffer = PoisonedBuffer(elements * element_bytes);
  return buffer->as<T>();
}

void make_dispatch_outputs(const RandomCase& random_case, OpParams* params, RankMemory* memory) {
  const OpShape& shape = params->shape;
  // All ranks give weights or none does; a rank without tokens gives none but may receive some.
  const bool weighted = std::any_of(random_case.inputs.begin(), random_case.inputs.end(),
                                    [](const RankInput& input) { return !input.topk_weights.empty(); });
  const bool ll = shape.kind == OpKind::kLlDispatch;
  const size_t rows = ll ? size_t{shape.local_experts} * shape.slots_per_expert : shape.capacity_rows;
  params->out.x = make<uint8_t>(&memory->x, rows * shape.out_row_bytes);
  if (shape.payload == kernels::Payload::kFp8) {
    const size_t groups = shape.hidden / 128;
    const size_t bytes = shape.scale == kernels::ScaleForm::kUe8m0 ? groups : groups * 4;
    params->out.side = make<uint8_t>(&memory->out_side, rows * bytes);
  } else if (shape.side_elements != 0) {
    params->out.side = make<uint8_t>(&memory->out_side, rows * shape.side_elements * shape.side_element_bytes);
  }
  if (ll || random_case.optional_outputs) {
    params->out.src_info = make<int32_t>(&memory->src_info, rows);
    params->out.expert_counts = make<int32_t>(&memory->expert_counts, shape.local_experts);
  }
  if (ll) {
    params->out.layout_range = make<int64_t>(&memory->layout_range, size_t{shape.local_experts} * shape.ranks);
    if (random_case.optional_outputs) {
      params->out.stats = make<int32_t>(&memory->stats, shape.local_experts);
      std::fill_n(params->out.stats, shape.local_experts, 1000);
    }
    return;
  }
  const size_t width = shape.expanded != 0 ? 1 : shape.top_k;
  if (random_case.optional_outputs) {
    params->out.rank_prefix = make<int32_t>(&memory->rank_prefix, size_t{shape.ranks} * shape.ranks);
  }
  params->out.topk_idx = make<uint8_t>(&memory->out_topk_idx, rows * width * shape.topk_idx_bytes);
  if (weighted) {
    params->out.topk_weights = make<float>(&memory->out_topk_weights, rows * width);
  }
}

kernels::Routing routing_of(HandleTables* handle) {
  return {handle->token_rank.data(), handle->token_expert.data(), handle->topk.data(), handle->counts.data()};
}

void init_group(const RandomCase& random_case, GroupMemory* memory) {
  const OpShape& shape = random_case.shape;
  memory->ranks.resize(shape.ranks);
  memory->params.resize(shape.ranks);
  memory->peers.resize(shape.ranks);
  memory->reports.resize(shape.ranks);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    OpShape& own = memory->params[rank].shape;
    own = shape;
    own.rank = rank;
    own.tokens = random_case.inputs[rank].tokens;
    own.capacity_rows = random_case.capacities[rank];
  }
}

}  // namespace

PoisonedBuffer::PoisonedBuffer(size_t bytes) : storage_(bytes + 2 * kGuardBytes + 64, kPoison), bytes_(bytes) {
  const auto address = reinterpret_cast<uintptr_t>(storage_.data()) + kGuardBytes;
  begin_ = kGuardBytes + (64 - address % 64) % 64;
}

bool PoisonedBuffer::guards_intact() const {
  const uint8_t* data = storage_.data();
  return storage_.empty() ||
         (all_poison(data, data + begin_) && all_poison(data + begin_ + bytes_, data + storage_.size()));
}

bool PoisonedBuffer::poisoned(size_t begin, size_t end) const {
  return begin >= end || all_poison(as<uint8_t>() + begin, as<uint8_t>() + end);
}

std::vector<HandleTables> make_handles(const RandomCase& random_case) {
  const OpShape& shape = random_case.shape;
  std::vector<HandleTables> handles(shape.ranks);
  for (HandleTables& handle : handles) {
    // Garbage, as left by an earlier use of the same handle slot.
    handle.token_rank.assign(size_t{shape.max_tokens} * shape.ranks, 0x2b2b2b2b);
    handle.token_expert.assign(size_t{shape.max_tokens} * shape.top_k, 0x2b2b2b2b);
    handle.topk.assign(size_t{shape.max_tokens} * shape.top_k, 0x2b2b2b2b);
    handle.counts.assign(size_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts), 0x2b2b2b2b);
  }
  return handles;
}

GroupMemory make_dispatch(const RandomCase& random_case, std::vector<HandleTables>* handles) {
  const OpShape& shape = random_case.shape;
  GroupMemory memory;
  init_group(random_case, &memory);
  const size_t row_ints = kernels::count_row_ints(shape.ranks, shape.experts);
  memory.matrix.assign(row_ints * shape.ranks, 0x2b2b2b2b);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    OpParams& params = memory.params[rank];
    RankMemory& own = memory.ranks[rank];
    const RankInput& input = random_case.inputs[rank];
    if (!active(shape, rank)) {
      std::fill_n(memory.matrix.begin() + static_cast<std::ptrdiff_t>(rank * row_ints), row_ints, 0);
    }
    own.topk_idx = ids_at_width(input.topk_idx, shape.topk_idx_bytes);
    place_side(random_case, input, &params.shape, &own);
    make_dispatch_outputs(random_case, &params, &own);
    params.in.x = input.x.data();
    params.in.side = own.side.empty() ? nullptr : own.side.data();
    if (shape.cached == 0) {
      params.in.topk_idx = own.topk_idx.empty() ? nullptr : own.topk_idx.data();
      params.in.topk_weights = input.topk_weights.empty() ? nullptr : input.topk_weights.data();
      params.in.token_rank_mask = input.token_rank_mask.empty() ? nullptr : input.token_rank_mask.data();
    }
    params.routing = routing_of(&(*handles)[rank]);
    params.counts = memory.matrix.data();
    if (active(shape, rank)) {
      memory.peers[rank] = {nullptr,
                            nullptr,
                            params.out.x,
                            params.out.side,
                            params.out.topk_idx,
                            params.out.topk_weights,
                            params.out.src_info,
                            params.counts,
                            params.shape.capacity_rows,
                            0};
    }
  }
  return memory;
}

GroupMemory make_combine(const RandomCase& random_case, std::vector<HandleTables>* handles,
                         const std::vector<CombineInput>& rows, const std::vector<uint32_t>& in_rows) {
  const OpShape& shape = random_case.shape;
  GroupMemory memory;
  init_group(random_case, &memory);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    OpParams& params = memory.params[rank];
    RankMemory& own = memory.ranks[rank];
    const RankInput& input = random_case.inputs[rank];
    params.in.x = rows[rank].x.data();
    params.out.x = make<uint16_t>(&own.x, size_t{input.tokens} * shape.hidden);
    params.routing = routing_of(&(*handles)[rank]);
    if (shape.kind == OpKind::kLlCombine) {
      own.topk_idx = ids_at_width(input.topk_idx, shape.topk_idx_bytes);
      params.in.topk_idx = own.topk_idx.data();
      params.in.topk_weights = input.topk_weights.data();
    } else {
      params.in.bias0 = input.bias0.empty() ? nullptr : input.bias0.data();
      params.in.bias1 = input.bias1.empty() ? nullptr : input.bias1.data();
      if (random_case.combine_weights) {
        params.in.topk_weights = rows[rank].weights.data();
        params.out.topk_weights = make<float>(&own.out_topk_weights, size_t{input.tokens} * shape.top_k);
      }
    }
    if (active(shape, rank)) {
      PeerView& peer = memory.peers[rank];
      peer.in_x = params.in.x;
      peer.in_topk_weights = rows[rank].weights.empty() ? nullptr : rows[rank].weights.data();
      peer.in_rows = in_rows[rank];
    }
  }
  return memory;
}

GroupMemory make_layout(const RandomCase& random_case) {
  GroupMemory memory;
  init_group(random_case, &memory);
  OpParams& params = memory.params[0];
  RankMemory& own = memory.ranks[0];
  const OpShape& shape = params.shape;
  own.topk_idx = ids_at_width(random_case.inputs[0].topk_idx, shape.topk_idx_bytes);
  params.in.topk_idx = own.topk_idx.data();
  params.out.rank_prefix = make<int32_t>(&own.rank_prefix, shape.ranks);
  params.out.expert_counts = make<int32_t>(&own.expert_counts, shape.experts);
  const uint32_t per_node = shape.ranks_per_node == 0 ? shape.ranks : shape.ranks_per_node;
  params.out.layout_range = make<int64_t>(&own.layout_range, (shape.ranks + per_node - 1) / per_node, sizeof(int32_t));
  params.out.token_rank_mask = make<uint8_t>(&own.token_rank_mask, size_t{shape.tokens} * shape.ranks);
  return memory;
}

bool guards_intact(const GroupMemory& memory) {
  return std::all_of(memory.ranks.begin(), memory.ranks.end(), [](const RankMemory& rank) {
    const auto buffers = buffers_of(rank);
    return std::all_of(buffers.begin(), buffers.end(), [](const PoisonedBuffer* b) { return b->guards_intact(); });
  });
}

bool outputs_untouched(const RankMemory& memory) {
  const auto buffers = buffers_of(memory);
  return std::all_of(buffers.begin(), buffers.end(), [&memory](const PoisonedBuffer* buffer) {
    return buffer == &memory.stats || buffer->untouched();
  });
}

}  // namespace expertd::support
