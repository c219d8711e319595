// SPDX-License-Identifier: Apache-2.0
// Drives CudaDevice ports as the engine would, for all ranks of a group in one process and one thread: memory of a
// random case is mirrored into a window per rank, the parts are launched and polled to their end, outputs are copied
// back. Owned by a test, one thread; tests only.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/cuda_devices.h"
#include "tests/support/random_case_buffers.h"

namespace expertd::device_test {

inline constexpr uint64_t kArenaBytes = 192ull << 20;
inline constexpr uint64_t kDrainNs = 20'000'000'000;  // far above any real time, below the test's limit

/// As the daemon sets it before its first call of CUDA; some tests begin CUDA before they have devices.
inline const bool kConnectionsAreSet = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1) == 0;

/// One rank's memory on its GPU: a window, its host mirror and what lies where.
class Arena {
 public:
  void attach(device::Window window, uint64_t bytes) {
    window_ = std::move(window);
    bytes_ = bytes;
  }
  void reset() {
    mirror_.clear();
    outputs_.clear();
  }
  /// Places bytes with 256 bytes of poison behind them; null stays "not given".
  engine::TensorView place(const void* data, size_t bytes, support::PoisonedBuffer* output = nullptr) {
    if (data == nullptr) {
      return {};
    }
    const size_t at = mirror_.size();
    mirror_.resize(at + (bytes + 511) / 256 * 256, 0xab);
    std::memcpy(mirror_.data() + at, data, bytes);
    if (output != nullptr) {
      outputs_.push_back({output, at});
    }
    return {&window_.memory->mapping(), at};
  }
  void upload(uint32_t device) {
    ASSERT_LE(mirror_.size(), bytes_);
    ASSERT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device)));  // the first device has index 0 here
    ASSERT_EQ(cudaSuccess, cudaMemcpy(window_.memory->mapping().base[device], mirror_.data(), mirror_.size(),
                                      cudaMemcpyHostToDevice));
    // Such a copy may return before the last bytes have arrived, and the operation's stream does not wait for it.
    ASSERT_EQ(cudaSuccess, cudaStreamSynchronize(cudaStreamLegacy));
  }
  /// Outputs go back into their buffers; everything else must be as it was uploaded.
  void download(uint32_t device) {
    std::vector<uint8_t> now(mirror_.size());
    ASSERT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device)));
    ASSERT_EQ(cudaSuccess,
              cudaMemcpy(now.data(), window_.memory->mapping().base[device], now.size(), cudaMemcpyDeviceToHost));
    for (const auto& [buffer, at] : outputs_) {
      std::memcpy(buffer->as<uint8_t>(), now.data() + at, buffer->bytes());
      std::memcpy(now.data() + at, mirror_.data() + at, buffer->bytes());
    }
    EXPECT_TRUE(now == mirror_) << "an input or a guard was written";
  }

 private:
  device::Window window_;
  uint64_t bytes_ = 0;
  std::vector<uint8_t> mirror_;
  std::vector<std::pair<support::PoisonedBuffer*, size_t>> outputs_;
};

struct LaunchedPart {
  engine::PartId id = 0;
  bool ended = false;
  engine::Outcome outcome;
};

/// Up to four GPUs, a session on each, and the groups that a test makes.
class GpuGroup {
 public:
  static constexpr uint32_t kMostRanks = 4;

  explicit GpuGroup(uint64_t arena_bytes = kArenaBytes, uint32_t most_ranks = kMostRanks)
      : arena_bytes_(arena_bytes), most_ranks_(most_ranks) {}

  base::Status open(const device::cuda::CudaOptions& options) {
    auto created = device::cuda::create_cuda_devices(options);
    if (!created.is_ok()) {
      return created.status();
    }
    devices_ = std::move(created).value();
    devices_.resize(std::min<size_t>(devices_.size(), most_ranks_));
    arenas_.resize(devices_.size());
    for (uint32_t r = 0; r < devices_.size(); ++r) {
      auto window = devices_[r]->create_window(arena_bytes_);
      auto session = devices_[r]->open_session({r + 1});
      if (!window.is_ok() || !session.is_ok()) {
        return window.is_ok() ? session.status() : window.status();
      }
      arenas_[r].attach(std::move(window).value(), arena_bytes_);
    }
    return make_bells();
  }

