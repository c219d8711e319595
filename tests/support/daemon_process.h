// SPDX-License-Identifier: Apache-2.0
// The real daemon as a child process, in a fresh directory with its own sockets. Its log goes to a file there and is
// printed when the test has failed. One thread; a daemon that is still there is killed with the object. Tests only.
#pragma once

#include <sys/resource.h>
#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/child_process.h"
#include "tests/support/temp_dir.h"

namespace expertd::support {

/// $EXPERTD_BIN_DIR, else the folder of this test when the daemon is there too, else bin/ of the build.
std::string binary_directory();

/// A program that ended.
struct RunResult {
  int exit_code = -1;  // -1: it did not end in time and was killed, or was ended by a signal
  std::string output;  // stdout
  std::string error;   // stderr
};

/// Runs a program and waits for its end.
RunResult run_child(ChildOptions options, std::chrono::milliseconds limit);
RunResult run_program(const std::vector<std::string>& arguments, std::chrono::milliseconds limit);
/// Runs a program of binary_directory() with these arguments and waits for its end.
RunResult run_program(const std::string& name, const std::vector<std::string>& arguments,
                      std::chrono::milliseconds limit);
/// The daemon's.
RunResult run_daemon(const std::vector<std::string>& arguments, std::chrono::milliseconds limit);

class DaemonProcess {
 public:
  /// `flags` follow the ones every test needs: its directory, a free metrics port, no GPU, `hosts` host devices.
  explicit DaemonProcess(uint32_t hosts = 2, std::vector<std::string> flags = {});
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  /// From the next start on: another program of binary_directory() in place of the daemon.
  void use_program(const std::string& name) { arguments_.front() = binary_directory() + "/" + name; }
  /// From the next start on: how long it may take, and whether it is process 1 of a pid namespace of its own.
  void set_start_limit(std::chrono::milliseconds limit) { start_limit_ = limit; }
  void use_own_pid_namespace() { own_pid_namespace_ = true; }
  /// From the next start on: in this network namespace (a descriptor that outlives the object), where its metrics
  /// cannot be reached from here; with these variables.
  void use_network_namespace(int fd) { network_namespace_ = fd; }
  void set_environment(std::vector<std::string> variables) { environment_ = std::move(variables); }
  /// Starts it (again, in the same directory) and returns when it answers; false with the log when it does not.
  bool start();
  /// start() in two parts, so that several can start at once: begins it; then waits, and says nothing when it failed.
  void launch();
  bool wait_ready();
  /// SIGTERM, then its exit code; -1 when it does not end in time.
  int stop(std::chrono::milliseconds limit = std::chrono::seconds(10));
  /// SIGTERM alone; wait_exit() for its end.
  void terminate();
  /// The exit code once it has ended by itself, -1 when it does not in time or was ended by a signal.
  int wait_exit(std::chrono::milliseconds limit);
  void kill();
  void pause();   // SIGSTOP; returns when every thread has stopped
  void resume();  // SIGCONT

  bool running();
  pid_t pid() const { return pid_; }
  std::string directory() const { return directory_.path(); }
  std::string attach_socket() const { return directory_.file("attach.sock"); }
  std::string control_socket() const { return directory_.file("control.sock"); }
  std::string log() const { return read_text(directory_.file("stderr")); }
  uint16_t metrics_port() const { return metrics_port_; }

  /// The metrics page, empty when it cannot be fetched.
  std::string scrape() const;
  /// Sum of all series whose "name{labels}" begins with `prefix`; 0 when there is none.
  double metric(const std::string& prefix) const;
  /// Waits for it: counters move just after the client's own view of an operation.
  bool metric_becomes(const std::string& prefix, double value) const;
  /// Open descriptors and mappings of the daemon's process.
  size_t open_descriptors() const;
  size_t mappings() const;
  /// Sets the limit of its descriptor numbers while it runs; the limit before.
  rlimit limit_descriptors(rlim_t limit) const;

 private:
  bool ready();
  bool reap(int* status);

  TempDir directory_;
  std::vector<std::string> arguments_;
  std::chrono::milliseconds start_limit_{20'000};
  std::vector<std::string> environment_;
  bool own_pid_namespace_ = false;
  int network_namespace_ = -1;
  pid_t pid_ = -1;
  uint16_t metrics_port_ = 0;
};

/// The body of an HTTP GET from 127.0.0.1, empty when there is none.
std::string http_get(uint16_t port, const std::string& path);

}  // namespace expertd::support
