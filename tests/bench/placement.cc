// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/placement.h"

#include <filesystem>
#include <fstream>
#include <string>

namespace expertd::bench {

std::map<pid_t, uint64_t> thread_times_ns(pid_t process) {
  std::map<pid_t, uint64_t> times;
  std::error_code ended;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(process) + "/task", ended)) {
    uint64_t time = 0;
    if (std::ifstream(entry.path() / "schedstat") >> time) {
      times[std::stoi(entry.path().filename())] = time;
    }
  }
  return times;
}

pid_t busiest_thread(pid_t process, const std::map<pid_t, uint64_t>& before) {
  pid_t busiest = 0;
  uint64_t most = 0;
  for (const auto& [thread, time] : thread_times_ns(process)) {
    const auto known = before.find(thread);
    const uint64_t used = time - (known == before.end() ? 0 : known->second);
    if (used > most) {
      most = used;
      busiest = thread;
    }
  }
  return busiest;
}

Apart::Apart(pid_t other) : other_(other) {
  if (other == 0 || sched_getaffinity(0, sizeof(own_before_), &own_before_) != 0 ||
      sched_getaffinity(other, sizeof(other_before_), &other_before_) != 0) {
    return;
  }
  for (size_t own = 0; own < CPU_SETSIZE; ++own) {
    for (size_t there = 0; there < CPU_SETSIZE && CPU_ISSET(own, &own_before_); ++there) {
      if (there == own || !CPU_ISSET(there, &other_before_)) {
        continue;
      }
      cpu_set_t one{};
      CPU_SET(there, &one);
      if (sched_setaffinity(other, sizeof(one), &one) == 0) {
        CPU_ZERO(&one);
        CPU_SET(own, &one);
        holds_ = sched_setaffinity(0, sizeof(one), &one) == 0;
        if (!holds_) {
          sched_setaffinity(other, sizeof(other_before_), &other_before_);
        }
      }
      return;
    }
  }
}

Apart::~Apart() {
  if (holds_) {
    sched_setaffinity(other_, sizeof(other_before_), &other_before_);
    sched_setaffinity(0, sizeof(own_before_), &own_before_);
  }
}

}  // namespace expertd::bench
