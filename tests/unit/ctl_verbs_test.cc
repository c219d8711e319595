// SPDX-License-Identifier: Apache-2.0
// expertctl from its command line to its output, against a real control server with a fake daemon behind it.
#include "client/ctl/verbs.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "client/ctl/exit_codes.h"
#include "client/ctl/render.h"
#include "client/ctl/top.h"
#include "daemon/control/control_server.h"

namespace expertd::ctl {
namespace {

class NoSessions final : public session::SessionApi {
 public:
  base::Status open_session(base::SessionId, const std::string&, const std::string&) override { return nothing(); }
  base::Result<session::BufferGrant> register_ipc(base::SessionId, const std::string&, uint64_t, uint64_t) override {
    return nothing();
  }
  base::Result<session::BufferGrant> register_fd(base::SessionId, uint64_t, uint64_t, uint64_t, uint64_t) override {
    return nothing();
  }
  base::Status unregister(base::SessionId, uint32_t, uint64_t) override { return nothing(); }
  base::Result<session::BufferGrant> create_window(base::SessionId, uint64_t) override { return nothing(); }
  void join_group(base::SessionId, const session::JoinRequest&, session::JoinCallback) override {}
  base::Status leave_group(base::SessionId, base::GroupId, uint64_t) override { return nothing(); }
  base::Result<session::MaskReply> group_mask(base::SessionId, base::GroupId, const base::RankSet&,
                                              const base::RankSet&) override {
    return nothing();
  }
  base::Result<session::GroupPlan> plan_group(base::SessionId, const session::GroupConfig&) override {
    return nothing();
  }

 private:
  static base::Status nothing() { return base::Status(EXPERTD_REASON_UNSUPPORTED); }
};

class FakeDaemon final : public session::OperatorApi {
 public:
  session::StatusSnapshot status() override {
    session::StatusSnapshot out;
    out.version = "0.1.0";
    out.state = "ready";
    out.uptime_ns = 90'000'000'000;
    out.devices.resize(2);
    out.devices[0].kind = "host";
    out.devices[0].uuid = "host:0";
    out.devices[0].window_bytes = 3ULL << 20;
    out.devices[1].kind = "host";
    out.devices[1].healthy = false;
    out.groups.resize(1);
    out.groups[0].name = "decode";
    out.groups[0].joined = base::RankSet(3);
    out.sessions = 1;
    out.sessions_max = 64;
    return out;
  }
  std::vector<session::SessionSnapshot> sessions() override {
    session::SessionSnapshot out;
    out.id = {7};
    out.name = "bad \xff bytes";
    out.device = "host:0";
    out.p50_ns = 12'000;
    out.p99_ns = 48'000;
    out.state = "active";
    return {out};
  }
  std::vector<session::OpCounterSnapshot> counters() override {
    ops += 10;
    return {{.op = "ll_dispatch",
             .device = 0,
             .ok = ops,
             .failed = 0,
             .tokens = 0,
             .local_bytes = ops * 1000,
             .remote_bytes = 0,
             .duration_ns = ops * 25'000}};
  }
  base::Result<session::PeersSnapshot> peers() override {
    if (fabric_stuck) {
      return base::Status(EXPERTD_REASON_TIMEOUT, "the fabric thread did not answer");
    }
    session::PeersSnapshot out;
    out.enabled = true;
    out.peers.resize(1);
    out.peers[0].name = "node \xff b";
    out.peers[0].state = "up";
    return out;
  }
  session::WaitsSnapshot waits(uint32_t last) override {
    waits_asked = last;
    return {};
  }
  uint32_t drain(uint64_t timeout_ns) override {
    drain_timeout_ns = timeout_ns;
    return 1;
  }
  base::Result<std::string> set_log_level(const std::string&) override { return std::string("info"); }

  uint64_t ops = 0;
  uint64_t drain_timeout_ns = 0;
  bool fabric_stuck = false;
  uint32_t waits_asked = 0;
};

int remember_arguments(int argc, char** argv);
std::vector<std::string> passed_on;
int remember_arguments(int argc, char** argv) {
  passed_on.assign(argv, argv + argc);
  return 3;
}

const Verb kVerbs[] = {
    {"status", "", add_status},     {"health", "", add_health},
    {"sessions", "", add_sessions}, {"top", "", add_top},
    {"drain", "", add_drain},       {"log-level", "", add_log_level},
    {"peers", "", add_peers},       {"doctor", "", add_doctor},
    {"slowest", "", add_slowest},   {"own", "", pass_through(remember_arguments)},
};

struct Output {
  int code = 0;
  std::string out;
  std::string err;
  nlohmann::json json() const { return nlohmann::json::parse(out); }
};

Output run(std::vector<std::string> words, const std::string& socket) {
  words.insert(words.begin(), {"expertctl", "--socket", socket});
  std::vector<const char*> argv;
  for (const std::string& word : words) {
    argv.push_back(word.c_str());
  }
  std::ostringstream out;
  std::ostringstream err;
  const int code = run_cli({static_cast<int>(argv.size()), argv.data(), out, err, false}, kVerbs);
  return {code, out.str(), err.str()};
}

class CtlVerbs : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/expertd-ctl-XXXXXX";
    directory_ = mkdtemp(pattern);
    control::ControlOptions options;
    options.socket = socket();
    auto server = control::ControlServer::create(options, sessions_, daemon_);
    ASSERT_TRUE(server.is_ok()) << server.status().message();
    server_ = std::move(server).value();
    ASSERT_TRUE(server_->start_listening().is_ok());
  }
  void TearDown() override {
    server_.reset();
    std::filesystem::remove_all(directory_);
  }
  std::string socket() const { return directory_ + "/control.sock"; }

