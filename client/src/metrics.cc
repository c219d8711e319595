// SPDX-License-Identifier: Apache-2.0
#include "client/src/metrics.h"

#include <array>
#include <atomic>
#include <cstdio>

#include "client/src/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::client {
namespace {

// Upper bounds: dense where low-latency operations lie, then up to a large prefill and a stuck one.
constexpr std::array<uint64_t, 17> kBoundsNs = {5'000,   10'000,    15'000,    20'000,     30'000,     40'000,
                                                60'000,  80'000,    120'000,   160'000,    240'000,    320'000,
                                                640'000, 1'280'000, 5'000'000, 20'000'000, 100'000'000};
constexpr std::array<const char*, EXPERTD_OP_COUNT> kOpNames = {"none",    "barrier",     "layout",    "dispatch",
                                                                "combine", "ll_dispatch", "ll_combine"};

struct OpMetrics {
  std::array<std::atomic<uint64_t>, kBoundsNs.size() + 1> buckets{};
  std::atomic<uint64_t> sum_ns{0};
  std::atomic<uint64_t> ok{0};
  std::atomic<uint64_t> failed{0};
  std::atomic<uint64_t> bytes{0};
};

// Constant-initialised; there is nothing to destroy.
std::array<OpMetrics, EXPERTD_OP_COUNT> ops{};
std::atomic<uint64_t> staged_copies{0};
std::atomic<uint64_t> staged_bytes{0};
std::atomic<uint64_t> reattaches{0};
std::atomic<uint64_t> local_ops{0};
std::atomic<uint64_t> missing_kernels{0};
std::atomic<int64_t> sessions{0};

uint64_t load(const std::atomic<uint64_t>& counter) {
  return counter.load(std::memory_order_relaxed);
}
void add(std::atomic<uint64_t>* counter, uint64_t amount) {
  counter->fetch_add(amount, std::memory_order_relaxed);
}

using Number = unsigned long long;

void append_head(std::string* text, const char* name, const char* type, const char* help) {
  *text += format("# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

void append_plain(std::string* text, const char* name, const char* type, const char* help, uint64_t value) {
  append_head(text, name, type, help);
  *text += format("%s %llu\n", name, static_cast<Number>(value));
}

void append_histogram(std::string* text, uint32_t op) {
  constexpr const char* kName = "expertd_client_op_duration_seconds";
  const OpMetrics& metrics = ops[op];
  uint64_t total = 0;
  for (size_t i = 0; i < kBoundsNs.size(); ++i) {
    total += load(metrics.buckets[i]);
    *text += format("%s_bucket{op=\"%s\",le=\"%.9g\"} %llu\n", kName, kOpNames[op],
                    static_cast<double>(kBoundsNs[i]) * 1e-9, static_cast<Number>(total));
  }
  total += load(metrics.buckets[kBoundsNs.size()]);
  *text += format("%s_bucket{op=\"%s\",le=\"+Inf\"} %llu\n", kName, kOpNames[op], static_cast<Number>(total));
  *text += format("%s_sum{op=\"%s\"} %.9f\n", kName, kOpNames[op], static_cast<double>(load(metrics.sum_ns)) * 1e-9);
  *text += format("%s_count{op=\"%s\"} %llu\n", kName, kOpNames[op], static_cast<Number>(total));
}

}  // namespace

void observe_op(uint32_t op, bool succeeded, uint64_t duration_ns, uint64_t bytes) {
  if (op == EXPERTD_OP_NONE || op >= EXPERTD_OP_COUNT) {
    return;
  }
  OpMetrics& metrics = ops[op];
  size_t bucket = 0;
  while (bucket < kBoundsNs.size() && duration_ns > kBoundsNs[bucket]) {
    ++bucket;
  }
  add(&metrics.buckets[bucket], 1);
  add(&metrics.sum_ns, duration_ns);
  add(succeeded ? &metrics.ok : &metrics.failed, 1);
  add(&metrics.bytes, bytes);
}

void count_staged_copy(uint64_t bytes) {
  add(&staged_copies, 1);
  add(&staged_bytes, bytes);
}

void count_reattach() {
  add(&reattaches, 1);
}
void count_local_op() {
  add(&local_ops, 1);
}
void count_missing_kernels() {
  add(&missing_kernels, 1);
}
void count_session(int change) {
  sessions.fetch_add(change, std::memory_order_relaxed);
}

std::string metrics_text() {
  std::string text;
  append_head(&text, "expertd_client_op_duration_seconds", "histogram",
              "Time from submission to completion, seen by this process.");
  for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
    append_histogram(&text, op);
  }
  append_head(&text, "expertd_client_ops_total", "counter", "Operations that ended.");
  for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
    text += format("expertd_client_ops_total{op=\"%s\",result=\"ok\"} %llu\n", kOpNames[op],
                   static_cast<Number>(load(ops[op].ok)));
    text += format("expertd_client_ops_total{op=\"%s\",result=\"failed\"} %llu\n", kOpNames[op],
                   static_cast<Number>(load(ops[op].failed)));
  }
  append_head(&text, "expertd_client_bytes_total", "counter", "Payload bytes that operations moved.");
  for (uint32_t op = 1; op < EXPERTD_OP_COUNT; ++op) {
    text +=
        format("expertd_client_bytes_total{op=\"%s\"} %llu\n", kOpNames[op], static_cast<Number>(load(ops[op].bytes)));
  }
  append_plain(&text, "expertd_client_staged_copies_total", "counter",
               "Copies through the library's window for pointers in no known buffer.", load(staged_copies));
  append_plain(&text, "expertd_client_staged_bytes_total", "counter", "Bytes of those copies.", load(staged_bytes));
  append_plain(&text, "expertd_client_reattaches_total", "counter", "Re-attaches to a restarted daemon.",
               load(reattaches));
  append_plain(&text, "expertd_client_local_ops_total", "counter",
               "Operations that the library's own kernels executed on the caller's stream.", load(local_ops));
  append_plain(&text, "expertd_client_sessions_without_kernels_total", "counter",
               "GPU sessions that could not load the library's kernels: the daemon executes their local work.",
               load(missing_kernels));
  const int64_t open = sessions.load(std::memory_order_relaxed);
  append_plain(&text, "expertd_client_sessions", "gauge", "Sessions of this process.",
               open > 0 ? static_cast<uint64_t>(open) : 0);
  return text;
}

}  // namespace expertd::client
