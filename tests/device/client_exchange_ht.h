// SPDX-License-Identifier: Apache-2.0
// Random high throughput operations by copy engines in a client process, compared with the reference: every rank makes
// the same cases of a seed, runs its own share in a group of its own and compares its outputs, which were poisoned
// before. Dispatches with a handle, rounds without a wait of the host, with EXPERTD_ASYNC, and operations that every
// rank refuses follow in the same group. Of the client program, one thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/device/client_gpu.h"
#include "tests/support/random_case.h"
#include "tests/support/rank_threads.h"

namespace expertd::device_test {

class HtExchanges {
 public:
  static constexpr uint32_t kRanks = 2;

  /// `gpu` is null on host devices, which these are not for. All return what was wrong, empty for nothing.
  std::string open(expertd_session_t* session, ClientGpu* gpu);
  /// The ranks are on two nodes, which exchange by kernels of the daemon.
  void set_over_nodes() { over_nodes_ = true; }
  /// One case of two ranks.
  std::string run(uint64_t seed, uint32_t rank);

 private:
  struct Places;
  struct Issued {
    expertd_handle_t handle{};
    expertd_event_t dispatched{};
    expertd_event_t combined{};
  };
  /// The case as every rank has it, and what must come of it.
  struct Case {
    support::RandomCase it;
    std::vector<support::DispatchResult> dispatched;
    std::vector<support::CombineInput> rows;
    std::vector<support::CombineResult> combined;
  };

  Case make(uint64_t seed) const;
  static void expect(Case* made);
  std::string upload(const Case& made, const Places& at);
  std::string dispatch(const Case& made, const Places& at, bool cached, uint32_t flags, Issued* issued);
  std::string combine(const Case& made, const Places& at, uint32_t flags, Issued* issued);
  std::string check_dispatch(const Case& made, const Places& at, bool cached, const Issued& issued);
  std::string check_rows(const Case& made, const Places& at, bool cached);
  std::string check_routing(const Case& made, const Places& at);
  std::string check_combine(const Case& made, const Places& at, const Issued& issued);
  std::string pair(const Case& made, const Places& at, bool cached, Issued* issued);
  std::string in_flight(const Case& made, const Places& at, uint32_t flags);
  std::string refused(const Case& made, const Places& at, uint32_t own, uint32_t other);
  std::string rounds(Case* made, const Places& at);
  std::string copy(void* destination, const void* source, uint64_t bytes);
  std::string fetch(const Places& at);
  std::string synchronize();
  void* stream() const { return gpu_ == nullptr ? nullptr : gpu_->stream(); }

  uint32_t executor() const { return over_nodes_ ? EXPERTD_EXECUTOR_SM : EXPERTD_EXECUTOR_COPY_ENGINE; }

  bool over_nodes_ = false;
  expertd_session_t* session_ = nullptr;
  ClientGpu* gpu_ = nullptr;
  expertd_group_t* group_ = nullptr;
  uint32_t rank_ = 0;
  char* block_ = nullptr;  // where the tensors lie
  char* host_ = nullptr;   // as large
};

}  // namespace expertd::device_test
