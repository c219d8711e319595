// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/collector.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/base/fd.h"
#include "daemon/metrics/catalog.h"

namespace expertd::metrics {
namespace {

constexpr uint32_t kGpus = 8;
constexpr size_t kSeriesMax = 2500;

class FakeGauges final : public GaugeSource {
 public:
  Gauges gauges() override {
    ++calls;
    return values;
  }
  Gauges values;
  int calls = 0;
};

/// The largest node the budget is for: 8 GPUs, host devices, and the daemon's threads.
std::shared_ptr<Blocks> full_blocks() {
  auto blocks = std::make_shared<Blocks>();
  for (uint32_t i = 0; i < kGpus; ++i) {
    blocks->add_device(gpu_label(false, i));
    blocks->add_thread("gpu" + std::to_string(i));
  }
  for (uint32_t i = 0; i < 64; ++i) {
    blocks->add_device(gpu_label(true, kGpus + i));
    blocks->add_thread(std::string(kHostLabel));
  }
  for (const char* name : {"attach", "control", "supervise", "reclaim"}) {
    blocks->add_thread(name);
  }
  return blocks;
}

CollectorOptions options_for_test() {
  CollectorOptions options;
  options.build = {.version = "0.1.0", .commit = "abc", .cuda = "", .ucx = "", .abi = "1.0"};
  return options;
}

std::vector<std::string> samples(const std::string& page) {
  std::vector<std::string> out;
  std::istringstream lines(page);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.front() != '#') {
      out.push_back(line);
    }
  }
  return out;
}

bool has_line(const std::string& page, const std::string& line) {
  const std::vector<std::string> all = samples(page);
  return std::ranges::find(all, line) != all.end();
}

/// One GET over a fresh connection; empty when nothing answers within five seconds.
std::string http_get(uint16_t port, const std::string& path) {
  const base::ScopedFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval patience{5, 0};
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return {};
  }
  const std::string request = "GET " + path + " HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
  send(fd.get(), request.data(), request.size(), MSG_NOSIGNAL);
  std::string reply;
  char buffer[4096];
  for (ssize_t got = 0; (got = recv(fd.get(), buffer, sizeof(buffer), 0)) > 0;) {
    reply.append(buffer, static_cast<size_t>(got));
  }
  return reply;
}

/// A server that leaves at once.
struct Scoped {
  explicit Scoped(std::shared_ptr<const Blocks> blocks, FakeGauges& gauges) {
    auto created = MetricsServer::create(options_for_test(), std::move(blocks), gauges);
    EXPECT_TRUE(created.is_ok()) << created.status().message();
    if (created.is_ok()) {
      server = std::move(created).value();
    }
  }
  ~Scoped() {
    if (server != nullptr) {
      server->detach();
    }
  }
  std::unique_ptr<MetricsServer> server;
};

TEST(MetricsServer, AllSeriesExistFromTheStartWithinTheBudget) {
  FakeGauges gauges;
  gauges.values.fabric.mesh = {{.node = "b", .lane = "latency", .device = ""}};  // there once it was measured
  const Scoped scoped(full_blocks(), gauges);
  const std::string page = scoped.server->render();
  const std::vector<std::string> all = samples(page);
  EXPECT_LE(all.size(), kSeriesMax);
  RecordProperty("series", static_cast<int>(all.size()));
  std::printf("series with 8 GPUs and host devices: %zu\n", all.size());
  EXPECT_EQ(std::set<std::string>(all.begin(), all.end()).size(), all.size());
  for (const MetricInfo& metric : kCatalog) {
    const std::string name(metric.name);
    EXPECT_NE(page.find("\n" + name + (metric.type == MetricType::kHistogram ? "_count" : "")), std::string::npos)
        << name;
    EXPECT_NE(page.find("# HELP " + name + " "), std::string::npos) << name;
  }
  // Nothing happened yet: counters are there, at zero.
  for (const std::string& line : all) {
    if (line.starts_with("expertd_") && line.find("_total") != std::string::npos) {
      EXPECT_TRUE(line.ends_with(" 0")) << line;
    }
  }
}

TEST(MetricsServer, SeriesDoNotGrowWithValues) {
  FakeGauges gauges;
  const auto blocks = full_blocks();
  const Scoped scoped(blocks, gauges);
  const size_t before = samples(scoped.server->render()).size();
  for (const auto& device : blocks->devices()) {
    for (uint32_t op = 0; op < 10; ++op) {
      for (uint32_t reason = 0; reason < 140; ++reason) {
        OpRecord record;
        record.op = op;
        record.reason = reason;
        record.missing = reason;
        record.executor = reason;
        device->ops.record(record);
        device->ops.reject(reason);
        device->ops.descriptor_invalid(reason);
      }
    }
  }
  gauges.values.state = "no such state";
  gauges.values.devices.resize(3);
  gauges.values.devices[1].gpu = "made-up";
  EXPECT_EQ(samples(scoped.server->render()).size(), before);
}

