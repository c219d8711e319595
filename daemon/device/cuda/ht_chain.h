// SPDX-License-Identifier: Apache-2.0
// A high throughput part that is executed by copy engines: what is kept of it between launch and end, and the chain as
// it is enqueued in two steps. Loop thread.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/device/cuda/chain_words.h"
#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/ht_group.h"

namespace expertd::device::cuda {

/// In pinned memory; the stream writes it.
struct alignas(128) CudaDevice::HtFacts {
  uint64_t counted;  // the part's number when the doorbell has rung and the client's counts are here
  uint64_t voided;   // copied from the client's words when the chain is through, together with `ended`
  uint64_t ended;
  uint64_t begun;  // nobody reads it: what the copies in front of words write (put_copy_first())
  uint64_t reserved[12];
};

struct CudaDevice::HtState {
  enum class Stage : uint32_t {
    kCounting,   // the client's counts are awaited, or that its doorbell rings
    kGathering,  // the own row is published, those of the others are awaited
    kSent,       // the whole chain is enqueued
    kClosed,     // aborted before that: only its end is
  };
  Stage stage = Stage::kClosed;
  engine::LaunchSpec spec;
  std::array<CUdeviceptr, base::kMaxGpuRanks> voided{};  // of rank j: its word, 0 for none
  std::array<uint64_t, base::kMaxGpuRanks> seqs{};       // and the sequence of its slot
  kernels::OpReport report;

  bool is_open() const { return stage == Stage::kCounting || stage == Stage::kGathering; }
};

/// Every function that enqueues is false when the driver refused something, after which only a piece of the chain is
/// there. With the context current.
class CudaDevice::HtChain {
 public:
  HtChain(const CudaDevice& device, const Part& part, HtState* state)
      : device_(device),
        driver_(device.driver_),
        part_(part),
        state_(*state),
        spec_(state->spec),
        shape_(spec_.own->shape),
        group_(*part.group),
        ht_(*part.group->ht),
        stream_(part.session->stream) {}

  /// Finds windows, words and tensors of all ranks; false when one is not there.
  bool find();
  /// Up to where counts are known.
  bool begin();
  /// The rows of all active ranks; false while one is missing.
  bool gather(HtRows* rows) const;
  /// The rest, by what all ranks published.
  bool proceed(const HtRows& rows);
  /// Only the end, of a part that was aborted before the rest.
  bool close();
  /// Takes the counts that the client wrote into the own row.
  void take_counts();
  /// Whether the operation goes by a handle that is not of a dispatch that succeeded.
  bool is_stale() const;
  /// Lets the other ranks have the own row.
  void publish();
  HtRow* own_row() { return &ht_.published[spec_.group_op % EXPERTD_HT_BUFFERS].row; }

 private:
  using Capacities = std::array<uint64_t, kHtRanks>;

  bool is_dispatch() const { return shape_.kind == kernels::OpKind::kDispatch; }
  bool counts() const { return is_dispatch() && shape_.cached == 0; }
  uint64_t side_bytes() const { return uint64_t{shape_.side_elements} * shape_.side_element_bytes; }
  /// Of a dispatch, what travels beside each row.
  uint64_t record_bytes() const {
    return expertd_exchange_ht_record_bytes(side_bytes(), shape_.top_k, shape_.cached != 0 ? 1 : 0);
  }
  CUdeviceptr own_word(uint64_t offset) const;
  CUdeviceptr word_of(uint32_t rank, uint64_t offset) const;
  CUdeviceptr buffer_of(uint32_t rank) const;
  CUdeviceptr facts() const;
  /// The tensor as this device sees it; 0 when it was not given. One without an address here clears `reachable_`.
  CUdeviceptr tensor(uint32_t rank, uint32_t index);
  bool copy(CUdeviceptr to, CUdeviceptr from, uint64_t bytes) {
    led_ = led_ || bytes != 0;
    return bytes == 0 || driver_.cuMemcpyAsync(to, from, bytes, stream_) == CUDA_SUCCESS;
  }
  bool put_copy_first(CUstream stream) const;
  /// Behind a copy of the same step, if need be one to the host.
  bool send(ChainWords* words);
  Capacities capacities() const;
  void announce(uint32_t steps, ChainWords* words) const;
  bool tell(uint32_t verdict, ChainWords* words);
  bool tell_plan(const HtTable& table, uint32_t verdict);
  bool send_piece(const HtTable& table, const Capacities& capacities, uint32_t piece);
  bool send_records(const HtTable& table, const Capacities& capacities);
  bool send_dispatch(const HtTable& table, const Capacities& capacities);
  bool tell_rows(const HtTable& table, const Capacities& given, uint32_t verdict);
  bool send_chunk(const HtTable& table, uint64_t given, uint32_t chunk);
  bool send_combine(const HtTable& table, const Capacities& given);
  bool end(bool moved);

  const CudaDevice& device_;
  const Driver& driver_;
  const Part& part_;
  HtState& state_;
  const engine::LaunchSpec& spec_;
  const kernels::OpShape& shape_;
  const GroupEntry& group_;
  HtGroup& ht_;
  const CUstream stream_;
  bool reachable_ = true;
  bool led_ = false;  // a copy has just been put on the stream, and nothing but words behind it
};

}  // namespace expertd::device::cuda
