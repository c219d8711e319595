// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/process_facts.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>

namespace expertd::metrics {

namespace {

/// Seconds since 1970 at which the machine started.
double boot_time_seconds() {
  std::ifstream stat("/proc/stat");
  std::string line;
  while (std::getline(stat, line)) {
    if (line.starts_with("btime ")) {
      return std::strtod(line.c_str() + 6, nullptr);
    }
  }
  return 0;
}

uint64_t count_open_fds() {
  DIR* const directory = opendir("/proc/self/fd");
  if (directory == nullptr) {
    return 0;
  }
  uint64_t entries = 0;
  while (readdir(directory) != nullptr) {
    ++entries;
  }
  closedir(directory);
  return entries > 3 ? entries - 3 : 0;  // ".", ".." and the directory's own
}

/// Fields 14, 15, 22, 23 and 24 of /proc/self/stat, counted from 1; the name in field 2 may contain anything.
void read_stat(ProcessFacts* facts) {
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  const size_t after_name = line.rfind(')');
  if (after_name == std::string::npos) {
    return;
  }
  std::istringstream fields(line.substr(after_name + 1));
  std::string skipped;
  for (int field = 3; field < 14; ++field) {
    fields >> skipped;
  }
  uint64_t user_ticks = 0;
  uint64_t system_ticks = 0;
  fields >> user_ticks >> system_ticks;
  for (int field = 16; field < 22; ++field) {
    fields >> skipped;
  }
  uint64_t start_ticks = 0;
  uint64_t resident_pages = 0;
  fields >> start_ticks >> facts->virtual_bytes >> resident_pages;
  const double ticks_per_second = static_cast<double>(sysconf(_SC_CLK_TCK));
  facts->cpu_seconds = static_cast<double>(user_ticks + system_ticks) / ticks_per_second;
  facts->start_time_seconds = boot_time_seconds() + static_cast<double>(start_ticks) / ticks_per_second;
  facts->resident_bytes = resident_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

ProcessFacts read_process_facts() {
  ProcessFacts facts;
  read_stat(&facts);
  facts.open_fds = count_open_fds();
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    facts.max_fds = limit.rlim_cur;
  }
  return facts;
}

}  // namespace expertd::metrics
