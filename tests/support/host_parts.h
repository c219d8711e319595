// SPDX-License-Identifier: Apache-2.0
// Operations of a group of two on host devices, driven part by part: what a test of HostDevice launches and polls by
// hand, in any order. Rows of 16 bytes, two experts per rank, ids and rows chosen by the test. One thread.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "daemon/device/host/host_device.h"
#include "tests/support/fake_ports.h"
#include "tests/support/random_case_buffers.h"

namespace expertd::test {

inline constexpr uint32_t kPartRanks = 2;
inline constexpr uint32_t kPartRowBytes = 16;
inline constexpr uint32_t kPartTopK = 2;

/// One rank's request with its memory; every tensor is a mapping of its own, between guards.
struct PartRequest {
  engine::Request request;
  std::deque<engine::Mapping> mappings;
  std::array<support::PoisonedBuffer, EXPERTD_TENSOR_COUNT> memory;

  void* give(uint32_t tensor, size_t bytes) {
    memory[tensor] = support::PoisonedBuffer(bytes);
    mappings.emplace_back();
    mappings.back().bytes = bytes;
    mappings.back().base.fill(memory[tensor].as<void*>());
    request.tensors[tensor] = {&mappings.back(), 0};
    return memory[tensor].as<void*>();
  }
  bool guards_intact() const {
    return std::all_of(memory.begin(), memory.end(), [](const auto& buffer) { return buffer.guards_intact(); });
  }
};

/// One operation: a request, a part and an outcome per rank.
struct PartOp {
  uint64_t number = 0;
  engine::ExchangeFlags flags{kPartRanks};
  std::array<PartRequest, kPartRanks> ranks;
  std::array<engine::PartId, kPartRanks> parts{};
  std::array<engine::Outcome, kPartRanks> outcomes{};
  std::array<bool, kPartRanks> ended{};

  uint32_t reason(uint32_t rank) const { return outcomes[rank].report.reason; }
};

class HostPartsWorld {
 public:
  explicit HostPartsWorld(uint32_t max_tokens = 64) {
    shape_.id = base::GroupId{7};
    shape_.ranks = kPartRanks;
    shape_.experts = kPartRanks * 2;
    shape_.hidden = 128;
    shape_.top_k = kPartTopK;
    shape_.max_tokens = max_tokens;
    for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
      shape_.devices[rank] = base::DeviceIndex{rank};
      devices_.push_back(std::make_unique<device::HostDevice>(base::DeviceIndex{rank}, rank, &directory_, &wake, 0));
      engine::GroupShape own = shape_;
      own.rank = rank;
      created &= devices_.back()->create_group(own, 4).is_ok();
    }
  }

