// SPDX-License-Identifier: Apache-2.0
// Tells whether memory of a GPU still holds a byte everywhere: most of a low latency output must, and reading it takes
// the host seconds. Belongs to a rank's thread, whose device is current. Failures are thrown as std::runtime_error.
#pragma once

#include <cstdint>

#include "tests/bench/table/exchange.h"

namespace expertd::bench {

class DeviceProbe {
 public:
  DeviceProbe();

  /// False also for places and sizes that are no multiples of 16. Blocks.
  bool holds_only(const void* data, uint8_t value, uint64_t bytes, cudaStream_t stream) const;

 private:
  DeviceBuffer differ_;
};

}  // namespace expertd::bench
