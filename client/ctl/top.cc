// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/top.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <thread>
#include <utility>

#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"
#include "client/ctl/render.h"
#include "client/ctl/verbs.h"

namespace expertd::ctl {

namespace {

constexpr uint64_t kIntervalMinNs = 100'000'000;
const char* const kClearScreen = "\x1b[H\x1b[J";

double rate(uint64_t before, uint64_t now, double seconds) {
  const uint64_t delta = now >= before ? now - before : now;
  return seconds > 0 ? static_cast<double>(delta) / seconds : 0;
}

const v1::OpCounters* find_counters(const v1::GetCountersResponse& counters, const v1::OpCounters& like) {
  for (const v1::OpCounters& candidate : counters.ops()) {
    if (candidate.device() == like.device() && candidate.op() == like.op()) {
      return &candidate;
    }
  }
  return nullptr;
}

OpRate rate_of(const v1::OpCounters& before, const v1::OpCounters& now, double seconds) {
  OpRate out;
  out.device = now.device();
  out.op = now.op();
  out.ops_per_second = rate(before.ok(), now.ok(), seconds);
  out.failed_per_second = rate(before.failed(), now.failed(), seconds);
  out.tokens_per_second = rate(before.tokens(), now.tokens(), seconds);
  out.local_bytes_per_second = rate(before.local_bytes(), now.local_bytes(), seconds);
  out.remote_bytes_per_second = rate(before.remote_bytes(), now.remote_bytes(), seconds);
  const uint64_t ended = now.ok() >= before.ok() ? now.ok() - before.ok() : now.ok();
  const uint64_t spent =
      now.duration_ns() >= before.duration_ns() ? now.duration_ns() - before.duration_ns() : now.duration_ns();
  out.mean_ns = ended == 0 ? 0 : spent / ended;
  return out;
}

std::string rates_text(const TopFrame& frame) {
  Table table({{"DEVICE", Align::kRight},
               {"OPERATION"},
               {"OPS/S", Align::kRight},
               {"FAILED/S", Align::kRight},
               {"TOKENS/S", Align::kRight},
               {"LOCAL", Align::kRight},
               {"REMOTE", Align::kRight},
               {"MEAN", Align::kRight}});
  for (const OpRate& op : frame.rates) {
    if (op.ops_per_second == 0 && op.failed_per_second == 0) {
      continue;
    }
    table.add({std::to_string(op.device), op.op, count_text(op.ops_per_second), count_text(op.failed_per_second),
               count_text(op.tokens_per_second), rate_text(op.local_bytes_per_second),
               rate_text(op.remote_bytes_per_second), op.mean_ns == 0 ? "-" : duration_text(op.mean_ns)});
  }
  return table.empty() ? "no operations in this interval\n" : table.text();
}

/// Asks for everything of one frame; false when a call failed and was reported.
bool fetch(DaemonClient* daemon, TopFrame* frame, v1::GetCountersResponse* counters, CallError* error) {
  Reply<v1::GetStatusResponse> status = daemon->status();
  Reply<v1::ListSessionsResponse> sessions = daemon->sessions();
  Reply<v1::GetCountersResponse> now = daemon->counters();
  if (!status.ok || !sessions.ok || !now.ok) {
    *error = !status.ok ? status.error : !sessions.ok ? sessions.error : now.error;
    return false;
  }
  frame->status = std::move(status.value);
  frame->sessions = std::move(sessions.value);
  *counters = std::move(now.value);
  return true;
}

int run_top(const Context& context, uint64_t interval_ns, bool once) {
  DaemonClient daemon(context.socket, context.timeout_ns);
  TopFrame frame;
  v1::GetCountersResponse before;
  CallError error;
  if (!fetch(&daemon, &frame, &before, &error)) {
    return report(context, error);
  }
  while (true) {
    std::this_thread::sleep_for(std::chrono::nanoseconds(interval_ns));
    v1::GetCountersResponse now;
    const v1::ListSessionsResponse sessions_before = std::move(frame.sessions);
    if (!fetch(&daemon, &frame, &now, &error)) {
      return report(context, error);
    }
    frame.rates = op_rates(before, now);
    frame.interval_ns = now.now_ns() - before.now_ns();
    frame.session_rates = session_rates(sessions_before, frame.sessions, frame.interval_ns);
    // One line of JSON per frame, so that a stream of them can be read line by line.
    const std::string text = context.json
                                 ? top_json(frame).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n"
                                 : top_text(frame);
    *context.out << (context.terminal && !context.json && !once ? kClearScreen : "") << text << std::flush;
    if (once || !context.out->good()) {
      return kExitOk;
    }
    if (!context.terminal && !context.json) {
      *context.out << "\n";
    }
    before = std::move(now);
  }
}

}  // namespace

std::vector<OpRate> op_rates(const v1::GetCountersResponse& before, const v1::GetCountersResponse& now) {
  const double seconds = now.now_ns() > before.now_ns() ? static_cast<double>(now.now_ns() - before.now_ns()) / 1e9 : 0;
  static const v1::OpCounters kNothing;
  std::vector<OpRate> out;
  for (const v1::OpCounters& op : now.ops()) {
    const v1::OpCounters* const old = find_counters(before, op);
    out.push_back(rate_of(old == nullptr ? kNothing : *old, op, seconds));
  }
  return out;
}

std::vector<SessionRate> session_rates(const v1::ListSessionsResponse& before, const v1::ListSessionsResponse& now,
                                       uint64_t interval_ns) {
  const double seconds = static_cast<double>(interval_ns) / 1e9;
  static const v1::SessionStatus kNothing;
  std::vector<SessionRate> out;
  for (const v1::SessionStatus& session : now.sessions()) {
    const auto old = std::ranges::find(before.sessions(), session.id(), &v1::SessionStatus::id);
    const v1::SessionStatus& earlier = old == before.sessions().end() ? kNothing : *old;
    out.push_back({rate(earlier.ops_completed(), session.ops_completed(), seconds),
                   rate(earlier.bytes_moved(), session.bytes_moved(), seconds)});
  }
  return out;
}

std::string top_text(const TopFrame& frame) {
  std::string out = "expertd " + frame.status.version() + "  " + frame.status.state() + "  up " +
                    duration_text(frame.status.uptime_ns()) + "  sessions " + std::to_string(frame.status.sessions()) +
                    "/" + std::to_string(frame.status.sessions_max()) + "  over " + duration_text(frame.interval_ns) +
                    "\n\n" + rates_text(frame) + "\n";
  Table sessions({{"SESSION", Align::kRight},
                  {"NAME"},
                  {"DEVICE"},
                  {"SLOTS", Align::kRight},
                  {"OPS/S", Align::kRight},
                  {"BANDWIDTH", Align::kRight},
                  {"OPS", Align::kRight},
                  {"REJECTED", Align::kRight},
                  {"P50", Align::kRight},
                  {"P99", Align::kRight}});
  for (int i = 0; i < frame.sessions.sessions_size(); ++i) {
    const v1::SessionStatus& session = frame.sessions.sessions(i);
    const SessionRate& rates = frame.session_rates[static_cast<size_t>(i)];
    sessions.add({std::to_string(session.id()), session.name().empty() ? "-" : session.name(), session.device(),
                  std::to_string(session.slots_used()) + "/" + std::to_string(session.slots()),
                  count_text(rates.ops_per_second), rate_text(rates.bytes_per_second),
                  count_text(static_cast<double>(session.ops_completed())),
                  count_text(static_cast<double>(session.ops_rejected())),
                  session.p50_ns() == 0 ? "-" : duration_text(session.p50_ns()),
                  session.p99_ns() == 0 ? "-" : duration_text(session.p99_ns())});
  }
  return out + (sessions.empty() ? "no sessions\n" : sessions.text());
}

nlohmann::json top_json(const TopFrame& frame) {
  nlohmann::json ops = nlohmann::json::array();
  for (const OpRate& op : frame.rates) {
    ops.push_back({{"device", op.device},
                   {"op", op.op},
                   {"ops_per_second", op.ops_per_second},
                   {"failed_per_second", op.failed_per_second},
                   {"tokens_per_second", op.tokens_per_second},
                   {"local_bytes_per_second", op.local_bytes_per_second},
                   {"remote_bytes_per_second", op.remote_bytes_per_second},
                   {"mean_ns", op.mean_ns}});
  }
  nlohmann::json out = sessions_json(frame.sessions);
  for (size_t i = 0; i < frame.session_rates.size(); ++i) {
    out["sessions"][i]["ops_per_second"] = frame.session_rates[i].ops_per_second;
    out["sessions"][i]["bytes_per_second"] = frame.session_rates[i].bytes_per_second;
  }
  out["ops"] = std::move(ops);
  out["state"] = frame.status.state();
  out["interval_ns"] = frame.interval_ns;
  return out;
}

Action add_top(CLI::App& verb, const Context& context) {
  struct Options {
    std::string interval = "1s";
    bool once = false;
  };
  const auto options = std::make_shared<Options>();
  verb.add_option("--interval", options->interval, "Time between two looks, at least 100ms")
      ->capture_default_str()
      ->type_name("DURATION")
      ->check([](const std::string& text) {
        return parse_duration_ns(text).value_or(0) >= kIntervalMinNs
                   ? ""
                   : "\"" + text + "\" is no duration of 100ms or more";
      });
  verb.add_flag("--once", options->once, "Print the rates of one interval and end");
  return [&context, options] {
    return run_top(context, parse_duration_ns(options->interval).value_or(kIntervalMinNs), options->once);
  };
}

}  // namespace expertd::ctl
