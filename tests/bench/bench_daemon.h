// SPDX-License-Identifier: Apache-2.0
// The daemon that a measurement talks to: one that runs already, or one of its own from $EXPERTD_BIN_DIR in a scratch
// directory, ended by the destructor. Main thread. Failures are thrown as std::runtime_error.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace expertd::bench {

class BenchDaemon {
 public:
  /// Starts a daemon with `host_devices` host devices when `runtime_directory` is empty.
  BenchDaemon(const std::string& runtime_directory, uint32_t host_devices);
  /// The same with what the daemon is told of its devices.
  BenchDaemon(const std::string& runtime_directory, const std::vector<std::string>& arguments);
  ~BenchDaemon();
  BenchDaemon(const BenchDaemon&) = delete;
  BenchDaemon& operator=(const BenchDaemon&) = delete;

  std::string attach_socket() const { return directory_ + "/attach.sock"; }
  std::string control_socket() const { return directory_ + "/control.sock"; }
  /// Of a daemon started here; it goes with the daemon.
  std::string log_file() const { return directory_ + "/daemon.log"; }
  /// Of the running daemon, as it says itself.
  pid_t pid() const { return pid_; }
  const std::string& version() const { return version_; }

 private:
  void start(const std::vector<std::string>& arguments);
  void wait_until_ready();
  void stop() noexcept;

  std::string directory_;
  std::string scratch_;  // made here; empty: none
  pid_t child_ = 0;      // 0: not started here
  pid_t pid_ = 0;
  std::string version_;
};

/// Returns after this time; a condition that nobody signals.
void idle_for(std::chrono::milliseconds time);

}  // namespace expertd::bench
