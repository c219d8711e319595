// SPDX-License-Identifier: Apache-2.0
// Environment, command line, signals, log; then the Daemon runs. Exit codes are those of sysexits.h.
#include "daemon/app/serve.h"

#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "daemon/base/log.h"
#include "daemon/config/command_line.h"
#include "daemon/supervise/environment.h"
#include "daemon/supervise/notify.h"
#include "daemon/supervise/signals.h"

namespace expertd::app {

namespace {

using base::Status;

int exit_code_of(const Status& status) {
  switch (status.reason()) {
    case EXPERTD_REASON_UNAVAILABLE:
    case EXPERTD_REASON_NO_GPU:
    case EXPERTD_REASON_MIG_UNSUPPORTED:
    case EXPERTD_REASON_ADDRESS_IN_USE:
    case EXPERTD_REASON_RUNTIME_DIRECTORY:
      return config::kExitUnavailable;
    case EXPERTD_REASON_CONFIG_BAD_VALUE:
      return config::kExitConfig;
    default:
      return config::kExitInternal;
  }
}

// By itself the C library keeps what is freed below the size of the largest block that was ever freed, up to 32 MiB:
// tables of groups that had ended stayed in the process (two of 8 ranks, one after the other, over 4 nodes: 167 MiB; 6
// with a size that is set). Loops allocate nothing, so it is control that pays for the pages of a large block.
void give_back_large_blocks() {
  constexpr int kBytes = 128 * 1024;
  (void)mallopt(M_MMAP_THRESHOLD, kBytes);
  (void)mallopt(M_TRIM_THRESHOLD, kBytes);
}

// Ends the process: after a normal run everything was given back, and the HTTP library's threads, which take 2 s to
// end, must not hold it.
[[noreturn]] void run_daemon(const config::LoadedConfig& loaded, const config::LoadRequest& request,
                             const MakeHostDevice& make_host, supervise::SystemdNotifier* notifier,
                             supervise::Signals& signals) {
  give_back_large_blocks();
  int code = config::kExitOk;
  Daemon daemon(loaded, request, notifier, make_host);
  if (const Status started = daemon.start(); !started.is_ok()) {
    base::log_error("cannot start", {{"reason", started.reason()}, {"why", started.message()}});
    code = exit_code_of(started);
  } else {
    daemon.run(signals);
  }
  base::log_close();
  std::_Exit(code);
}

int serve_configured(const config::LoadedConfig& loaded, const config::LoadRequest& request,
                     const MakeHostDevice& make_host) {
  using base::log_error;
  if (const Status blocked = supervise::block_signals(); !blocked.is_ok()) {
    std::fprintf(stderr, "expertd: %s\n", blocked.message().c_str());
    return config::kExitInternal;
  }
  base::LogOptions log;
  log.level = loaded.config.log.level;
  log.format = loaded.config.log.format;
  if (const Status opened = base::log_open(log); !opened.is_ok()) {
    std::fprintf(stderr, "expertd: %s\n", opened.message().c_str());
    return config::kExitInternal;
  }
  auto signals = supervise::Signals::create();
  auto notifier = supervise::SystemdNotifier::create(std::getenv("NOTIFY_SOCKET"));
  if (!signals.is_ok() || !notifier.is_ok()) {
    log_error("cannot start", {{"why", signals.is_ok() ? notifier.status().message() : signals.status().message()}});
    base::log_close();
    return config::kExitInternal;
  }
  run_daemon(loaded, request, make_host, &notifier.value(), signals.value());
}

}  // namespace

int serve(int argc, char** argv, const MakeHostDevice& make_host) {
  const config::EnvironmentLookup environment = config::process_environment();
  const config::CommandLine command_line = config::parse_command_line(argc, argv, environment);
  const config::Startup startup = config::carry_out(command_line);
  std::fputs(startup.output.c_str(), stdout);
  std::fputs(startup.error.c_str(), stderr);
  if (!startup.loaded.has_value()) {
    return startup.exit_code;
  }
  const auto plan = supervise::plan_environment(environment);
  if (plan.reexecute) {
    const Status failed = supervise::reexecute(plan, argv);
    std::fprintf(stderr, "expertd: %s\n", failed.message().c_str());
    return config::kExitInternal;
  }
  return serve_configured(*startup.loaded, command_line.request, make_host);
}

}  // namespace expertd::app
