// SPDX-License-Identifier: Apache-2.0
// The verbs that are one question or one order to the daemon.
#include "client/ctl/verbs.h"

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>

#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"
#include "client/ctl/render.h"
#include "client/ctl/render_nodes.h"
#include "client/ctl/slowest.h"

namespace expertd::ctl {

namespace {

// What a drain may take on top of its timeout until the process is gone.
constexpr uint64_t kDrainSlackNs = 5'000'000'000;
constexpr uint64_t kDrainDefaultNs = 30'000'000'000;

void print(const Context& context, const nlohmann::json& json, const std::string& text) {
  *context.out << (context.json ? json_text(json) : text);
}

std::string check_duration(const std::string& text) {
  return parse_duration_ns(text).has_value() ? "" : "\"" + text + "\" is no duration such as 500ms or 30s";
}

int run_health(const Context& context, bool ready) {
  DaemonClient daemon(context.socket, context.timeout_ns);
  const Reply<bool> reply = daemon.serving(ready ? "expertd.ready" : "");
  if (!reply.ok) {
    return report(context, reply.error);
  }
  const std::string text =
      ready ? (reply.value ? "ready\n" : "not ready\n") : (reply.value ? "serving\n" : "not serving\n");
  print(context, {{"service", ready ? "expertd.ready" : ""}, {"serving", reply.value}}, text);
  return reply.value ? kExitOk : kExitCheckFailed;
}

int run_drain(const Context& context, uint64_t timeout_ns, bool wait) {
  LifeLine life(context.socket);
  DaemonClient daemon(context.socket, context.timeout_ns);
  const Reply<v1::DrainResponse> reply = daemon.drain(timeout_ns);
  if (!reply.ok) {
    return report(context, reply.error);
  }
  const uint64_t wait_ns = (timeout_ns == 0 ? kDrainDefaultNs : timeout_ns) + kDrainSlackNs;
  const bool ended = wait && life.wait_for_end(wait_ns);
  std::string text = "draining, sessions told: " + std::to_string(reply.value.sessions()) + "\n";
  nlohmann::json json = {{"sessions", reply.value.sessions()}};
  if (wait) {
    text += ended ? "the daemon has ended\n" : "the daemon still runs after " + duration_text(wait_ns) + "\n";
    json["ended"] = ended;
  }
  print(context, json, text);
  return wait && !ended ? kExitCheckFailed : kExitOk;
}

}  // namespace

int report(const Context& context, const CallError& error) {
  if (context.json) {
    *context.out << json_text({{"error", error.message}, {"reason", error.reason}, {"exit_code", error.exit_code}});
  } else {
    *context.err << "expertctl: " << error.message << "\n";
  }
  return error.exit_code;
}

Action add_status(CLI::App&, const Context& context) {
  return [&context] {
    DaemonClient daemon(context.socket, context.timeout_ns);
    const Reply<v1::GetStatusResponse> reply = daemon.status();
    if (!reply.ok) {
      return report(context, reply.error);
    }
    print(context, status_json(reply.value), status_text(reply.value));
    return kExitOk;
  };
}

Action add_health(CLI::App& verb, const Context& context) {
  const auto ready = std::make_shared<bool>(false);
  verb.add_flag("--ready", *ready, "Ask whether it takes sessions, not only whether it answers");
  return [&context, ready] { return run_health(context, *ready); };
}

Action add_sessions(CLI::App&, const Context& context) {
  return [&context] {
    DaemonClient daemon(context.socket, context.timeout_ns);
    const Reply<v1::ListSessionsResponse> reply = daemon.sessions();
    if (!reply.ok) {
      return report(context, reply.error);
    }
    print(context, sessions_json(reply.value), sessions_text(reply.value));
    return kExitOk;
  };
}

Action add_peers(CLI::App&, const Context& context) {
  return [&context] {
    DaemonClient daemon(context.socket, context.timeout_ns);
    const Reply<v1::ListPeersResponse> reply = daemon.peers();
    if (!reply.ok) {
      return report(context, reply.error);
    }
    print(context, peers_json(reply.value), peers_text(reply.value));
    return kExitOk;
  };
}

Action add_slowest(CLI::App& verb, const Context& context) {
  constexpr uint32_t kMost = 1024;  // the daemon keeps no more of each device
  const auto last = std::make_shared<uint32_t>(kMost);
  verb.add_option("--last", *last, "Of each device the last so many operations")
      ->check(CLI::Range(1U, kMost))
      ->capture_default_str()
      ->type_name("N");
  return [&context, last] {
    DaemonClient daemon(context.socket, context.timeout_ns);
    const Reply<v1::ListWaitsResponse> reply = daemon.waits(*last);
    if (!reply.ok) {
      return report(context, reply.error);
    }
    print(context, slowest_json(reply.value), slowest_text(reply.value));
    return kExitOk;
  };
}

Action add_drain(CLI::App& verb, const Context& context) {
  struct Options {
    std::string timeout = "0";
    bool wait = false;
  };
  const auto options = std::make_shared<Options>();
  verb.add_option("--timeout", options->timeout, "Time for operations in flight; 0 means the daemon's drain_timeout")
      ->type_name("DURATION")
      ->check(check_duration);
  verb.add_flag("--wait", options->wait, "Return when the daemon has ended");
  return [&context, options] {
    return run_drain(context, parse_duration_ns(options->timeout).value_or(0), options->wait);
  };
}

Action add_log_level(CLI::App& verb, const Context& context) {
  const auto level = std::make_shared<std::string>();
  verb.add_option("level", *level, "trace, debug, info, warn or error")
      ->required()
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error"}));
  return [&context, level] {
    DaemonClient daemon(context.socket, context.timeout_ns);
    const Reply<v1::SetLogLevelResponse> reply = daemon.set_log_level(*level);
    if (!reply.ok) {
      return report(context, reply.error);
    }
    print(context, {{"level", *level}, {"previous", reply.value.previous()}},
          "log level " + *level + ", before " + reply.value.previous() + "\n");
    return kExitOk;
  };
}

}  // namespace expertd::ctl
