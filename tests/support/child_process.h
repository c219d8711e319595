// SPDX-License-Identifier: Apache-2.0
// Processes that tests start: they end with the thread that started them, waits for their end have a deadline, and a
// watchdog can end them all. Any thread; tests only.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

namespace expertd::support {

struct ChildOptions {
  std::vector<std::string> arguments;    // the first is the path of the program
  std::vector<std::string> environment;  // "NAME=value" in place of this process's own
  int input = -1;                        // descriptors that become 0, 1 and 2; -1: this process's own
  int output = -1;
  int error = -1;
  bool own_pid_namespace = false;  // it is process 1 there, with a /proc of its own; needs root
  int network_namespace = -1;      // a descriptor of the one it is in; -1: this process's own; another needs root
};

/// Its exit codes when the program was never reached (the second: a namespace was not to be had).
inline constexpr int kExitNoProgram = 127;
inline constexpr int kExitNoNamespace = 126;

/// -1 with errno when there is no new process.
pid_t start_child(const ChildOptions& options);
/// Waits for the end; false when it has not come in time. Children are reaped here only.
bool reap_child(pid_t pid, int* status, std::chrono::milliseconds limit);
/// SIGKILL for every child that was started and not reaped; with `refuse_more`, start_child() fails until allowed
/// again.
void kill_children(bool refuse_more = false);
void allow_children();
/// Why own_pid_namespace cannot be had here, empty when it can.
std::string pid_namespace_problem();

/// What this process waits for, for the message of a watchdog; the last one counts.
void note_wait(const std::string& what);
std::string noted_wait();

}  // namespace expertd::support