  uint32_t size() const { return static_cast<uint32_t>(devices_.size()); }
  Arena& arena(uint32_t rank) { return arenas_[rank]; }
  engine::DevicePort& port(uint32_t rank) { return devices_[rank]->port(); }
  uint32_t device_index(uint32_t rank) const { return devices_[rank]->index().value; }
  uint32_t multiprocessors(uint32_t rank) const {
    int count = 0;
    EXPECT_EQ(cudaSuccess,
              cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, static_cast<int>(device_index(rank))));
    return static_cast<uint32_t>(count);
  }

  base::Status create_group(const kernels::OpShape& shape, uint32_t capture_lanes = 0) {
    group_ = {++last_group_};
    group_op_ = 0;
    ranks_ = shape.ranks;
    for (uint32_t r = 0; r < ranks_; ++r) {
      engine::GroupShape group;
      group.id = group_;
      group.ranks = ranks_;
      group.rank = r;
      group.experts = shape.experts;
      group.hidden = shape.hidden;
      group.top_k = shape.top_k;
      group.max_tokens = shape.max_tokens;
      group.low_latency = shape.kind == kernels::OpKind::kLlDispatch;
      group.capture_lanes = capture_lanes;
      group.session = {r + 1};
      for (uint32_t j = 0; j < ranks_; ++j) {
        group.devices[j] = devices_[j]->index();
      }
      EXPERTD_RETURN_IF_ERROR(create_as_planned(devices_[r].get(), group));
    }
    return base::Status::ok();
  }
  void destroy_group() {
    for (uint32_t r = 0; r < ranks_; ++r) {
      devices_[r]->destroy_group(group_, {r});
    }
  }

  engine::Request request(uint32_t rank, const kernels::OpShape& shape) {
    engine::Request made;
    made.session = {rank + 1};
    made.shape = shape;
    made.doorbell_rung = true;
    return made;
  }

  /// Launches one operation on every active rank (`local`: rank 0 alone, without a group).
  std::vector<LaunchedPart> launch(std::vector<engine::Request>* requests, uint64_t active, bool local = false) {
    ++seq_;
    group_op_ += local ? 0 : 1;
    std::vector<LaunchedPart> parts(requests->size());
    for (uint32_t r = 0; r < requests->size(); ++r) {
      if (((active >> r) & 1) == 0) {
        parts[r].ended = true;
        continue;
      }
      engine::LaunchSpec spec;
      spec.group = local ? base::GroupId{} : group_;
      spec.group_op = group_op_;
      spec.ranks = local ? 1 : ranks_;
      spec.rank = r;
      spec.active_ranks = base::RankSet(active);
      spec.page = static_cast<uint32_t>(group_op_ % engine::kExchangePages);
      spec.own = &(*requests)[r];
      for (uint32_t j = 0; j < requests->size(); ++j) {
        spec.requests[j] = ((active >> j) & 1) != 0 ? &(*requests)[j] : nullptr;
        spec.devices[j] = devices_[j]->index();
      }
      // A close of memory may hold launches back for a moment.
      const uint64_t until = base::now_ns() + kDrainNs;
      while (!port(r).launch(spec, words(r), &parts[r].id) && base::now_ns() < until) {
      }
      EXPECT_NE(parts[r].id, 0u) << "not launched";
    }
    return parts;
  }

  engine::SlotWords words(uint32_t rank) {
    return {devices_[rank]->session_flag_page({rank + 1}), static_cast<uint32_t>(seq_ % EXPERTD_RING_SLOTS_MAX), seq_};
  }

  /// False when a part did not end in time.
  bool drain(std::vector<LaunchedPart>* parts, uint64_t limit_ns = kDrainNs) {
    const uint64_t until = base::now_ns() + limit_ns;
    bool all = false;
    while (!all && base::now_ns() < until) {
      all = true;
      for (uint32_t r = 0; r < parts->size(); ++r) {
        LaunchedPart& part = (*parts)[r];
        part.ended = part.ended || port(r).poll(part.id, &part.outcome);
        all = all && part.ended;
      }
    }
    for (uint32_t r = 0; all && r < parts->size(); ++r) {
      while (!port(r).settle((*parts)[r].id)) {
        if (base::now_ns() >= until) {
          return false;
        }
      }
    }
    return all;
  }

  /// Completion and result word of the last launched operation.
  std::pair<uint64_t, uint64_t> completion(uint32_t rank) {
    const engine::SlotWords at = words(rank);
    uint64_t values[2] = {};
    EXPECT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device_index(rank))));
    EXPECT_EQ(cudaSuccess,
              cudaMemcpy(values, static_cast<char*>(at.flag_page) + EXPERTD_COMPLETION_WORD_OFFSET(at.slot),
                         sizeof(values), cudaMemcpyDeviceToHost));
    return {values[0], values[1]};
  }
  /// Of the rank's device, as a close of memory holds it.
  device::cuda::LaunchGate& gate(uint32_t rank) {
    return *static_cast<device::cuda::CudaDevice&>(*devices_[rank]).gate();
  }
  base::GroupId group() const { return group_; }
  void* flag_page(uint32_t rank) { return devices_[rank]->session_flag_page({rank + 1}); }
  /// A word of the rank's flag page, through the stream of ring().
  void write_word(uint32_t rank, uint64_t offset, uint64_t value) {
    write_word_async(rank, offset, value);
    wait_for_words(rank);
  }
  void write_word_async(uint32_t rank, uint64_t offset, uint64_t value) {
    EXPECT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device_index(rank))));
    *bells_[rank].value = value;
    EXPECT_EQ(cudaSuccess, cudaMemcpyAsync(static_cast<char*>(flag_page(rank)) + offset, bells_[rank].value,
                                           sizeof(value), cudaMemcpyHostToDevice, bells_[rank].stream));
  }
  void wait_for_words(uint32_t rank) { EXPECT_EQ(cudaSuccess, cudaStreamSynchronize(bells_[rank].stream)); }
  uint64_t read_word(uint32_t rank, uint64_t offset) {
    EXPECT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device_index(rank))));
    EXPECT_EQ(cudaSuccess, cudaMemcpyAsync(bells_[rank].value, static_cast<char*>(flag_page(rank)) + offset,
                                           sizeof(uint64_t), cudaMemcpyDeviceToHost, bells_[rank].stream));
    EXPECT_EQ(cudaSuccess, cudaStreamSynchronize(bells_[rank].stream));
    return *bells_[rank].value;
  }
  /// Through a stream that was used before anything parked: a first copy of a context may wait for parked streams.
  void ring(uint32_t rank) {
    const engine::SlotWords at = words(rank);
    EXPECT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device_index(rank))));
    *bells_[rank].value = at.seq;
    EXPECT_EQ(cudaSuccess,
              cudaMemcpyAsync(static_cast<char*>(at.flag_page) + EXPERTD_DOORBELL_OFFSET(at.slot), bells_[rank].value,
                              sizeof(at.seq), cudaMemcpyHostToDevice, bells_[rank].stream));
    EXPECT_EQ(cudaSuccess, cudaStreamSynchronize(bells_[rank].stream));
  }
  uint64_t seq() const { return seq_; }

 private:
  /// Creates the rank's part of a group and expects that it takes what its plan said.
  static base::Status create_as_planned(device::Device* device, const engine::GroupShape& group) {
    constexpr uint32_t kHandles = 4;
    const auto plan = device->plan_group(group, kHandles);
    if (!plan.is_ok()) {
      return plan.status();
    }
    const uint64_t before = device->info().pool_used_bytes;
    EXPERTD_RETURN_IF_ERROR(device->create_group(group, kHandles));
    EXPECT_EQ(device->info().pool_used_bytes - before, plan.value().table_bytes + plan.value().handle_bytes);
    EXPECT_EQ(device->handle_capacity(group.id, {group.rank}), plan.value().handle_count);
    return base::Status::ok();
  }
  struct Bell {
    cudaStream_t stream = nullptr;
    uint64_t* value = nullptr;  // pinned
  };
  base::Status make_bells() {
    for (uint32_t r = 0; r < devices_.size(); ++r) {
      Bell bell;
      void* pinned = nullptr;
      const bool made = cudaSetDevice(static_cast<int>(device_index(r))) == cudaSuccess &&
                        cudaStreamCreateWithFlags(&bell.stream, cudaStreamNonBlocking) == cudaSuccess &&
                        cudaMallocHost(&pinned, sizeof(uint64_t)) == cudaSuccess;
      if (!made) {
        return base::Status(EXPERTD_REASON_CUDA, "making the bell of a GPU");
      }
      bell.value = static_cast<uint64_t*>(pinned);
      *bell.value = 0;
      bells_.push_back(bell);
      ring(r);  // sequence 0 wakes nobody
    }
    return base::Status::ok();
  }

  uint64_t arena_bytes_;
  uint32_t most_ranks_;
  std::vector<Bell> bells_;
  std::vector<std::unique_ptr<device::Device>> devices_;
  std::vector<Arena> arenas_;  // windows are given back before their devices
  base::GroupId group_;
  uint64_t last_group_ = 0;
  uint64_t group_op_ = 0;
  uint64_t seq_ = 0;
  uint32_t ranks_ = 0;
};

}  // namespace expertd::device_test