  std::string directory_;
  NoSessions sessions_;
  FakeDaemon daemon_;
  std::unique_ptr<control::ControlServer> server_;
};

TEST_F(CtlVerbs, StatusForPeopleAndPrograms) {
  const Output text = run({"status"}, socket());
  EXPECT_EQ(text.code, kExitOk) << text.err;
  EXPECT_TRUE(text.out.starts_with("expertd 0.1.0  ready  up 1 min 30 s\n")) << text.out;
  EXPECT_NE(text.out.find("3.0 MiB"), std::string::npos);
  EXPECT_NE(text.out.find("LOST"), std::string::npos);
  EXPECT_NE(text.out.find("decode"), std::string::npos);
  const Output json = run({"status", "--json"}, socket());
  EXPECT_EQ(json.json()["uptime_ns"], 90'000'000'000U);
  EXPECT_EQ(json.json()["devices"][0]["window_bytes"], 3U << 20);
  EXPECT_EQ(json.json()["groups"][0]["joined_mask"], 3);
  EXPECT_EQ(run({"--json", "status"}, socket()).json()["state"], "ready");
}

TEST_F(CtlVerbs, SessionsSurviveOddBytes) {
  EXPECT_NE(run({"sessions"}, socket()).out.find("48.0 µs"), std::string::npos);
  EXPECT_EQ(run({"sessions", "--json"}, socket()).json()["sessions"][0]["p99_ns"], 48'000);
}

TEST_F(CtlVerbs, PeersOrWhyTheyAreNotKnown) {
  EXPECT_NE(run({"peers"}, socket()).out.find("node ? b"), std::string::npos);
  EXPECT_EQ(run({"peers", "--json"}, socket()).json()["peers"][0]["state"], "up");
  daemon_.fabric_stuck = true;
  const Output stuck = run({"peers", "--json"}, socket());
  EXPECT_EQ(stuck.code, kExitInternal);
  EXPECT_EQ(stuck.json()["reason"], "TIMEOUT");
}

TEST_F(CtlVerbs, SlowestAsksForTheLastOperations) {
  EXPECT_EQ(run({"slowest", "--last=20"}, socket()).out, "no operations of groups yet\n");
  EXPECT_EQ(daemon_.waits_asked, 20U);
  EXPECT_EQ(run({"slowest", "--json"}, socket()).json()["ranks"].size(), 0U);
  EXPECT_EQ(daemon_.waits_asked, 1024U);
  EXPECT_EQ(run({"slowest", "--last=0"}, socket()).code, kExitUsage);
}

TEST_F(CtlVerbs, HealthTellsServingFromReady) {
  EXPECT_EQ(run({"health"}, socket()).code, kExitOk);
  const Output not_ready = run({"health", "--ready"}, socket());
  EXPECT_EQ(not_ready.code, kExitCheckFailed);
  EXPECT_EQ(not_ready.out, "not ready\n");
  server_->set_serving(control::Serving::kReady);
  EXPECT_EQ(run({"health", "--ready"}, socket()).code, kExitOk);
  EXPECT_EQ(run({"health", "--ready", "--json"}, socket()).json()["serving"], true);
}

TEST_F(CtlVerbs, DrainTakesItsOwnTimeout) {
  const Output drained = run({"drain", "--timeout=30s"}, socket());
  EXPECT_EQ(drained.code, kExitOk) << drained.err;
  EXPECT_EQ(daemon_.drain_timeout_ns, 30'000'000'000U);
  EXPECT_EQ(run({"--timeout=9s", "drain"}, socket()).code, kExitOk);
  EXPECT_EQ(daemon_.drain_timeout_ns, 0U);
  EXPECT_EQ(run({"drain", "--timeout=soon"}, socket()).code, kExitUsage);
}

TEST_F(CtlVerbs, LogLevelIsChecked) {
  EXPECT_EQ(run({"log-level", "debug"}, socket()).out, "log level debug, before info\n");
  EXPECT_EQ(run({"log-level", "loud"}, socket()).code, kExitUsage);
  EXPECT_EQ(run({"log-level"}, socket()).code, kExitUsage);
}

TEST_F(CtlVerbs, TopShowsRatesOnce) {
  const Output text = run({"top", "--once", "--interval=100ms"}, socket());
  EXPECT_EQ(text.code, kExitOk) << text.err;
  EXPECT_NE(text.out.find("ll_dispatch"), std::string::npos);
  EXPECT_NE(text.out.find("25.0 µs"), std::string::npos);
  EXPECT_EQ(text.out.find('\x1b'), std::string::npos);  // no terminal, no escapes
  const Output json = run({"top", "--once", "--interval=100ms", "--json"}, socket());
  EXPECT_EQ(json.json()["ops"][0]["mean_ns"], 25'000);
  EXPECT_GT(json.json()["ops"][0]["ops_per_second"], 0);
  EXPECT_EQ(json.json()["sessions"][0]["ops_per_second"], 0) << "the fake one does nothing";
  EXPECT_EQ(run({"top", "--interval=1ms"}, socket()).code, kExitUsage);
}

TEST_F(CtlVerbs, DoctorSeesTheDaemon) {
  const Output json = run({"doctor", "--json"}, socket());
  const nlohmann::json report = json.json();
  bool daemon_found = false;
  for (const auto& check : report["checks"]) {
    if (check["name"] == "daemon") {
      daemon_found = true;
      EXPECT_EQ(check["level"], "ok");
    }
  }
  EXPECT_TRUE(daemon_found);
  EXPECT_EQ(json.code, kExitCheckFailed);  // a device is lost and there is no attach socket
}

TEST_F(CtlVerbs, DrainCanWaitForTheEnd) {
  LifeLine life(socket());
  EXPECT_FALSE(life.wait_for_end(1'000'000));
  server_.reset();
  EXPECT_TRUE(life.wait_for_end(20'000'000'000));
}

TEST(CtlCli, DeadDaemonIsSaidSo) {
  const std::string socket = "/nonexistent/control.sock";
  for (const std::vector<std::string>& verb : std::vector<std::vector<std::string>>{{"status"},
                                                                                    {"health"},
                                                                                    {"health", "--ready"},
                                                                                    {"sessions"},
                                                                                    {"peers"},
                                                                                    {"slowest"},
                                                                                    {"top", "--once"},
                                                                                    {"drain"},
                                                                                    {"log-level", "info"}}) {
    const Output output = run(verb, socket);
    EXPECT_EQ(output.code, kExitUnavailable) << verb[0];
    EXPECT_NE(output.err.find("systemctl status expertd"), std::string::npos) << output.err;
    EXPECT_NE(output.err.find("there is no such socket"), std::string::npos) << output.err;
    std::vector<std::string> as_json = verb;
    as_json.push_back("--json");
    EXPECT_EQ(run(as_json, socket).json()["exit_code"], kExitUnavailable);
  }
}

TEST(CtlCli, UsageErrorsAre64) {
  const std::string socket = "/nonexistent/control.sock";
  EXPECT_EQ(run({}, socket).code, kExitUsage);
  const Output unknown = run({"frobnicate"}, socket);
  EXPECT_EQ(unknown.code, kExitUsage);
  EXPECT_NE(unknown.err.find("frobnicate"), std::string::npos) << unknown.err;
  EXPECT_EQ(run({"status", "--nope"}, socket).code, kExitUsage);
  EXPECT_EQ(run({"--timeout=0", "status"}, socket).code, kExitUsage);
  const Output help = run({"--help"}, socket);
  EXPECT_EQ(help.code, kExitOk);
  EXPECT_NE(help.out.find("log-level"), std::string::npos);
  EXPECT_EQ(run({"drain", "--help"}, socket).code, kExitOk);
  const Output version = run({"--version"}, socket);
  EXPECT_EQ(version.code, kExitOk);
  EXPECT_TRUE(version.out.starts_with("expertctl "));
}

TEST(CtlCli, VerbWithItsOwnCommandLineGetsTheRest) {
  EXPECT_EQ(run({"own", "--tokens=8", "x", "--json", "--help", "--socket", "y"}, "/s").code, 3);
  EXPECT_EQ(passed_on, (std::vector<std::string>{"own", "--tokens=8", "x", "--json", "--help", "--socket", "y"}));
}

TEST(CtlCli, SocketComesFromTheEnvironment) {
  unsetenv("EXPERTD_RUNTIME_DIRECTORY");
  EXPECT_EQ(default_socket(), "/run/expertd/control.sock");
  setenv("EXPERTD_RUNTIME_DIRECTORY", "/tmp/elsewhere", 1);
  EXPECT_EQ(default_socket(), "/tmp/elsewhere/control.sock");
  unsetenv("EXPERTD_RUNTIME_DIRECTORY");
}

TEST(CtlTop, SessionsHaveTheirOwnRates) {
  v1::ListSessionsResponse before;
  v1::ListSessionsResponse now;
  before.add_sessions()->set_id(4);
  before.mutable_sessions(0)->set_ops_completed(100);
  before.mutable_sessions(0)->set_bytes_moved(1'000'000);
  before.add_sessions()->set_id(9);  // gone since
  for (const uint64_t id : {6, 4}) {
    v1::SessionStatus& session = *now.add_sessions();
    session.set_id(id);
    session.set_ops_completed(300);
    session.set_bytes_moved(9'000'000);
  }
  TopFrame frame;
  frame.sessions = now;
  frame.session_rates = session_rates(before, now, 2'000'000'000);
  ASSERT_EQ(frame.session_rates.size(), 2U);
  EXPECT_DOUBLE_EQ(frame.session_rates[0].ops_per_second, 150) << "new: all of it";
  EXPECT_DOUBLE_EQ(frame.session_rates[1].ops_per_second, 100);
  EXPECT_DOUBLE_EQ(frame.session_rates[1].bytes_per_second, 4e6);
  EXPECT_NE(top_text(frame).find("4.0 MB/s"), std::string::npos) << top_text(frame);
  EXPECT_EQ(top_json(frame)["sessions"][1]["ops_per_second"], 100);
}

TEST(CtlTop, RatesAreDifferences) {
  v1::GetCountersResponse before;
  v1::GetCountersResponse now;
  before.set_now_ns(1'000'000'000);
  now.set_now_ns(3'000'000'000);
  v1::OpCounters* old = before.add_ops();
  old->set_op("dispatch");
  old->set_ok(100);
  old->set_local_bytes(1000);
  old->set_duration_ns(5'000);
  v1::OpCounters* fresh = now.add_ops();
  fresh->set_op("dispatch");
  fresh->set_ok(300);
  fresh->set_local_bytes(2'001'000);
  fresh->set_duration_ns(405'000);
  now.add_ops()->set_op("combine");  // not in the first look
  now.mutable_ops(1)->set_ok(4);
  std::vector<OpRate> rates = op_rates(before, now);
  ASSERT_EQ(rates.size(), 2U);
  EXPECT_DOUBLE_EQ(rates[0].ops_per_second, 100);
  EXPECT_DOUBLE_EQ(rates[0].local_bytes_per_second, 1e6);
  EXPECT_EQ(rates[0].mean_ns, 2'000U);
  EXPECT_DOUBLE_EQ(rates[1].ops_per_second, 2);
  // The daemon restarted: counters begin anew, rates stay sane.
  old->set_ok(10'000);
  rates = op_rates(before, now);
  EXPECT_DOUBLE_EQ(rates[0].ops_per_second, 150);
  EXPECT_DOUBLE_EQ(op_rates(now, now)[0].ops_per_second, 0);
}

}  // namespace
}  // namespace expertd::ctl