  /// A dispatch whose tokens all go to `experts`, one per lane; token t of rank r has rows of the byte `fill` + r.
  std::unique_ptr<PartOp> dispatch(uint32_t tokens, std::array<int64_t, kPartTopK> experts, uint32_t capacity,
                                   uint32_t generation, uint8_t fill = 1) {
    auto op = start(kernels::OpKind::kDispatch, tokens, capacity, generation);
    for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
      auto* ids = static_cast<int64_t*>(op->ranks[rank].give(EXPERTD_IN_TOPK_IDX, size_t{tokens} * kPartTopK * 8));
      for (size_t i = 0; i < size_t{tokens} * kPartTopK; ++i) {
        ids[i] = experts[i % kPartTopK];
      }
      (void)op->ranks[rank].give(EXPERTD_OUT_TOPK_IDX, size_t{capacity} * kPartTopK * 8);
      give_rows(&op->ranks[rank], tokens, capacity, static_cast<uint8_t>(fill + rank));
    }
    return op;
  }
  /// A cached dispatch; with a capacity of 0 it has no outputs at all.
  std::unique_ptr<PartOp> cached(uint32_t tokens, uint32_t capacity, uint32_t generation, uint8_t fill = 1) {
    auto op = start(kernels::OpKind::kDispatch, tokens, capacity, generation);
    for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
      op->ranks[rank].request.shape.cached = 1;
      give_rows(&op->ranks[rank], tokens, capacity, static_cast<uint8_t>(fill + rank));
    }
    return op;
  }
  /// A combine of bf16 rows.
  std::unique_ptr<PartOp> combine(uint32_t tokens, uint32_t rows, uint32_t generation) {
    auto op = start(kernels::OpKind::kCombine, tokens, rows, generation);
    for (PartRequest& own : op->ranks) {
      own.request.shape.row_bytes = 256;
      (void)own.give(EXPERTD_IN_X, size_t{rows} * 256);
      (void)own.give(EXPERTD_OUT_X, size_t{tokens} * 256);
    }
    return op;
  }
  /// A layout of rank 0's session; all ids are 0.
  std::unique_ptr<PartOp> layout(uint32_t tokens, uint32_t top_k, uint32_t ranks) {
    auto op = std::make_unique<PartOp>();
    PartRequest& own = op->ranks[0];
    own.request.session = base::SessionId{1};
    kernels::OpShape& shape = own.request.shape;
    shape.kind = kernels::OpKind::kLayout;
    shape.tokens = tokens;
    shape.top_k = top_k;
    shape.ranks = ranks;
    shape.experts = ranks;
    shape.local_experts = 1;
    const size_t lanes = size_t{tokens} * top_k;
    std::fill_n(static_cast<int64_t*>(own.give(EXPERTD_IN_TOPK_IDX, lanes * 8)), lanes, 0);
    (void)own.give(EXPERTD_OUT_EXPERT_COUNTS, size_t{ranks} * 4);
    return op;
  }

  bool launch(PartOp* op, uint32_t rank) {
    engine::LaunchSpec spec;
    spec.own = &op->ranks[rank].request;
    if (op->number != 0) {
      spec.group = shape_.id;
      spec.group_op = op->number;
      spec.ranks = kPartRanks;
      spec.rank = rank;
      spec.active_ranks = base::RankSet::first(kPartRanks);
      spec.page = static_cast<uint32_t>(op->number % engine::kExchangePages);
      spec.flags = &op->flags;
      spec.devices = shape_.devices;
      for (uint32_t peer = 0; peer < kPartRanks; ++peer) {
        spec.requests[peer] = &op->ranks[peer].request;
      }
    }
    return devices_[rank]->launch(spec, {}, &op->parts[rank]);
  }
  bool poll(PartOp* op, uint32_t rank) {
    op->ended[rank] = op->ended[rank] || devices_[rank]->poll(op->parts[rank], &op->outcomes[rank]);
    return op->ended[rank];
  }
  /// Polls these operations on both ranks in order, as engines do, until all ended; false when that does not come.
  bool finish(const std::vector<PartOp*>& ops) {
    for (uint32_t turn = 0; turn < 1'000'000; ++turn) {
      bool all = true;
      for (PartOp* op : ops) {
        for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
          all &= op->parts[rank] == 0 || poll(op, rank);
        }
      }
      if (all) {
        return true;
      }
    }
    return false;
  }
  /// Launches on both ranks and finishes.
  bool run(PartOp* op) {
    bool launched = true;
    for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
      launched &= launch(op, rank);
    }
    return launched && finish({op});
  }

  device::HostDevice& device(uint32_t rank) { return *devices_[rank]; }

  bool created = true;
  FakeWakePort wake;

 private:
  std::unique_ptr<PartOp> start(kernels::OpKind kind, uint32_t tokens, uint32_t capacity, uint32_t generation) {
    auto op = std::make_unique<PartOp>();
    op->number = ++numbers_;
    for (uint32_t rank = 0; rank < kPartRanks; ++rank) {
      engine::Request& request = op->ranks[rank].request;
      request.session = base::SessionId{rank + 1};
      request.handle_index = 1;
      request.handle_generation = generation;
      kernels::OpShape& shape = request.shape;
      shape.kind = kind;
      shape.payload = kind == kernels::OpKind::kDispatch ? kernels::Payload::kBytes : kernels::Payload::kBf16;
      shape.ranks = kPartRanks;
      shape.rank = rank;
      shape.experts = shape_.experts;
      shape.local_experts = 2;
      shape.hidden = 128;
      shape.max_tokens = shape_.max_tokens;
      shape.tokens = tokens;
      shape.top_k = kPartTopK;
      shape.capacity_rows = capacity;
      shape.row_bytes = kPartRowBytes;
      shape.out_row_bytes = kPartRowBytes;
    }
    return op;
  }
  static void give_rows(PartRequest* own, uint32_t tokens, uint32_t capacity, uint8_t fill) {
    const size_t bytes = size_t{tokens} * kPartRowBytes;
    std::fill_n(static_cast<uint8_t*>(own->give(EXPERTD_IN_X, bytes)), bytes, fill);
    if (capacity != 0) {
      (void)own->give(EXPERTD_OUT_X, size_t{capacity} * kPartRowBytes);
    }
  }

  device::HostGroupDirectory directory_;
  engine::GroupShape shape_;
  std::vector<std::unique_ptr<device::HostDevice>> devices_;
  uint64_t numbers_ = 0;
};

}  // namespace expertd::test
