// SPDX-License-Identifier: Apache-2.0
// The cost of the daemon itself: an operation without work (the barrier of a group of one rank, from submission to
// completion) against the smallest unary gRPC calls to the same daemon in the same run, the first operation after a
// second of idleness, and what the idle daemon costs with eight sessions attached. Operations are timed twice: with
// client and engine kept on different CPUs, and wherever the scheduler puts them. One thread.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "client/ctl/daemon_client.h"
#include "client/ctl/format.h"
#include "expertd.h"
#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"
#include "tests/bench/placement.h"

namespace expertd::bench {

namespace {

constexpr uint64_t kTimeoutNs = 10'000'000'000;
constexpr uint32_t kRounds = 20;       // operations and calls take turns, a block each
constexpr uint32_t kOperations = 500;  // of a block
constexpr uint32_t kCalls = 200;       // of a block
constexpr uint32_t kUntimed = 50;      // at the start of a block: both sides are awake behind them
constexpr uint32_t kIdleRepeats = 5;
constexpr uint32_t kIdleSessions = 8;
constexpr std::chrono::milliseconds kIdleBefore{1000};
constexpr std::chrono::milliseconds kIdleCpuTime{8000};

void check(expertd_status_t status, const char* what) {
  if (status.reason != EXPERTD_REASON_NONE) {
    throw std::runtime_error(std::string(what) + ": " + expertd_last_message());
  }
}

/// A session on host:0; detached by the destructor.
class Session {
 public:
  explicit Session(const std::string& socket) {
    auto options = EXPERTD_INIT(expertd_attach_options_t);
    options.socket_path = socket.c_str();
    options.device = "host:0";
    options.name = "empty_op";
    check(expertd_attach(&options, &session_), "attach");
  }
  // The session ends with the process in any case.
  ~Session() { static_cast<void>(expertd_detach(session_)); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  expertd_group_t* join_alone() {
    const std::string name = "empty-op-" + std::to_string(getpid());
    auto options = EXPERTD_INIT(expertd_group_options_t);
    options.name = name.c_str();
    options.expert_parallel_size = 1;
    options.num_experts = 8;
    options.hidden = 128;
    options.top_k = 1;
    options.max_tokens = 16;
    options.mode = EXPERTD_MODE_NORMAL;
    expertd_group_t* group = nullptr;
    check(expertd_group_join(session_, &options, &group), "join");
    return group;
  }

 private:
  expertd_session_t* session_ = nullptr;
};

struct Figures {
  std::vector<uint64_t> apart_ns;  // empty where client and engine cannot be kept on different CPUs
  std::vector<uint64_t> free_ns, health_ns, status_ns, after_idle_ns;
  double idle_cpu_percent = 0;
};

uint64_t time_operation(expertd_group_t* group) {
  const uint64_t begin = now_ns();
  expertd_event_t event{};
  check(expertd_barrier(group, nullptr, 0, kTimeoutNs, &event), "barrier");
  check(expertd_event_wait(event, kTimeoutNs, nullptr), "barrier");
  return now_ns() - begin;
}

template <typename Call>
void block(uint32_t count, std::vector<uint64_t>* times, const Call& timed) {
  for (uint32_t i = 0; i < kUntimed + count; ++i) {
    const uint64_t time = timed();
    if (i >= kUntimed) {
      times->push_back(time);
    }
  }
}

template <typename Call>
uint64_t time_call(const Call& call) {
  const uint64_t begin = now_ns();
  const auto reply = call();
  const uint64_t end = now_ns();
  if (!reply.ok) {
    throw std::runtime_error(reply.error.message);
  }
  return end - begin;
}

void measure_times(const BenchDaemon& daemon, Figures* figures) {
  Session session(daemon.attach_socket());
  expertd_group_t* const group = session.join_alone();
  ctl::DaemonClient client(daemon.control_socket(), kTimeoutNs);
  const auto operation = [&] { return time_operation(group); };
  const auto before = thread_times_ns(daemon.pid());
  std::vector<uint64_t> untimed;
  block(kOperations, &untimed, operation);
  const pid_t engine = busiest_thread(daemon.pid(), before);
  for (uint32_t round = 0; round < kRounds; ++round) {
    block(kOperations, &figures->free_ns, operation);
    if (const Apart apart(engine); apart.holds()) {
      block(kOperations, &figures->apart_ns, operation);
    }
    block(kCalls, &figures->health_ns, [&] { return time_call([&] { return client.serving(""); }); });
    block(kCalls, &figures->status_ns, [&] { return time_call([&] { return client.status(); }); });
  }
  for (uint32_t repeat = 0; repeat < kIdleRepeats; ++repeat) {
    idle_for(kIdleBefore);
    figures->after_idle_ns.push_back(time_operation(group));
  }
}

/// Ticks of CPU time that a process has used, user and system.
uint64_t cpu_ticks(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const size_t name_end = text.rfind(')');
  unsigned long long user = 0;
  unsigned long long system = 0;
  // Behind the name: state and ten numbers, then utime and stime.
  if (name_end == std::string::npos ||
      std::sscanf(text.c_str() + name_end + 1, " %*c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu %llu", &user,
                  &system) != 2) {
    throw std::runtime_error("cannot read the CPU time of process " + std::to_string(pid));
  }
  return user + system;
}

void measure_idle(const BenchDaemon& daemon, Figures* figures) {
  std::vector<std::unique_ptr<Session>> sessions;
  for (uint32_t i = 0; i < kIdleSessions; ++i) {
    sessions.push_back(std::make_unique<Session>(daemon.attach_socket()));
  }
  idle_for(kIdleBefore);
  const uint64_t ticks = cpu_ticks(daemon.pid());
  const uint64_t begin = now_ns();
  idle_for(kIdleCpuTime);
  const auto used = static_cast<double>(cpu_ticks(daemon.pid()) - ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
  figures->idle_cpu_percent = 100 * used / (static_cast<double>(now_ns() - begin) / 1e9);
}

/// How often an operation fits into the faster of the two calls; 0 for operations that were not timed.
double ratio_of(const Figures& figures, const std::vector<uint64_t>& operation_ns) {
  return operation_ns.empty() ? 0
                              : std::min(quantile_us(figures.health_ns, 0.5), quantile_us(figures.status_ns, 0.5)) /
                                    quantile_us(operation_ns, 0.5);
}

void print_table(const BenchDaemon& daemon, const Figures& figures) {
  using ctl::Align;
  ctl::Table table({{"WHAT"},
                    {"SAMPLES", Align::kRight},
                    {"P10 µs", Align::kRight},
                    {"P50 µs", Align::kRight},
                    {"P99 µs", Align::kRight}});
  const auto add = [&table](const char* what, const std::vector<uint64_t>& times) {
    if (times.empty()) {
      return table.add({what, "0"});
    }
    table.add({what, std::to_string(times.size()), fixed(quantile_us(times, 0.1), 1), fixed(quantile_us(times, 0.5), 1),
               fixed(quantile_us(times, 0.99), 1)});
  };
  add("empty operation, client and engine on different CPUs", figures.apart_ns);
  add("empty operation, as scheduled", figures.free_ns);
  add("gRPC unary call, health check", figures.health_ns);
  add("gRPC unary call, GetStatus", figures.status_ns);
  add("first operation after 1 s idle", figures.after_idle_ns);
  std::cout << "daemon " << daemon.version() << ", " << utc_now() << "\n"
            << table.text() << "the faster gRPC call takes " << fixed(ratio_of(figures, figures.apart_ns), 1)
            << " times the empty operation on different CPUs, " << fixed(ratio_of(figures, figures.free_ns), 1)
            << " times it as scheduled (p50)\n"
            << "idle daemon with " << kIdleSessions << " sessions: " << fixed(figures.idle_cpu_percent, 2)
            << " % of one core\n";
}

void print_json(const BenchDaemon& daemon, const Figures& figures) {
  const auto times = [](const std::vector<uint64_t>& of) {
    return of.empty() ? nlohmann::json(nullptr)
                      : nlohmann::json{{"samples", of.size()},
                                       {"p10_us", quantile_us(of, 0.1)},
                                       {"p50_us", quantile_us(of, 0.5)},
                                       {"p99_us", quantile_us(of, 0.99)}};
  };
  const nlohmann::json document = {{"daemon", daemon.version()},
                                   {"client", expertd_version()},
                                   {"date", utc_now()},
                                   {"empty_operation_apart", times(figures.apart_ns)},
                                   {"empty_operation_free", times(figures.free_ns)},
                                   {"grpc_health", times(figures.health_ns)},
                                   {"grpc_get_status", times(figures.status_ns)},
                                   {"after_idle", times(figures.after_idle_ns)},
                                   {"grpc_to_apart_ratio", ratio_of(figures, figures.apart_ns)},
                                   {"grpc_to_free_ratio", ratio_of(figures, figures.free_ns)},
                                   {"idle_sessions", kIdleSessions},
                                   {"idle_cpu_percent", figures.idle_cpu_percent}};
  std::cout << document.dump(2) << "\n";
}

int run(int argc, char** argv) {
  CLI::App app("Times an empty operation against a unary gRPC call.", "empty_op");
  std::string runtime_directory;
  bool json = false;
  app.add_option("--runtime-directory", runtime_directory, "Of a running daemon; else one is started");
  app.add_flag("--json", json, "Print JSON in place of the table");
  CLI11_PARSE(app, argc, argv);
  const BenchDaemon daemon(runtime_directory, 1);
  Figures figures;
  measure_times(daemon, &figures);
  measure_idle(daemon, &figures);
  json ? print_json(daemon, figures) : print_table(daemon, figures);
  return 0;
}

}  // namespace

}  // namespace expertd::bench

int main(int argc, char** argv) {
  try {
    return expertd::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "empty_op: " << error.what() << "\n";
    return 1;
  }
}
