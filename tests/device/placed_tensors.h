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

class PlacedTensors {
 public:
  /// Uploads all of one rank's, outputs with the poison that they hold.
  Tensors place(const CaseStep& step, uint32_t rank) {
    Tensors tensors;
    const support::CombineInput* rows = step.rows == nullptr ? nullptr : &(*step.rows)[rank];
    for_each_tensor(step.made.inputs[rank], rows, step.gpu->params[rank], &step.gpu->ranks[rank],
                    [&](const CaseTensor& tensor) {
                      if (tensor.data == nullptr) {
                        return;
                      }
                      auto memory = std::make_unique<Memory>(std::max<size_t>(tensor.bytes, 1));
                      const auto* bytes = static_cast<const uint8_t*>(tensor.data);
                      memory->put(std::vector<uint8_t>(bytes, bytes + tensor.bytes));
                      tensors.at[tensor.name] = memory->at();
                      placed_.push_back({std::move(memory), tensor});
                    });
    return tensors;
  }

  /// Frees all. Inputs must be as they were; outputs go back into their buffers where `outputs` says so.
  void give_back(bool outputs) {
    for (const Placed& placed : placed_) {
      const std::vector<uint8_t> now = placed.memory->get<uint8_t>(placed.tensor.bytes);
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
  std::vector<Placed> placed_;
};

}  // namespace expertd::device_test
