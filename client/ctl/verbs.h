// SPDX-License-Identifier: Apache-2.0
// The verbs of expertctl, each as the function that adds its options and returns its action. Main thread.
#pragma once

#include "client/ctl/cli.h"
#include "client/ctl/daemon_client.h"

namespace expertd::ctl {

Action add_status(CLI::App& verb, const Context& context);
Action add_health(CLI::App& verb, const Context& context);
Action add_sessions(CLI::App& verb, const Context& context);
Action add_peers(CLI::App& verb, const Context& context);
Action add_slowest(CLI::App& verb, const Context& context);
Action add_mesh(CLI::App& verb, const Context& context);
Action add_top(CLI::App& verb, const Context& context);
Action add_drain(CLI::App& verb, const Context& context);
Action add_log_level(CLI::App& verb, const Context& context);
Action add_doctor(CLI::App& verb, const Context& context);

/// Tells of a failed call, as JSON on request, and returns its exit code.
int report(const Context& context, const CallError& error);

}  // namespace expertd::ctl
