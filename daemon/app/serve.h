// SPDX-License-Identifier: Apache-2.0
// The program expertd, but for the devices that it is made with.
#pragma once

#include "daemon/app/daemon.h"

namespace expertd::app {

/// Reads command line and environment, runs the Daemon, and returns or ends the process with its exit code.
int serve(int argc, char** argv, const MakeHostDevice& make_host);

}  // namespace expertd::app
