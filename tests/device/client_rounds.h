// SPDX-License-Identifier: Apache-2.0
// Verified rounds of dispatch and combine in a client process: every expert gives back what it got, so that a combined
// row is the sent one times the number of ranks it went to (normal) or times the sum of its weights (low latency),
// exactly in bf16. Several rounds of one batch are in flight together. Of the client program, one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/device/client_gpu.h"
#include "tests/support/rank_threads.h"

namespace expertd::device_test {

/// What a client has handed over and seen ended; in memory that outlives it, so that a parent can read it afterwards.
struct OpCounts {
  std::atomic<uint64_t> issued{0};
  std::atomic<uint64_t> ended{0};
};

/// The first failure of a batch, or its good end.
struct BatchEnd {
  support::OpEnd end;
  std::string wrong;  // an output that was not as expected
  bool ran = false;   // the failed operation had begun on its device
};

class Rounds {
 public:
  static constexpr uint32_t kTokens = 128;
  static constexpr uint32_t kHidden = 1024;
  static constexpr uint32_t kTopK = 2;
  static constexpr uint32_t kMostRanks = 4;
  /// Of the block that tensors lie in: so large that fifty that stay somewhere are seen in the GPU's free memory.
  static constexpr uint64_t kBlockBytes = 16 << 20;

  /// Memory of a kind for the tensors: one block that is registered, "window" from the library, "small" a registered
  /// allocation per tensor, "automatic" a block that is not registered, and the kinds of ClientGpu::allocate. Returns
  /// what the library said, or Reason SYSTEM with what failed before.
  support::Outcome place(expertd_session_t* session, ClientGpu* gpu, const std::string& kind);
  /// Gives the registrations back.
  support::Outcome release();

  /// `mode`: normal; ll; copy-normal, sm and copy, which are those of that executor and must then say that they had it;
  /// auto-sm-normal and auto-copy-normal, of no chosen executor, which must say that they had the one named; captured,
  /// which is ll with two capture lanes; or mixed-sm and mixed-copy, which are ll of no chosen executor with every
  /// second round in halves: those are by copy engines, the others as named. mask-ll, mask-normal and mask-captured are
  /// ll, normal and captured with on_rank_loss = mask, no-nvlink-ll and no-nvlink-normal those with use_nvlink = NO.
  support::Outcome join(const std::string& name, uint32_t rank, uint32_t ranks, const std::string& mode,
                        uint64_t op_ns);
  support::Outcome leave();
  expertd_group_t* group() const { return group_; }
  uint32_t rank() const { return rank_; }
  uint32_t ranks() const { return ranks_; }

  /// Issues `depth` rounds, waits for all of them and checks the output of the last.
  BatchEnd batch(uint32_t depth, OpCounts* counts);
  /// Rounds of two operations each, one after the other and on through failures, so that ranks that a loss ends at
  /// different operations stay in step: every good result is checked under the mask that it was made with. `count`
  /// rounds, or with `before` not 0 so many from the first operation with another mask on, up to a multiple of `count`.
  /// What came of it goes into `text`; what is wrong is returned.
  std::string masked(uint64_t count, uint64_t before, std::string* text);
  /// Issues a round of a normal group behind whatever the stream waits for, with the inputs that are there.
  support::Outcome issue(OpCounts* counts) { return issue_normal(counts); }

 private:
  friend class Graphs;
  struct Issued {
    expertd_event_t event{};
    bool seen = false;      // its end
    uint32_t executor = 0;  // that it must say; 0: any
  };

  support::Outcome add(uint64_t bytes, const std::string& kind, void** data);
  template <typename T>
  void add_tensor(uint64_t bytes, T** tensor, support::Outcome* outcome);
  template <typename T>
  void add_host(uint64_t bytes, T** memory, support::Outcome* outcome);
  void take_block(void* block);
  support::Outcome copy(void* destination, const void* source, uint64_t bytes);
  support::Outcome synchronize();
  support::Outcome upload();
  support::Outcome issue_dispatch(expertd_handle_t* handle, expertd_event_t* event);
  support::Outcome issue_combine(expertd_handle_t handle, expertd_event_t* event);
  support::Outcome issue_normal(OpCounts* counts);
  support::Outcome issue_low_latency(OpCounts* counts, BatchEnd* batch);
  void note_issued(expertd_event_t event, OpCounts* counts, bool split = false);
  support::Outcome receive(expertd_event_t event);
  void collect(Issued* op, OpCounts* counts, BatchEnd* batch);
  float sent(uint32_t token, uint32_t channel) const;
  uint32_t target(uint32_t token, uint32_t lane) const { return (rank_ + token + lane) % ranks_; }
  support::Outcome issue_ll_dispatch(uint32_t tokens, uint32_t flags, expertd_handle_t* handle, expertd_event_t* event);
  support::Outcome give_back(expertd_handle_t handle);
  support::Outcome issue_ll_combine(uint32_t tokens, uint32_t flags, expertd_handle_t handle, uint16_t* out,
                                    expertd_event_t* event);
  support::Outcome fetch();
  std::string check(uint32_t tokens, uint64_t mask = ~uint64_t{0}) const;
  std::string masked_round(support::OpEnd* sent, support::OpEnd* back);
  void* stream() const { return gpu_ == nullptr ? nullptr : gpu_->stream(); }

  expertd_session_t* session_ = nullptr;
  ClientGpu* gpu_ = nullptr;  // null on host devices
  std::vector<expertd_buffer_t*> buffers_;
  void* window_ = nullptr;
  expertd_group_t* group_ = nullptr;
  uint32_t rank_ = 0;
  uint32_t ranks_ = 0;
  bool low_latency_ = false;
  uint32_t expected_ = 0;  // expertd_executor_t of operations that are not split; 0: any
  bool mixed_ = false;
  uint64_t issued_rounds_ = 0;
  uint64_t number_ = 0;
  std::vector<Issued> issued_;
  std::vector<expertd_handle_t> handles_;
  uint16_t* x_ = nullptr;         // [T,H]
  int64_t* topk_idx_ = nullptr;   // [T,K]
  float* weights_ = nullptr;      // [T,K]
  uint16_t* recv_x_ = nullptr;    // [R*T,H]
  int64_t* recv_idx_ = nullptr;   // [R*T,K]
  uint16_t* combined_ = nullptr;  // [T,H]
  uint16_t* host_x_ = nullptr;    // of the host, as are the three below
  int64_t* host_idx_ = nullptr;
  float* host_weights_ = nullptr;
  uint16_t* host_out_ = nullptr;
};

}  // namespace expertd::device_test
