// SPDX-License-Identifier: Apache-2.0
// What the collector adds up before it is shown: histograms of several writers, devices and gauges of one label. Pure,
// any thread. Private to this folder.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "daemon/metrics/blocks.h"
#include "daemon/metrics/collector.h"

namespace expertd::metrics {

/// Sums of a histogram's parts, ready to be shown.
struct HistogramSum {
  std::vector<uint64_t> buckets;
  uint64_t sum_ns = 0;

  template <size_t N>
  void add(const Histogram<N>& histogram) {
    buckets.resize(N + 1);
    for (size_t i = 0; i <= N; ++i) {
      buckets[i] += read(histogram.buckets[i]);
    }
    sum_ns += read(histogram.sum_ns);
  }
};

using DevicesByLabel = std::map<std::string, std::vector<const Blocks::Device*>, std::less<>>;
using GaugesByLabel = std::map<std::string, DeviceGauges, std::less<>>;

uint64_t sum_over(const std::vector<const Blocks::Device*>& devices, const auto& value) {
  uint64_t sum = 0;
  for (const Blocks::Device* device : devices) {
    sum += value(*device);
  }
  return sum;
}

inline DevicesByLabel devices_by_label(const Blocks& blocks) {
  DevicesByLabel out;
  for (const auto& device : blocks.devices()) {
    out[device->gpu].push_back(device.get());
  }
  return out;
}

/// Every label of the blocks, and no other.
inline GaugesByLabel gauges_by_label(const DevicesByLabel& devices, const Gauges& gauges) {
  GaugesByLabel out;
  for (const auto& [gpu, unused] : devices) {
    out[gpu].gpu = gpu;
  }
  for (const DeviceGauges& device : gauges.devices) {
    const auto found = out.find(device.gpu);
    if (found == out.end()) {
      continue;
    }
    DeviceGauges& sum = found->second;
    sum.pool_free_bytes += device.pool_free_bytes;
    sum.pool_used_bytes += device.pool_used_bytes;
    sum.pool_registered_bytes += device.pool_registered_bytes;
    sum.pool_quarantined_bytes += device.pool_quarantined_bytes;
    sum.context_bytes += device.context_bytes;
    sum.ring_slots_capacity = std::max(sum.ring_slots_capacity, device.ring_slots_capacity);
    sum.healthy = sum.healthy && device.healthy;
    sum.mps_active = sum.mps_active || device.mps_active;
  }
  return out;
}

}  // namespace expertd::metrics
