// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_report.h"

#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

#include "client/ctl/format.h"

#ifndef EXPERTD_VERSION
#define EXPERTD_VERSION "unknown"
#endif

namespace expertd::ctl {

namespace {

using nlohmann::json;

constexpr double kMedian = 0.5;
constexpr double kTail = 0.99;
constexpr double kNsPerUs = 1e3;
constexpr double kNsPerS = 1e9;

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

/// Bytes per nanosecond are GB per second.
double gb_per_s(double bytes, const BenchMeasured& row) {
  const auto time = static_cast<double>(row.time_ns(kMedian));
  return time == 0 ? 0 : bytes / time;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

json group_json(const BenchGroup& group) {
  return {
      {"mode", group.mode},
      {"join_s", static_cast<double>(group.join_ns) / kNsPerS},
      {"crossings_per_token",
       {{"nodes", group.crossings.nodes}, {"ranks", group.crossings.ranks}, {"lanes", group.crossings.lanes}}},
  };
}

json row_json(const BenchMeasured& row) {
  return {
      {"operation", row.operation},
      {"flags", row.flags},
      {"mode", row.mode},
      {"tokens", row.tokens},
      {"executor", executor_name(row.execution.executor)},
      {"sms", row.execution.sms},
      {"iterations", row.times_ns.size()},
      {"p50_us", static_cast<double>(row.time_ns(kMedian)) / kNsPerUs},
      {"p99_us", static_cast<double>(row.time_ns(kTail)) / kNsPerUs},
      {"logical_bytes", row.logical_bytes},
      {"link_bytes", row.link_bytes},
      {"logical_gb_per_s", gb_per_s(row.logical_bytes, row)},
      {"link_gb_per_s", gb_per_s(row.link_bytes, row)},
      {"verified", row.verified},
  };
}

}  // namespace

std::string bench_table(const BenchResult& result) {
  Table table({{"OPERATION"},
               {"DTYPE AND FLAGS"},
               {"TOKENS", Align::kRight},
               {"BY"},
               {"SMS", Align::kRight},
               {"P50 µs", Align::kRight},
               {"P99 µs", Align::kRight},
               {"LOGICAL GB/s", Align::kRight},
               {"LINK GB/s", Align::kRight},
               {"VERIFIED", Align::kRight}});
  for (const BenchMeasured& row : result.rows) {
    const bool moves = row.logical_bytes != 0;
    table.add({row.operation, row.flags, std::to_string(row.tokens), executor_name(row.execution.executor),
               row.execution.sms == 0 ? "-" : std::to_string(row.execution.sms),
               fixed(static_cast<double>(row.time_ns(kMedian)) / kNsPerUs, 1),
               fixed(static_cast<double>(row.time_ns(kTail)) / kNsPerUs, 1),
               moves ? fixed(gb_per_s(row.logical_bytes, row), 2) : "-",
               moves ? fixed(gb_per_s(row.link_bytes, row), 2) : "-",
               row.verified == 0 ? "-" : std::to_string(row.verified)});
  }
  return table.text();
}

std::string bench_json(const BenchOptions& options, const BenchResult& result) {
  json rows = json::array();
  for (const BenchMeasured& row : result.rows) {
    rows.push_back(row_json(row));
  }
  json groups = json::array();
  for (const BenchGroup& group : result.groups) {
    groups.push_back(group_json(group));
  }
  const json document = {
      {"versions", {{"client", expertd_version()}, {"expertctl", EXPERTD_VERSION}}},
      {"date", utc_now()},
      {"seed", options.seed},
      {"devices", result.devices},
      {"ranks", result.devices.size()},
      {"nodes", result.nodes},
      {"groups", groups},
      {"expert_groups", options.expert_groups.count},
      {"groups_per_token", options.expert_groups.per_token},
      {"hidden", options.hidden},
      {"experts", options.experts},
      {"top_k", options.top_k},
      {"iterations", options.iterations},
      {"warmup", options.warmup},
      {"rows", rows},
      {"verified", result.verified},
  };
  return document.dump(2) + "\n";
}

std::string failure_json(const std::string& text, int exit_code) {
  return json({{"error", text}, {"exit_code", exit_code}}).dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

std::string plan_table(const std::vector<BenchPlan>& plans) {
  Table table({{"MODE"},
               {"WINDOW", Align::kRight},
               {"TABLES", Align::kRight},
               {"HANDLES", Align::kRight},
               {"HANDLE MEMORY", Align::kRight},
               {"PINNED ON HOST", Align::kRight},
               {"WORST ROWS", Align::kRight}});
  for (const BenchPlan& it : plans) {
    table.add({it.mode, size_text(it.plan.window_bytes), size_text(it.plan.table_bytes),
               std::to_string(it.plan.handles), size_text(it.plan.handle_bytes), size_text(it.plan.pinned_bytes),
               std::to_string(it.plan.worst_rows)});
  }
  return table.text();
}

std::string plan_json(const std::vector<BenchPlan>& plans) {
  json document = json::array();
  for (const BenchPlan& it : plans) {
    document.push_back({{"mode", it.mode},
                        {"window_bytes", it.plan.window_bytes},
                        {"table_bytes", it.plan.table_bytes},
                        {"handles", it.plan.handles},
                        {"handle_bytes", it.plan.handle_bytes},
                        {"pinned_bytes", it.plan.pinned_bytes},
                        {"worst_rows", it.plan.worst_rows}});
  }
  return document.dump(2) + "\n";
}

}  // namespace expertd::ctl
