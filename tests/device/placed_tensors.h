// SPDX-License-Identifier: Apache-2.0
// The tensors of a case's operation on the current GPU, each in an allocation of exactly its size. Device tests only,
// one thread.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "tests/device/case_steps.h"
#include "tests/device/device_memory.h"

namespace expertd::device_test {

/// By expertd_tensor; null: not given.
struct Tensors {
  std::array<void*, EXPERTD_TENSOR_COUNT> at{};

  template <typename T = void>
  T* get(uint32_t name) const {
    return static_cast<T*>(at[name]);
  }
};

/// All of them, as kernels are given them.
inline void set_tensors(const Tensors& tensors, OpParams* op) {
  op->in.x = tensors.get(EXPERTD_IN_X);
  op->in.topk_idx = tensors.get(EXPERTD_IN_TOPK_IDX);
  op->in.topk_weights = tensors.get<float>(EXPERTD_IN_TOPK_WEIGHTS);
  op->in.side = tensors.get(EXPERTD_IN_SIDE);
  op->in.bias0 = tensors.get(EXPERTD_IN_BIAS0);
  op->in.bias1 = tensors.get(EXPERTD_IN_BIAS1);
  op->in.token_rank_mask = tensors.get<uint8_t>(EXPERTD_IN_TOKEN_RANK_MASK);
  op->out = {};
  op->out.x = tensors.get(EXPERTD_OUT_X);
  op->out.side = tensors.get(EXPERTD_OUT_SIDE);
  op->out.topk_idx = tensors.get(EXPERTD_OUT_TOPK_IDX);
  op->out.topk_weights = tensors.get<float>(EXPERTD_OUT_TOPK_WEIGHTS);
  op->out.expert_counts = tensors.get<int32_t>(EXPERTD_OUT_EXPERT_COUNTS);
  op->out.rank_prefix = tensors.get<int32_t>(EXPERTD_OUT_RANK_PREFIX);
  op->out.src_info = tensors.get<int32_t>(EXPERTD_OUT_SRC_INFO);
  op->out.layout_range = tensors.get<int64_t>(EXPERTD_OUT_LAYOUT_RANGE);
  op->out.stats = tensors.get<int32_t>(EXPERTD_OUT_STATS);
  op->out.token_rank_mask = tensors.get<uint8_t>(EXPERTD_OUT_TOKEN_RANK_MASK);
}

class PlacedTensors {
 public:
  /// `guard_bytes`: poison in front of each tensor and behind it, in the same allocation.
  explicit PlacedTensors(size_t guard_bytes = 0) : guard_bytes_(guard_bytes) {}

  /// Uploads all of one rank's, outputs with the poison that they hold.
  Tensors place(const CaseStep& step, uint32_t rank) {
    Tensors tensors;
    const support::CombineInput* rows = step.rows == nullptr ? nullptr : &(*step.rows)[rank];
    for_each_tensor(step.made.inputs[rank], rows, step.gpu->params[rank], &step.gpu->ranks[rank],
                    [&](const CaseTensor& tensor) {
                      if (tensor.data == nullptr) {
                        return;
                      }
                      const size_t guards = 2 * guard_bytes_;
                      auto memory = std::make_unique<Memory>(std::max<size_t>(tensor.bytes + guards, 1));
                      const auto* bytes = static_cast<const uint8_t*>(tensor.data);
                      std::vector<uint8_t> filled(tensor.bytes + guards, kGuard);
                      std::copy_n(bytes, tensor.bytes, filled.begin() + static_cast<std::ptrdiff_t>(guard_bytes_));
                      memory->put(filled);
                      tensors.at[tensor.name] = memory->at(guard_bytes_);
                      placed_.push_back({std::move(memory), tensor});
                    });
    return tensors;
  }

  /// Frees all. Inputs must be as they were; outputs go back into their buffers where `outputs` says so.
  void give_back(bool outputs) {
    for (const Placed& placed : placed_) {
      const std::vector<uint8_t> now = placed.memory->get<uint8_t>(placed.tensor.bytes, guard_bytes_);
      for (const uint64_t guard : {uint64_t{0}, uint64_t{guard_bytes_ + placed.tensor.bytes}}) {
        const std::vector<uint8_t> bytes = placed.memory->get<uint8_t>(guard_bytes_, guard);
        EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == kGuard; }))
            << "memory around tensor " << placed.tensor.name << " was written";
      }
      if (placed.tensor.output == nullptr) {
        EXPECT_TRUE(std::equal(now.begin(), now.end(), static_cast<const uint8_t*>(placed.tensor.data)))
            << "input " << placed.tensor.name << " was written";
      } else if (outputs) {
        std::copy(now.begin(), now.end(), placed.tensor.output->as<uint8_t>());
      }
    }
    placed_.clear();
  }

 private:
  struct Placed {
    std::unique_ptr<Memory> memory;
    CaseTensor tensor;
  };
  static constexpr uint8_t kGuard = 0x5c;
  const size_t guard_bytes_;
  std::vector<Placed> placed_;
};

}  // namespace expertd::device_test
