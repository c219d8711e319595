// SPDX-License-Identifier: Apache-2.0
#include "tests/support/child_process.h"

#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "tests/support/temp_dir.h"

namespace expertd::support {
namespace {

std::mutex mutex;
std::vector<pid_t> children;  // started and not reaped; under mutex, so that no signal goes to a number used again
bool refused = false;         // under mutex
std::string wait_note;        // under mutex

std::string name_of(const std::string& variable) {
  return variable.substr(0, variable.find('='));
}

std::vector<std::string> merged_environment(const std::vector<std::string>& given) {
  std::vector<std::string> merged = given;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string own = *variable;
    const bool replaced = std::any_of(given.begin(), given.end(),
                                      [&own](const std::string& other) { return name_of(other) == name_of(own); });
    if (!replaced) {
      merged.push_back(own);
    }
  }
  return merged;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> all;
  for (const std::string& text : texts) {
    all.push_back(const_cast<char*>(text.c_str()));
  }
  all.push_back(nullptr);
  return all;
}

// In the child, so only calls that are safe after a fork of a process with threads.
[[noreturn]] void become(const ChildOptions& options, char* const* arguments, char* const* environment) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::signal(SIGPIPE, SIG_DFL);  // a parent that ignores it would hand that on
  const int given[3] = {options.input, options.output, options.error};
  for (int target = 0; target < 3; ++target) {
    if (given[target] >= 0) {
      ::dup2(given[target], target);
    }
  }
  if (options.network_namespace >= 0 && ::setns(options.network_namespace, CLONE_NEWNET) != 0) {
    ::_exit(kExitNoNamespace);
  }
  // CUDA looks itself up in /proc, which must be that of the namespace.
  if (options.own_pid_namespace && (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
                                    ::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) != 0)) {
    ::_exit(kExitNoNamespace);
  }
  ::execve(arguments[0], arguments, environment);
  ::_exit(kExitNoProgram);
}

}  // namespace

pid_t start_child(const ChildOptions& options) {
  const std::vector<std::string> variables = merged_environment(options.environment);
  const std::vector<char*> environment = pointers(variables);
  const std::vector<char*> arguments = pointers(options.arguments);
  // Held over the fork, so that kill_children() misses nobody.
  const std::lock_guard lock(mutex);
  if (refused) {
    errno = ECANCELED;
    return -1;
  }
  const pid_t pid = options.own_pid_namespace
                        ? static_cast<pid_t>(::syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0))
                        : ::fork();
  if (pid == 0) {
    become(options, arguments.data(), environment.data());
  }
  if (pid > 0) {
    children.push_back(pid);
  }
  return pid;
}

bool reap_child(pid_t pid, int* status, std::chrono::milliseconds limit) {
  return wait_until(
      [&] {
        const std::lock_guard lock(mutex);
        const pid_t ended = ::waitpid(pid, status, WNOHANG);
        if (ended == 0) {
          return false;
        }
        // Also when it is no child of this process (any more): there is nothing to wait for.
        std::erase(children, pid);
        return true;
      },
      limit);
}

void kill_children(bool refuse_more) {
  const std::lock_guard lock(mutex);
  refused = refused || refuse_more;
  for (const pid_t child : children) {
    ::kill(child, SIGKILL);
  }
}

void allow_children() {
  const std::lock_guard lock(mutex);
  refused = false;
}

std::string pid_namespace_problem() {
  ChildOptions options;
  options.arguments = {"/bin/true"};
  options.own_pid_namespace = true;
  const pid_t pid = start_child(options);
  if (pid < 0) {
    return std::string("no pid namespace of one's own here: ") + std::strerror(errno);
  }
  int status = 0;
  if (!reap_child(pid, &status, std::chrono::seconds(5))) {
    kill_children();
    return "a process in a pid namespace of its own does not end";
  }
  const bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return good ? std::string() : "a pid namespace cannot have a /proc of its own here";
}

void note_wait(const std::string& what) {
  const std::lock_guard lock(mutex);
  wait_note = what;
}

std::string noted_wait() {
  const std::lock_guard lock(mutex);
  return wait_note;
}

}  // namespace expertd::support
