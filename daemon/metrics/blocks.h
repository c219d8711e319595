// SPDX-License-Identifier: Apache-2.0
// All counter blocks of the process and the labels they appear under. `main` adds them before the collector exists and
// none afterwards; the references stay valid. Shared by main and the collector. It never counts anything itself.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "daemon/metrics/counters.h"
#include "daemon/metrics/wait_log.h"

namespace expertd::metrics {

/// The `gpu` label of a device.
inline std::string gpu_label(bool is_host, uint32_t index) {
  return is_host ? std::string(kHostLabel) : std::to_string(index);
}

class Blocks {
 public:
  struct Device {
    std::string gpu;
    OpCounters ops;
    WaitLog waits;
    Count context_lost{0};
  };
  struct Thread {
    std::string name;
    ThreadCounters counters;
  };

  /// Devices of the same label (host) are summed up.
  Device& add_device(std::string gpu) {
    devices_.push_back(std::make_unique<Device>());
    devices_.back()->gpu = std::move(gpu);
    return *devices_.back();
  }
  /// Threads of the same name are taken together.
  ThreadCounters& add_thread(std::string name) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->name = std::move(name);
    return threads_.back()->counters;
  }
  ProcessCounters& process() { return process_; }

  const std::vector<std::unique_ptr<Device>>& devices() const { return devices_; }
  const std::vector<std::unique_ptr<Thread>>& threads() const { return threads_; }
  const ProcessCounters& process() const { return process_; }

 private:
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<Thread>> threads_;
  ProcessCounters process_;
};

}  // namespace expertd::metrics
