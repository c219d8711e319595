// SPDX-License-Identifier: Apache-2.0
// Double batches in halves, in a client process: two low-latency dispatches and two combines whose send halves
// (EXPERTD_ASYNC) and receive halves (expertd_event_stream_wait) stand on several streams, with a kernel between them
// that scales what an expert got. Every output is compared. Of the client program, one thread.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "expertd.h"
#include "tests/device/client_gpu.h"

namespace expertd::device_test {

/// A step of one batch; those of a batch come in this order.
enum class HookStep { kSendDispatch, kReceiveDispatch, kCompute, kSendCombine, kReceiveCombine };

struct HookAction {
  uint32_t batch = 0;
  HookStep step = HookStep::kSendDispatch;
};

/// All steps of both batches in the order that a seed gives, which is the same on all ranks, as the group's operations
/// have to be; seed 0: as serving has them, where batch 1 travels while batch 0 computes.
std::vector<HookAction> hook_order(uint32_t seed);

class Hooks {
 public:
  static constexpr uint32_t kBatches = 2;

  /// Memory and streams; `gpu` is null on host devices. All return what failed, empty for success.
  std::string open(expertd_session_t* session, ClientGpu* gpu);
  /// `rounds` double batches in a low-latency group of the shape of Rounds, each in an order of its own unless the seed
  /// is 0.
  std::string run(expertd_group_t* group, uint32_t rank, uint32_t ranks, uint32_t seed, uint32_t rounds);

 private:
  struct Batch {
    uint16_t* x = nullptr;         // [T,H]
    int64_t* topk_idx = nullptr;   // [T,K]
    float* weights = nullptr;      // [T,K]
    uint16_t* combined = nullptr;  // [T,H]
    expertd_handle_t handle{};
    expertd_event_t dispatched{};
    expertd_event_t combined_event{};
    expertd_ll_outputs_t outputs{};
    void* receive_stream = nullptr;
  };

  std::string round(const std::vector<HookAction>& order);
  std::string upload();
  std::string act(const HookAction& action);
  std::string send_dispatch(Batch* batch);
  std::string receive(const expertd_event_t& event, void* stream);
  std::string compute(uint32_t index);
  std::string send_combine(Batch* batch);
  std::string finish();
  std::string check(uint32_t index);
  std::string copy(void* destination, const void* source, uint64_t bytes);
  std::string synchronize();
  void* random_receive_stream();
  void* send_stream() const { return gpu_ == nullptr ? nullptr : gpu_->stream(); }
  float sent(uint32_t batch, uint32_t token, uint32_t channel) const;

  expertd_session_t* session_ = nullptr;
  ClientGpu* gpu_ = nullptr;
  expertd_group_t* group_ = nullptr;
  uint32_t rank_ = 0;
  uint32_t ranks_ = 0;
  uint32_t number_ = 0;
  std::array<void*, 2> receive_streams_{};
  std::minstd_rand random_;
  std::array<Batch, kBatches> batches_;
  std::vector<uint16_t> host_x_;
};

}  // namespace expertd::device_test
