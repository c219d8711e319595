// SPDX-License-Identifier: Apache-2.0
// A client in a process of its own (fault_client.cc), driven by lines on its standard input, each answered by one line.
// One thread; the process is killed with the object. Tests only.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace expertd::support {

/// Another program that answers lines, in place of expertd_fault_client, and what it is started with.
struct ClientProgram {
  std::vector<std::string> arguments;
  std::vector<std::string> environment;  // "NAME=value"
  bool own_pid_namespace = false;
};

/// Commands, each with its answer ("ok ..." or "failed REASON rank=N ms=T: message"):
///   attach SOCKET DEVICE            join NAME RANK RANKS [mask]       leave              detach
///   alloc BYTES                     window BYTES                      release            reattach MS
///   barrier [MS]                    round                             rounds N           state
///   loop                            rounds until one fails or a line arrives; "ok rounds=N degraded=N"
///   masked N                        N rounds, on through failures; "ok failed=N gap=MS masks=FIRST-LAST:MASK,...":
///                                   operations that failed, the longest time without a good one, and the good ones
///   until N MASK                    the same until N rounds in a row had this mask
///   sync                            barriers until one succeeds, for ranks that a failure left apart
///   submit                          issues a barrier and does not wait
///   wait [MS]                       waits for it
///   fork                            forks and calls from the child; "ok child=REASON"
///   cycles SOCKET DEVICE N          attaches and detaches N times
class FaultClient {
 public:
  FaultClient();
  explicit FaultClient(const ClientProgram& program);
  ~FaultClient();
  FaultClient(const FaultClient&) = delete;
  FaultClient& operator=(const FaultClient&) = delete;

  void send(const std::string& command);
  /// The next answer, nothing when none comes in time or the process ended.
  std::optional<std::string> answer(std::chrono::milliseconds limit = std::chrono::seconds(20));
  /// Both; an empty text in place of nothing.
  std::string ask(const std::string& command, std::chrono::milliseconds limit = std::chrono::seconds(20));
  /// attach and join in one.
  bool attach(const std::string& socket, uint32_t device);

  pid_t pid() const { return pid_; }
  void kill();
  void signal_kill();  // does not wait for the end
  /// Until the kernel has closed the process's descriptors: its pipe ends as its lease does.
  bool wait_end_of_file(std::chrono::milliseconds limit);
  void pause();
  void resume();
  /// Waits for the end of a process that was told to end; false when it does not come in time.
  bool reap(std::chrono::milliseconds limit = std::chrono::seconds(30));

 private:
  pid_t pid_ = -1;
  int in_ = -1;
  int out_ = -1;
  std::string pending_;
  std::string last_command_;
};

/// True when an answer begins with "ok".
bool is_ok(const std::string& answer);
/// The number behind "name=" in an answer, or -1.
double number_in(const std::string& answer, const std::string& name);

}  // namespace expertd::support
