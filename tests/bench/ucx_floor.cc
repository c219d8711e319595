// SPDX-License-Identifier: Apache-2.0
// ucx_floor: what UCX moves between two processes of this machine with the transport, message size and copies of the
// daemon's staged path, and nothing else. Prints GB/s and the one-way latency of a message, or JSON.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "daemon/base/fd.h"
#include "tests/bench/ucx_floor_side.h"

namespace expertd::bench {
namespace {

struct Figures {
  double gbps_sent = 0;
  double one_way_p50_us = 0;
  double one_way_p99_us = 0;
};

base::Result<std::string> trade(int socket, const std::string& own) {
  std::string other(8192, '\0');
  if (::send(socket, own.data(), own.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(own.size())) {
    return base::errno_status("telling the other process");
  }
  const ssize_t bytes = ::recv(socket, other.data(), other.size(), 0);
  if (bytes <= 0) {
    return base::Status(EXPERTD_REASON_UNAVAILABLE, "the other process ended");
  }
  other.resize(static_cast<size_t>(bytes));
  return other;
}

base::Result<Figures> run_side(const FloorOptions& options, int socket, bool first) {
  auto made = FloorSide::create(options);
  if (!made.is_ok()) {
    return made.status();
  }
  FloorSide& side = *made.value();
  const auto other = trade(socket, side.address());
  if (!other.is_ok()) {
    return other.status();
  }
  EXPERTD_RETURN_IF_ERROR(side.connect(other.value()));
  Figures figures;
  if (first) {
    const auto half_us = side.ping();
    if (!half_us.is_ok()) {
      return half_us.status();
    }
    const std::vector<double>& sorted = half_us.value();
    figures.one_way_p50_us = sorted[sorted.size() / 2];
    figures.one_way_p99_us = sorted[sorted.size() * 99 / 100];
  } else {
    EXPERTD_RETURN_IF_ERROR(side.answer());
  }
  const auto together = trade(socket, "stream");
  if (!together.is_ok()) {
    return together.status();
  }
  const auto gbps = side.stream(first || options.both, !first || options.both);
  if (!gbps.is_ok()) {
    return gbps.status();
  }
  figures.gbps_sent = gbps.value();
  const auto ended = trade(socket, std::to_string(gbps.value()));
  if (!ended.is_ok()) {
    return ended.status();
  }
  figures.gbps_sent += options.both ? std::stod(ended.value()) : 0.0;
  return figures;
}

int run(const FloorOptions& options, bool as_json) {
  int sockets[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
    std::perror("socketpair");
    return 1;
  }
  const pid_t child = ::fork();  // before UCX, whose state no child may inherit
  if (child < 0) {
    std::perror("fork");
    return 1;
  }
  if (child == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::close(sockets[0]);
    const auto ended = run_side(options, sockets[1], false);
    if (!ended.is_ok()) {
      std::fprintf(stderr, "ucx_floor (second process): %s\n", ended.status().message().c_str());
    }
    std::fflush(stderr);
    ::_exit(ended.is_ok() ? 0 : 1);
  }
  ::close(sockets[1]);
  const auto figures = run_side(options, sockets[0], true);
  ::close(sockets[0]);
  int status = 0;
  (void)::waitpid(child, &status, 0);
  if (!figures.is_ok() || status != 0) {
    std::fprintf(stderr, "ucx_floor: %s\n",
                 figures.is_ok() ? "the second process failed" : figures.status().message().c_str());
    return 1;
  }
  const Figures& all = figures.value();
  if (as_json) {
    const nlohmann::json json = {{"transports", options.transports},
                                 {"devices", options.devices},
                                 {"message_bytes", options.message_bytes},
                                 {"region_bytes", options.region_bytes},
                                 {"buffers", options.buffers},
                                 {"both", options.both},
                                 {"gb_per_s", all.gbps_sent},
                                 {"one_way_p50_us", all.one_way_p50_us},
                                 {"one_way_p99_us", all.one_way_p99_us}};
    std::printf("%s\n", json.dump().c_str());
  } else {
    std::printf("%s, messages of %llu bytes, %s: %.2f GB/s, one way p50 %.1f us, p99 %.1f us\n",
                options.transports.c_str(), static_cast<unsigned long long>(options.message_bytes),
                options.both ? "both directions together" : "one direction", all.gbps_sent, all.one_way_p50_us,
                all.one_way_p99_us);
  }
  return 0;
}

}  // namespace
}  // namespace expertd::bench

int main(int count, char** arguments) {
  expertd::bench::FloorOptions options;
  bool as_json = false;
  CLI::App app{"What UCX moves between two processes with the copies of the daemon's staged path"};
  app.add_option("--transports", options.transports, "as the lane option of that name")->capture_default_str();
  app.add_option("--devices", options.devices, "as the lane option of that name; none: all");
  app.add_option("--message-bytes", options.message_bytes)
      ->check(CLI::Range(1, 64 * 1024 * 1024))
      ->capture_default_str();
  app.add_option("--region-bytes", options.region_bytes, "walked through by the copies, at either side")
      ->capture_default_str();
  app.add_option("--buffers", options.buffers, "messages under way at either end")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--seconds", options.seconds)->check(CLI::Range(0.01, 60.0))->capture_default_str();
  app.add_option("--round-trips", options.round_trips)->check(CLI::Range(1, 1'000'000))->capture_default_str();
  app.add_flag("--both", options.both, "both processes send");
  app.add_flag("--json", as_json);
  CLI11_PARSE(app, count, arguments);
  if (options.region_bytes < options.message_bytes) {
    std::fprintf(stderr, "ucx_floor: --region-bytes is smaller than a message\n");
    return 64;
  }
  return expertd::bench::run(options, as_json);
}
