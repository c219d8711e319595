// SPDX-License-Identifier: Apache-2.0
// expertctl bench: a group of sessions in this process runs every operation through the daemon, times it and compares
// every output with its own computation. Main thread; knows the daemon only through the C interface of the client.
#pragma once

namespace expertd::ctl {

/// argv[0] is the verb. Returns 0 when every output was right, 1 for a wrong output, 64 for a wrong command line, 69
/// when the daemon does not answer and 70 for any other failure.
int run_bench(int argc, char** argv);

}  // namespace expertd::ctl
