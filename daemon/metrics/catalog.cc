// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/catalog.h"

namespace expertd::metrics {

namespace {

std::string_view type_name(MetricType type) {
  switch (type) {
    case MetricType::kCounter:
      return "counter";
    case MetricType::kGauge:
      return "gauge";
    case MetricType::kHistogram:
      return "histogram";
  }
  return "";
}

template <typename Names>
std::string join(const Names& names, size_t first) {
  std::string out;
  for (size_t i = first; i < names.size(); ++i) {
    out += (out.empty() ? "`" : ", `") + std::string(names[i]) + "`";
  }
  return out;
}

std::string label_cell(std::string_view labels) {
  if (labels.empty()) {
    return "—";
  }
  std::string out = "`";
  for (const char c : labels) {
    out += c == ',' ? std::string("`, `") : std::string(1, c);
  }
  return out + "`";
}

std::string bounds_text(std::span<const uint64_t> bounds_ns) {
  std::string out;
  for (const uint64_t bound : bounds_ns) {
    const std::string text = bound < 1'000'000        ? std::to_string(bound / 1'000) + " µs"
                             : bound % 1'000'000 == 0 ? std::to_string(bound / 1'000'000) + " ms"
                                                      : std::to_string(bound / 1'000'000) + "." +
                                                            std::to_string(bound % 1'000'000 / 10'000) + " ms";
    out += (out.empty() ? "" : ", ") + text;
  }
  return out;
}

}  // namespace

std::span<const uint64_t> bounds_of(Metric metric) {
  if (info_of(metric).type != MetricType::kHistogram) {
    return {};
  }
  if (metric == Metric::kFabricHeartbeatRtt) {
    return kRttBoundsNs;
  }
  return metric == Metric::kLeaseReapDuration ? std::span<const uint64_t>(kReapBoundsNs)
                                              : std::span<const uint64_t>(kOpBoundsNs);
}

std::string metrics_markdown() {
  std::string out =
      "# Metrics\n\n"
      "Generated from `daemon/metrics/catalog.h`; a test compares the two (run it with `EXPERTD_WRITE_DOCS=1` to "
      "write\n"
      "this file). Served on `metrics.address`:`metrics.port`, path `/metrics`. Every series exists from the start at\n"
      "zero, so `rate()` works from the first event; a node has at most 2,500 series.\n\n"
      "| metric | type | labels | meaning |\n|---|---|---|---|\n";
  for (const MetricInfo& metric : kCatalog) {
    out += "| `" + std::string(metric.name) + "` | " + std::string(type_name(metric.type)) + " | " +
           label_cell(metric.labels) + " | " + std::string(metric.help) + " |\n";
  }
  out += "\n## Label values\n\n";
  out += "- `gpu`: the daemon's device index; all host devices share `" + std::string(kHostLabel) + "`.\n";
  out +=
      "- `op`: " + join(kOpNames, 1) + "; in `expertd_op_total_duration_seconds` `ht` (dispatch, combine) and `ll`.\n";
  out += "- `result`: `ok`, `failed`.\n";
  out += "- `phase`: " + join(kPhaseNames, 0) + ".\n";
  out += "- `path`: `local`, `remote`, `fabric`.\n";
  out += "- `executor`: " + join(kExecutorNames, 1) + "; `host` with host devices alone, the others with GPUs.\n";
  out += "- `missing`: " + join(kMissingNames, 0) + ".\n";
  out += "- `state` of `expertd_state`: " + join(kStateNames, 0) +
         "; of `expertd_pool_bytes`: `free`, `used`, `registered`, `quarantined`; of `expertd_fabric_peers`: " +
         join(kPeerStateNames, 0) + ".\n";
  out += "- `cause`: of sessions " + join(kCloseCauseNames, 0) + "; of lost daemons " + join(kPeerFailureNames, 0) +
         "; of dropped messages " + join(kDropNames, 0) + ".\n";
  out += "- `lane`: " + join(kLaneNames, 0) + "; `direction`: `sent`, `received`.\n";
  out += "- `reason`: names of `proto/abi/expertd_reason.h`: " + join(kReasons.name, 1) + ".\n";
  out += "- `thread`: `engine-N` is the loop of device N; those of host devices share `engine-host`.\n";
  out += "\n## Histogram bounds\n\n";
  out += "- operations: " + bounds_text(kOpBoundsNs) + "\n";
  out += "- lease reap: " + bounds_text(kReapBoundsNs) + "\n";
  out += "- heartbeats: " + bounds_text(kRttBoundsNs) + "\n";
  out += "\nGauges of a maximum since the last scrape are reset by every scrape: let one scraper read them.\n";
  return out;
}

}  // namespace expertd::metrics
