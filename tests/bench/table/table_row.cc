// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/table_row.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "client/ctl/format.h"
#include "tests/bench/bench_figures.h"

namespace expertd::bench {

namespace {

using nlohmann::json;

constexpr double kMedian = 0.5;
constexpr double kTail = 0.99;
constexpr double kBytesPerUsOfGb = 1e3;  // GB/s are thousands of bytes per microsecond

/// What makes two rows figures of the same case.
const std::vector<const char*>& identity() {
  static const std::vector<const char*> keys = {"operation", "half",   "captured", "mode",  "dtype",
                                                "tokens",    "hidden", "top_k",    "ranks", "asked_executor",
                                                "executor",  "sms",    "mps",      "client"};
  return keys;
}

/// Whether a row takes the place of an older one. Which executor and multiprocessors a row is of is known from its
/// results alone: one that failed is of any, and never takes the place of one that has figures.
bool replaces(const json& row, const json& old) {
  const bool has_results = !old.value("executor", json()).is_null();
  return std::all_of(identity().begin(), identity().end(), [&](const std::string& key) {
    const bool of_results = key == "executor" || key == "sms";
    return (of_results && !has_results) || row.value(key, json()) == old.value(key, json());
  });
}

json number(double value) {
  return value == 0 ? json() : json(std::round(value * 100) / 100);
}

/// p50 of the faster of two copies; 0: neither was measured.
double faster(const Times& copy_engine_us, const Times& kernel_us) {
  const double engine = quantile_of(copy_engine_us, kMedian);
  const double kernel = quantile_of(kernel_us, kMedian);
  return engine == 0 || kernel == 0 ? std::max(engine, kernel) : std::min(engine, kernel);
}

std::string cell(const json& row, const char* key, int digits) {
  const json value = row.value(key, json());
  return value.is_number() ? fixed(value.get<double>(), digits) : "-";
}

std::string form_of(const json& row) {
  std::string text = row.value("operation", "") + " " + row.value("mode", "");
  const json dtype = row.value("dtype", json());
  text += dtype.is_string() ? " " + dtype.get<std::string>() : "";
  text += row.value("captured", false) ? " captured" : "";
  return row.value("half", "both") == "both" ? text : text + " " + row.value("half", "");
}

/// Of two micro-batches in `p50_us`.
json overlap_json(const TableRow& row, double p50_us) {
  return {{"ratio_to_one", number(p50_us / row.single_us)},
          {"one_us", number(row.single_us)},
          {"serial_us", number(row.serial_us)},
          {"serial_ratio", number(row.serial_us / row.single_us)},
          {"communication_us", number(row.communication_us)},
          {"compute_to_communication", number(row.communication_us == 0 ? 0 : row.compute_us / row.communication_us)},
          {"compute_sms", row.compute_sms}};
}

std::string overlap_text(const json& row) {
  const json& overlap = row.at("overlap");
  return form_of(row) + ", " + cell(row, "tokens", 0) + " tokens, two micro-batches: " + cell(row, "p50_us", 1) +
         " us, x " + cell(overlap, "ratio_to_one", 2) + " of one (" + cell(overlap, "one_us", 1) +
         " us; target 1.15 by copy_engine, 1.3 by sm under MPS); one behind the other: " +
         cell(overlap, "serial_us", 1) + " us, x " + cell(overlap, "serial_ratio", 2) + "; computation is x " +
         cell(overlap, "compute_to_communication", 2) + " of communication, on " + cell(overlap, "compute_sms", 0) +
         " multiprocessors\n";
}

}  // namespace

double quantile_of(Times times, double quantile) {
  if (times.empty()) {
    return 0;
  }
  std::sort(times.begin(), times.end());
  const auto rank = static_cast<size_t>(std::ceil(quantile * static_cast<double>(times.size())));
  return times[std::clamp<size_t>(rank, 1, times.size()) - 1];
}

Times slowest_of(const std::vector<Times>& ranks) {
  if (ranks.empty()) {
    return {};
  }
  Times slowest = ranks.front();
  for (const Times& rank : ranks) {
    slowest.resize(std::min(slowest.size(), rank.size()));
    for (size_t i = 0; i < slowest.size(); ++i) {
      slowest[i] = std::max(slowest[i], rank[i]);
    }
  }
  return slowest;
}

double TableRow::floor_us() const {
  return faster(floor_copy_engine_us, floor_sm_us);
}

double TableRow::floor_least_us() const {
  return faster(floor_least_copy_engine_us, floor_least_sm_us);
}

json row_json(const TableRow& row) {
  const double p50 = quantile_of(row.times_us, kMedian);
  const auto rate = [&](double bytes) { return p50 == 0 ? json() : number(bytes / p50 / kBytesPerUsOfGb); };
  json document = {
      {"operation", row.it.operation},
      {"half", row.it.half},
      {"captured", row.it.captured},
      {"mode", row.it.mode()},
      {"dtype", row.it.dtype.empty() ? json() : json(row.it.dtype)},
      {"tokens", row.it.shape.tokens},
      {"hidden", row.it.shape.hidden},
      {"top_k", row.it.shape.top_k},
      {"experts", row.it.shape.experts},
      {"ranks", row.it.shape.ranks},
      {"asked_executor", row.asked_executor},
      {"link_sms", row.link_sms},
      {"executor", row.executor.empty() ? json() : json(row.executor)},
      {"sms", row.executor.empty() || row.it.captured ? json() : json(row.sms)},
      {"mps", row.mps},
      {"client", row.busy ? "busy" : "idle"},
      {"clock", row.clock.empty() ? json() : json(row.clock)},
      {"p50_us", number(p50)},
      {"p99_us", number(quantile_of(row.times_us, kTail))},
      {"p50_switch_us", number(quantile_of(row.switch_us, kMedian))},
      {"p99_switch_us", number(quantile_of(row.switch_us, kTail))},
      {"clock_offset_us", number(row.clock_offset_us)},
      {"local_wait_us", number(quantile_of(row.local_wait_us, kMedian))},
      {"local_wait_p99_us", number(quantile_of(row.local_wait_us, kTail))},
      {"link_gbps", rate(row.link_bytes)},
      {"logical_gbps", rate(row.logical_bytes)},
      {"link_bytes", row.link_bytes},
      {"floor_us", number(row.floor_us())},
      {"floor_copy_engine_us", number(quantile_of(row.floor_copy_engine_us, kMedian))},
      {"floor_sm_us", number(quantile_of(row.floor_sm_us, kMedian))},
      {"floor_least_us", number(row.floor_least_us())},
      {"ratio", row.floor_us() == 0 ? json() : number(p50 / row.floor_us())},
      {"nccl_us", number(quantile_of(row.nccl_us, kMedian))},
      {"nccl_p99_us", number(quantile_of(row.nccl_us, kTail))},
      {"queued_us", number(row.queued_us)},
      {"replay_us", number(row.replay_us)},
      {"compute_us", number(row.compute_us)},
      {"client_slowdown", number(row.client_slowdown)},
      {"client_slowdown_marks", number(row.client_slowdown_marks)},
      {"daemon_cpu_percent", number(row.daemon_cpu_percent)},
      {"iterations", row.times_us.size()},
      {"device", row.device},
      {"verified", row.verified},
  };
  if (row.single_us != 0) {
    document["overlap"] = overlap_json(row, p50);
  }
  if (row.measure_s != 0) {
    document["seconds"] = {
        {"set_up", number(row.set_up_s)}, {"measure", number(row.measure_s)}, {"verify", number(row.verify_s)}};
  }
  if (!row.error.empty()) {
    document["error"] = row.error;
  }
  return document;
}

json merged(json base, const json& more) {
  for (const json* document : {&std::as_const(base), &more}) {
    if (!document->is_object() || !document->contains("rows") || !(*document)["rows"].is_array()) {
      throw std::runtime_error("not a document of this program: it has no array of rows");
    }
  }
  json& rows = base["rows"];
  for (const json& row : more["rows"]) {
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const json& old) { return replaces(row, old); });
    if (found == rows.end()) {
      rows.push_back(row);
    } else {
      *found = row;
    }
  }
  if (base.value("mps", json()) != more.value("mps", json())) {
    base["mps"] = "both";
  }
  return base;
}

