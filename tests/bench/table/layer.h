// SPDX-License-Identifier: Apache-2.0
// A layer as a model has it: dispatch, two GEMMs per expert, combine, all BF16 on the caller's stream. The matrices
// pass the first channels through and drop the rest, so that the output is known without computing it: what a token
// gets back is itself, once per lane. Made and used on a rank's thread like any operation of the benchmark.
#pragma once

#include <memory>

#include "client/ctl/bench_operation.h"
#include "tests/bench/table/cublas.h"

namespace expertd::bench {

class LayerOperation : public ctl::BenchOperation {
 public:
  /// The computation alone, on what the last dispatch left. For figures beside the layer's.
  virtual void compute() = 0;
};

/// `cublas` is of the rank's device. Other than in low latency: two micro-batches of half the tokens each, the rows of
/// one of which travel while the experts work on the other's.
std::unique_ptr<LayerOperation> make_layer(const ctl::BenchCase& it, bool low_latency, const Cublas& cublas);

}  // namespace expertd::bench
