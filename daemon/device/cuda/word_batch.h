// SPDX-License-Identifier: Apache-2.0
// Words that the rescue stream writes, collected for one submission. Loop thread; owns nothing.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/device/cuda/driver.h"
#include "daemon/engine/ports.h"
#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

inline uint64_t* word_at(void* flag_page, uint64_t offset) {
  return reinterpret_cast<uint64_t*>(static_cast<char*>(flag_page) + offset);
}

/// Stream memory operations collected for one submission.
class WordBatch {
 public:
  void write(const void* address, uint64_t value) {
    CUstreamBatchMemOpParams& write = writes_[count_++];
    write.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    write.writeValue.address = reinterpret_cast<CUdeviceptr>(address);
    write.writeValue.value64 = value;
    write.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // each write is ordered behind the one before
  }
  /// What the client's stream waits for in an operation by copies. Behind the completion word where that is written:
  /// a kernel that sees these has to see that the operation has ended.
  void write_steps(const engine::SlotWords& words, uint32_t ranks, uint64_t value) {
    for (uint32_t step = 0; step < 2; ++step) {
      for (uint32_t j = 0; j < ranks; ++j) {
        write(word_at(words.flag_page, EXPERTD_STEP_ARRIVED_OFFSET(words.slot, step, j)), value);
      }
    }
  }
  /// What the chain of copies waits for behind its doorbell.
  void write_client_steps(const engine::SlotWords& words, uint64_t value) {
    write(word_at(words.flag_page, EXPERTD_STEP_RUNG_OFFSET(words.slot)), value);
    write(word_at(words.flag_page, EXPERTD_STEP_ENDED_OFFSET(words.slot)), value);
  }
  /// The same two of a high throughput operation by copies. What the client's stream waits for is let go with its end
  /// alone, since other ranks may write its outputs until then.
  void write_ht_daemon(const engine::SlotWords& words) {
    const uint64_t step = EXPERTD_HT_STEP_OFFSET(words.slot);
    write(word_at(words.flag_page, step + EXPERTD_HT_STEP_PLAN), words.seq);
    for (uint32_t j = 0; j < EXPERTD_EXCHANGE_RANKS_MAX; ++j) {
      write(word_at(words.flag_page, step + EXPERTD_HT_STEP_PROGRESS + j * sizeof(uint64_t)),
            EXPERTD_HT_PROGRESS(words.seq, EXPERTD_HT_ALL));
    }
  }
  void write_ht_client(const engine::SlotWords& words, uint64_t value) {
    const uint64_t step = EXPERTD_HT_STEP_OFFSET(words.slot);
    for (uint32_t piece = 0; piece < EXPERTD_HT_PIECES; ++piece) {
      write(word_at(words.flag_page, step + EXPERTD_HT_STEP_PACKED + piece * sizeof(uint64_t)), value);
    }
    write(word_at(words.flag_page, step + EXPERTD_HT_STEP_ENDED), value);
  }
  bool send(const Driver& driver, CUstream stream) {
    return driver.cuStreamBatchMemOp(stream, count_, writes_.data(), 0) == CUDA_SUCCESS;
  }

 private:
  // Abort word, doorbell, three words per rank (of exchanges, or of copies), result, completion and the host's word.
  std::array<CUstreamBatchMemOpParams, 3 * base::kMaxGpuRanks + 8> writes_{};
  uint32_t count_ = 0;
};

}  // namespace expertd::device::cuda