json resumable(const json& document, const std::string& commit, const std::string& device) {
  const bool same = document.is_object() && document.value("commit", json()) == json(commit) &&
                    document.value("device", json()) == json(device);
  if (!same || !document.contains("rows") || !document["rows"].is_array()) {
    return {};
  }
  json kept = document;
  json& rows = kept["rows"];
  rows.erase(std::remove_if(rows.begin(), rows.end(), [](const json& row) { return !row.value("verified", false); }),
             rows.end());
  return rows.empty() ? json() : kept;
}

bool has_row(const json& document, const TableRow& row) {
  constexpr const char* kKeys[] = {"operation", "half",  "captured", "mode",           "dtype",    "tokens", "hidden",
                                   "top_k",     "ranks", "experts",  "asked_executor", "link_sms", "mps",    "client"};
  const json wanted = row_json(row);
  const json& rows = document.is_object() && document.contains("rows") ? document["rows"] : json::array();
  return std::any_of(rows.begin(), rows.end(), [&](const json& there) {
    return std::all_of(std::begin(kKeys), std::end(kKeys),
                       [&](const char* key) { return there.value(key, json()) == wanted.at(key); });
  });
}

std::string table_text(const json& document) {
  using ctl::Align;
  ctl::Table table({{"OPERATION"},
                    {"TOKENS", Align::kRight},
                    {"HIDDEN", Align::kRight},
                    {"TOP", Align::kRight},
                    {"MPS"},
                    {"CLIENT"},
                    {"BY"},
                    {"SMS", Align::kRight},
                    {"P50 µs", Align::kRight},
                    {"P99 µs", Align::kRight},
                    {"SWITCH µs", Align::kRight},
                    {"LOCAL µs", Align::kRight},
                    {"LINK GB/s", Align::kRight},
                    {"FLOOR µs", Align::kRight},
                    {"RATIO", Align::kRight},
                    {"NCCL µs", Align::kRight},
                    {"QUEUED µs", Align::kRight},
                    {"GEMMS µs", Align::kRight},
                    {"CLIENT x", Align::kRight},
                    {"CPU %", Align::kRight},
                    {"VERIFIED"}});
  for (const json& row : document.at("rows")) {
    table.add({form_of(row),
               cell(row, "tokens", 0),
               cell(row, "hidden", 0),
               cell(row, "top_k", 0),
               row.value("mps", false) ? "yes" : "no",
               row.value("client", ""),
               row.value("executor", json()).is_string() ? row.value("executor", "") : "-",
               cell(row, "sms", 0),
               cell(row, "p50_us", 1),
               cell(row, "p99_us", 1),
               cell(row, "p50_switch_us", 1),
               cell(row, "local_wait_us", 1),
               cell(row, "link_gbps", 0),
               cell(row, "floor_us", 1),
               cell(row, "ratio", 2),
               cell(row, "nccl_us", 1),
               cell(row, row.value("captured", false) ? "replay_us" : "queued_us", 1),
               cell(row, "compute_us", 1),
               cell(row, "client_slowdown", 2),
               cell(row, "daemon_cpu_percent", 0),
               row.value("verified", false) ? "yes" : "NO"});
  }
  std::string text = table.text();
  for (const json& row : document.at("rows")) {
    text += row.contains("overlap") ? overlap_text(row) : std::string();
    if (row.contains("error")) {
      text += form_of(row) + ", " + cell(row, "tokens", 0) + " tokens, " + row.value("client", "") + ": " +
              row.value("error", "") + "\n";
    }
  }
  return text;
}

bool all_verified(const json& document) {
  const json& rows = document.at("rows");
  return std::all_of(rows.begin(), rows.end(), [](const json& row) { return row.value("verified", false); });
}

}  // namespace expertd::bench
