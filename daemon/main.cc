// SPDX-License-Identifier: Apache-2.0
// expertd: environment, command line, signals, log; then the Daemon runs. Exit codes are those of sysexits.h.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "daemon/app/daemon.h"
#include "daemon/base/log.h"
#include "daemon/config/command_line.h"
#include "daemon/supervise/environment.h"
#include "daemon/supervise/notify.h"
#include "daemon/supervise/signals.h"

namespace {

using expertd::base::Status;

int exit_code_of(const Status& status) {
  switch (status.reason()) {
    case EXPERTD_REASON_NO_GPU:
    case EXPERTD_REASON_MIG_UNSUPPORTED:
    case EXPERTD_REASON_ADDRESS_IN_USE:
    case EXPERTD_REASON_RUNTIME_DIRECTORY:
      return expertd::config::kExitUnavailable;
    case EXPERTD_REASON_CONFIG_BAD_VALUE:
      return expertd::config::kExitConfig;
    default:
      return expertd::config::kExitInternal;
  }
}

// Ends the process: after a normal run everything was given back, and neither the HTTP library's threads, which take 2
// s to end, nor those of a lost device must hold it.
[[noreturn]] void run_daemon(const expertd::config::LoadedConfig& loaded, const expertd::config::LoadRequest& request,
                             expertd::supervise::SystemdNotifier* notifier, expertd::supervise::Signals& signals) {
  using expertd::app::RunEnd;
  int code = expertd::config::kExitOk;
  expertd::app::Daemon daemon(loaded, request, notifier);
  if (const Status started = daemon.start(); !started.is_ok()) {
    expertd::base::log_error("cannot start", {{"reason", started.reason()}, {"why", started.message()}});
    code = exit_code_of(started);
  } else if (daemon.run(signals) == RunEnd::kDeviceLost) {
    code = expertd::config::kExitTryAgain;
  }
  expertd::base::log_close();
  std::_Exit(code);
}

int serve(const expertd::config::LoadedConfig& loaded, const expertd::config::LoadRequest& request) {
  using expertd::base::log_error;
  if (const Status blocked = expertd::supervise::block_signals(); !blocked.is_ok()) {
    std::fprintf(stderr, "expertd: %s\n", blocked.message().c_str());
    return expertd::config::kExitInternal;
  }
  expertd::base::LogOptions log;
  log.level = loaded.config.log.level;
  log.format = loaded.config.log.format;
  if (const Status opened = expertd::base::log_open(log); !opened.is_ok()) {
    std::fprintf(stderr, "expertd: %s\n", opened.message().c_str());
    return expertd::config::kExitInternal;
  }
  auto signals = expertd::supervise::Signals::create();
  auto notifier = expertd::supervise::SystemdNotifier::create(std::getenv("NOTIFY_SOCKET"));
  if (!signals.is_ok() || !notifier.is_ok()) {
    log_error("cannot start", {{"why", signals.is_ok() ? notifier.status().message() : signals.status().message()}});
    expertd::base::log_close();
    return expertd::config::kExitInternal;
  }
  run_daemon(loaded, request, &notifier.value(), signals.value());
}

}  // namespace

int main(int argc, char** argv) {
  const expertd::config::EnvironmentLookup environment = expertd::config::process_environment();
  const expertd::config::CommandLine command_line = expertd::config::parse_command_line(argc, argv, environment);
  const expertd::config::Startup startup = expertd::config::carry_out(command_line);
  std::fputs(startup.output.c_str(), stdout);
  std::fputs(startup.error.c_str(), stderr);
  if (!startup.loaded.has_value()) {
    return startup.exit_code;
  }
  const auto plan = expertd::supervise::plan_environment(environment);
  if (plan.reexecute) {
    const Status failed = expertd::supervise::reexecute(plan, argv);
    std::fprintf(stderr, "expertd: %s\n", failed.message().c_str());
    return expertd::config::kExitInternal;
  }
  return serve(*startup.loaded, command_line.request);
}
