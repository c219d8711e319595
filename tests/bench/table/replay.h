// SPDX-License-Identifier: Apache-2.0
// A low latency operation, a pair or a decode layer in a CUDA graph: captured once, issued by launching the graph. Made
// and used on a rank's thread like any operation of the benchmark; all ranks capture together, because a capture blocks
// until every rank has made it. Failures are thrown.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "client/ctl/bench_operation.h"

namespace expertd::bench {

class ReplayOperation final : public ctl::BenchOperation {
 public:
  /// `of_inputs`: what is captured depends on the inputs, as a combine's handle and the sizes of a layer's GEMMs do, so
  /// that new inputs are captured anew. The stream is the rank's.
  ReplayOperation(ctl::BenchRank* rank, std::unique_ptr<ctl::BenchOperation> inner, bool of_inputs);
  /// Once the rank has left the group, or leaves it: until then the daemon keeps what was captured, with its memory.
  ~ReplayOperation() override;
  ReplayOperation(const ReplayOperation&) = delete;
  ReplayOperation& operator=(const ReplayOperation&) = delete;

  /// Captures what is to be captured, and replays it once, so that no later launch is a graph's first one.
  void prepare(uint32_t iteration) override;
  void poison() override { inner_->poison(); }
  /// Launches the graph; a replay has no event.
  void issue(expertd_event_t* event) override;
  void finish() override { inner_->finish(); }
  void verify(const expertd_op_result_t& result) override { inner_->verify(result); }
  ctl::BenchBytes bytes() const override { return inner_->bytes(); }
  expertd_handle_t handle() const override { return inner_->handle(); }

  /// Until the stream is empty. A replay has no result; this says what does all of them.
  expertd_op_result_t wait() const;

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(rank_->stream()); }
  void capture();
  void drop();

  ctl::BenchRank* const rank_;
  const std::unique_ptr<ctl::BenchOperation> inner_;
  const bool of_inputs_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace expertd::bench