TEST(MetricsServer, ValuesOfHostDevicesAreTakenTogether) {
  auto blocks = std::make_shared<Blocks>();
  Blocks::Device& first = blocks->add_device(gpu_label(true, 0));
  Blocks::Device& second = blocks->add_device(gpu_label(true, 1));
  Blocks::Device& gpu = blocks->add_device(gpu_label(false, 2));
  OpRecord op;
  op.op = EXPERTD_OP_LL_DISPATCH;
  op.tokens = 4;
  op.remote_bytes = 64;
  op.phases[Phase::kTotal] = 25'000;
  op.executor = EXPERTD_COMPLETION_EXECUTOR_HOST;
  first.ops.record(op);
  second.ops.record(op);
  op.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  op.sms = 100;
  op.phases[Phase::kKernel] = 20'000;
  gpu.ops.record(op);
  op.reason = EXPERTD_REASON_PEER_LOST;
  gpu.ops.record(op);
  first.ops.ring_used(9);
  second.ops.ring_used(4);
  blocks->add_thread("host").lag(3'000'000);
  blocks->process().session_opened();
  blocks->process().session_closed(CloseCause::kEof);
  blocks->process().lease_reaped(3'000'000);
  FakeGauges gauges;
  gauges.values.state = "ready";
  gauges.values.sessions = 2;
  gauges.values.devices = {
      {.gpu = "host", .pool_used_bytes = 1, .pool_registered_bytes = 5, .ring_slots_capacity = 64},
      {.gpu = "host", .pool_used_bytes = 2, .pool_registered_bytes = 6, .ring_slots_capacity = 64, .healthy = false},
      {.gpu = "2", .context_bytes = std::numeric_limits<double>::quiet_NaN()}};
  const Scoped scoped(blocks, gauges);
  const std::string page = scoped.server->render();
  for (const char* line : {
           R"(expertd_state{state="ready"} 1)",
           R"(expertd_state{state="draining"} 0)",
           R"(expertd_sessions 2)",
           R"(expertd_ops_total{op="ll_dispatch",gpu="host",result="ok"} 2)",
           R"(expertd_ops_total{op="ll_dispatch",gpu="2",result="failed"} 1)",
           R"(expertd_op_failed_total{op="ll_dispatch",reason="PEER_LOST"} 1)",
           R"(expertd_op_tokens_total{op="ll_dispatch",gpu="host"} 8)",
           R"(expertd_op_bytes_total{op="ll_dispatch",gpu="2",path="remote"} 64)",
           R"(expertd_op_executed_total{op="ll_dispatch",gpu="host",executor="host"} 2)",
           R"(expertd_op_executed_total{op="ll_dispatch",gpu="2",executor="sm"} 1)",
           R"(expertd_op_executed_total{op="ll_dispatch",gpu="2",executor="copy_engine"} 0)",
           R"(expertd_op_sm_seconds_total{op="ll_dispatch",gpu="host"} 0)",
           R"(expertd_op_sm_seconds_total{op="ll_dispatch",gpu="2"} 0.002)",
           R"(expertd_op_duration_seconds_count{op="ll_dispatch",phase="total"} 3)",
           R"(expertd_op_duration_seconds_count{op="ll_dispatch",phase="queue"} 0)",
           R"(expertd_op_total_duration_seconds_bucket{op="ll",gpu="host",le="2e-05"} 0)",
           R"(expertd_op_total_duration_seconds_bucket{op="ll",gpu="host",le="3e-05"} 2)",
           R"(expertd_op_total_duration_seconds_bucket{op="ll",gpu="host",le="+Inf"} 2)",
           R"(expertd_op_total_duration_seconds_sum{op="ll",gpu="host"} 5e-05)",
           R"(expertd_ring_slots_used{gpu="host"} 9)",
           R"(expertd_ring_slots_capacity{gpu="host"} 64)",
           R"(expertd_pool_bytes{gpu="host",state="used"} 3)",
           R"(expertd_pool_bytes{gpu="host",state="registered"} 11)",
           R"(expertd_gpu_context_bytes{gpu="host"} 0)",
           R"(expertd_gpu_context_bytes{gpu="2"} Nan)",
           R"(expertd_gpu_healthy{gpu="host"} 0)",
           R"(expertd_gpu_healthy{gpu="2"} 1)",
           R"(expertd_thread_loop_lag_seconds{thread="host"} 0.003)",
           R"(expertd_sessions_closed_total{cause="eof"} 1)",
           R"(expertd_lease_reap_duration_seconds_bucket{le="0.005"} 1)",
       }) {
    EXPECT_TRUE(has_line(page, line)) << line;
  }
  // Maxima are of the time since the last scrape.
  EXPECT_TRUE(has_line(scoped.server->render(), R"(expertd_ring_slots_used{gpu="host"} 0)"));
}

