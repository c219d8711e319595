// SPDX-License-Identifier: Apache-2.0
// Double batches as decoding has them: each micro-batch is computed before its dispatch and before its combine, on one
// stream, and the operations of one travel while the other is computed (send halves with EXPERTD_ASYNC, receive halves
// with expertd_event_stream_wait). Several layers behind one another, so that the ends of the chain count little. Made
// and used on a rank's thread like any operation of the benchmark.
#pragma once

#include <memory>

#include "client/ctl/bench_operation.h"

namespace expertd::bench {

class OverlapOperation : public ctl::BenchOperation {
 public:
  static constexpr uint32_t kLayers = 6;

  /// issue() is two micro-batches, one computed while the other travels. Both one behind the other, with whole
  /// operations:
  virtual void issue_serial(expertd_event_t* event) = 0;
  /// One of them, with whole operations.
  virtual void issue_single(expertd_event_t* event) = 0;
  /// The operations of one alone, and its computation alone.
  virtual void issue_communication(expertd_event_t* event) = 0;
  virtual void compute() = 0;
  /// Multiply-adds of each computation, which starts as `rounds()`.
  virtual void set_rounds(uint32_t rounds) = 0;
  virtual uint32_t rounds() const = 0;
  virtual uint32_t compute_sms() const = 0;
};

/// The computation takes half of a GPU's `multiprocessors`.
std::unique_ptr<OverlapOperation> make_overlap(const ctl::BenchCase& it, uint32_t multiprocessors);

}  // namespace expertd::bench
