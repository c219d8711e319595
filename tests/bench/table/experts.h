// SPDX-License-Identifier: Apache-2.0
// The experts of a rank: two matrices each, [inner, hidden] and [hidden, inner], that pass the first `inner` channels
// through and drop the rest. Belongs to a rank's thread, whose device is current. Failures are thrown.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/bench/table/cublas.h"
#include "tests/bench/table/exchange.h"

namespace expertd::bench {

/// Rows of one expert in the tensors of all.
struct ExpertRows {
  uint64_t first = 0;
  uint32_t count = 0;
};

class Experts {
 public:
  /// The intermediate size of the model whose shape the table has.
  static constexpr uint32_t kInner = 2048;

  /// Room for `rows` rows of all experts together.
  Experts(const Cublas& cublas, uint32_t experts, uint32_t hidden, uint64_t rows);

  /// From x to y, both [rows, hidden]. Experts whose rows are as many and equally far apart go as one batch.
  void enqueue(const void* x, void* y, const std::vector<ExpertRows>& rows, cudaStream_t stream) const;

 private:
  const Cublas& cublas_;
  const uint32_t hidden_;
  DeviceBuffer up_, down_, between_;
};

}  // namespace expertd::bench