TEST(MetricsServer, TheFabricIsShownByStateLaneAndCause) {
  FakeGauges gauges;
  FabricGauges& fabric = gauges.values.fabric;
  fabric.enabled = true;
  fabric.transports = "tcp,shm";
  fabric.rendezvous_up = true;
  fabric.groups = 3;
  fabric.peers = {1, 2, 4};
  fabric.failures[1] = 5;
  fabric.dropped[6] = 6;
  fabric.lanes[1] = {.sent_messages = 7,
                     .sent_bytes = 8,
                     .received_messages = 9,
                     .received_bytes = 10,
                     .in_flight = 11,
                     .deferred = 12};
  fabric.mesh = {{.node = "b",
                  .lane = "throughput",
                  .device = "mlx5_0:1",
                  .latency_p50_ns = 2'000'000,
                  .latency_p99_ns = 4'000'000,
                  .bytes_per_second = 13}};
  fabric.rtt[1] = 2;
  fabric.rtt.back() = 1;
  fabric.rtt_sum_ns = 2'000'000'000;
  auto blocks = std::make_shared<Blocks>();
  OpRecord op;
  op.op = EXPERTD_OP_DISPATCH;
  op.fabric_bytes = 64;
  blocks->add_device(gpu_label(true, 0)).ops.record(op);
  EXPECT_EQ(blocks->devices()[0]->ops.totals(EXPERTD_OP_DISPATCH).remote_bytes, 64U);
  const Scoped scoped(blocks, gauges);
  const std::string page = scoped.server->render();
  for (const char* line : {
           R"(expertd_fabric_backend_info{backend="staged",transports="tcp,shm"} 1)",
           R"(expertd_fabric_peers{state="connecting"} 1)",
           R"(expertd_fabric_peers{state="lost"} 4)",
           R"(expertd_fabric_peer_failures_total{cause="silent"} 5)",
           R"(expertd_fabric_dropped_total{cause="overrun"} 6)",
           R"(expertd_fabric_messages_total{lane="throughput",direction="sent"} 7)",
           R"(expertd_fabric_bytes_total{lane="throughput",direction="sent"} 8)",
           R"(expertd_fabric_messages_total{lane="throughput",direction="received"} 9)",
           R"(expertd_fabric_bytes_total{lane="throughput",direction="received"} 10)",
           R"(expertd_fabric_inflight{lane="throughput"} 11)",
           R"(expertd_fabric_deferred_total{lane="throughput"} 12)",
           R"(expertd_fabric_messages_total{lane="latency",direction="sent"} 0)",
           R"(expertd_fabric_heartbeat_rtt_seconds_bucket{le="2e-05"} 0)",
           R"(expertd_fabric_heartbeat_rtt_seconds_bucket{le="5e-05"} 2)",
           R"(expertd_fabric_heartbeat_rtt_seconds_count 3)",
           R"(expertd_fabric_heartbeat_rtt_seconds_sum 2)",
           R"(expertd_fabric_mesh_latency_seconds{node="b",lane="throughput",device="mlx5_0:1",quantile="0.5"} 0.002)",
           R"(expertd_fabric_mesh_latency_seconds{node="b",lane="throughput",device="mlx5_0:1",quantile="0.99"} 0.004)",
           R"(expertd_fabric_mesh_bytes_per_second{node="b",lane="throughput",device="mlx5_0:1"} 13)",
           R"(expertd_groups_spanning 3)",
           R"(expertd_rendezvous_up 1)",
           R"(expertd_op_bytes_total{op="dispatch",gpu="host",path="fabric"} 64)",
           R"(expertd_op_bytes_total{op="dispatch",gpu="host",path="remote"} 0)",
       }) {
    EXPECT_TRUE(has_line(page, line)) << line;
  }
}

TEST(MetricsServer, AnswersOverHttpUntilDetached) {
  FakeGauges gauges;
  auto created = MetricsServer::create(options_for_test(), full_blocks(), gauges);
  ASSERT_TRUE(created.is_ok());
  std::unique_ptr<MetricsServer> server = std::move(created).value();
  EXPECT_NE(server->port(), 0);
  EXPECT_EQ(server->address(), "127.0.0.1:" + std::to_string(server->port()));
  const uint64_t scrape_ns = base::now_ns();
  const std::string reply = http_get(server->port(), "/metrics");
  std::printf("scrape at full series: %.1f ms, %zu bytes\n", static_cast<double>(base::now_ns() - scrape_ns) / 1e6,
              reply.size());
  EXPECT_TRUE(reply.starts_with("HTTP/1.1 200"));
  EXPECT_NE(reply.find("expertd_build_info{version=\"0.1.0\""), std::string::npos);
  const int calls = gauges.calls;
  EXPECT_GT(calls, 0);
  const uint16_t port = server->port();
  const uint64_t begin_ns = base::now_ns();
  server->detach();
  server.reset();
  EXPECT_LT(base::now_ns() - begin_ns, 500'000'000U);
  // The parked HTTP server no longer touches what may be gone.
  http_get(port, "/metrics");
  EXPECT_EQ(gauges.calls, calls);
}

TEST(MetricsServer, BusyPortIsNamed) {
  FakeGauges gauges;
  const Scoped first(full_blocks(), gauges);
  CollectorOptions options = options_for_test();
  options.port = first.server->port();
  const auto second = MetricsServer::create(options, full_blocks(), gauges);
  EXPECT_EQ(second.status().reason(), EXPERTD_REASON_ADDRESS_IN_USE);
  EXPECT_NE(second.status().message().find(first.server->address()), std::string::npos);
}

TEST(MetricsCatalog, NamesFollowTheRules) {
  const std::set<std::string> allowed_labels = {"version", "commit",    "cuda",    "ucx",      "abi",     "state",
                                                "op",      "gpu",       "result",  "reason",   "phase",   "path",
                                                "cause",   "thread",    "missing", "executor", "backend", "transports",
                                                "lane",    "direction", "node",    "device",   "quantile"};
  std::set<std::string_view> names;
  for (const MetricInfo& metric : kCatalog) {
    const std::string name(metric.name);
    EXPECT_TRUE(names.insert(metric.name).second) << name;
    EXPECT_TRUE(name.starts_with("expertd_") || name.starts_with("process_")) << name;
    EXPECT_TRUE(std::ranges::all_of(name, [](char c) {
      return std::islower(c) != 0 || std::isdigit(c) != 0 || c == '_';
    })) << name;
    EXPECT_EQ(name.ends_with("_total"), metric.type == MetricType::kCounter) << name;
    if (metric.type == MetricType::kHistogram) {
      EXPECT_TRUE(name.ends_with("_seconds")) << name;
    }
    for (const char* wrong :
         {"_ms", "_us", "_ns", "_milliseconds", "_kb", "_mb", "_percent", "_count", "_sum", "_bucket"}) {
      EXPECT_FALSE(name.ends_with(wrong)) << name;
    }
    EXPECT_TRUE(metric.help.ends_with(".")) << name;
    EXPECT_EQ(metric.help.find('\n'), std::string_view::npos) << name;
    std::istringstream labels{std::string(metric.labels)};
    for (std::string label; std::getline(labels, label, ',');) {
      EXPECT_TRUE(allowed_labels.contains(label)) << name << " " << label;
    }
  }
  for (const auto& bounds : {bounds_of(Metric::kOpDuration), bounds_of(Metric::kLeaseReapDuration)}) {
    EXPECT_TRUE(std::ranges::is_sorted(bounds));
  }
  EXPECT_EQ(kOpBoundsNs.size(), 17U);
}

TEST(MetricsCatalog, PromtoolFindsNothing) {
  if (std::system("command -v promtool > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "promtool (Debian package prometheus) is not installed";
  }
  FakeGauges gauges;
  const Scoped scoped(full_blocks(), gauges);
  char path[] = "/tmp/expertd-metrics-XXXXXX";
  const base::ScopedFd file(mkstemp(path));
  ASSERT_TRUE(file.valid());
  std::ofstream(path) << scoped.server->render();
  const int code = std::system((std::string("promtool check metrics < ") + path).c_str());
  unlink(path);
  EXPECT_EQ(code, 0);
}

TEST(MetricsCatalog, DocumentIsCurrent) {
  const std::string path = std::string(EXPERTD_SOURCE_DIR) + "/deploy/monitoring/metrics.md";
  if (std::getenv("EXPERTD_WRITE_DOCS") != nullptr) {
    std::ofstream(path) << metrics_markdown();
  }
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), metrics_markdown()) << "write it with EXPERTD_WRITE_DOCS=1";
}

}  // namespace
}  // namespace expertd::metrics
