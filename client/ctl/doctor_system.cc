// SPDX-License-Identifier: Apache-2.0
// Doctor: kernel, sealed shared memory, limits.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "client/ctl/doctor.h"
#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

constexpr uint64_t kMemlockGood = 8ULL << 30;
constexpr uint64_t kNofileGood = 65536;
constexpr uint64_t kNofileLeast = 1024;

Check check_kernel() {
  Check check{.name = "kernel", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  utsname name{};
  if (uname(&name) != 0) {
    check.level = Level::kWarn;
    check.finding = std::string("uname: ") + std::strerror(errno);
    return check;
  }
  check.finding = std::string("Linux ") + name.release;
  const auto version = kernel_version(name.release);
  if (version < std::pair(5, 10)) {
    check.level = Level::kFail;
    check.remedy = "use Linux 5.10 or newer";
  } else if (version < std::pair(6, 5)) {
    check.finding += ", no pidfd of socket peers (6.5)";
    check.without = "everything; clients are told apart by user id and connection";
  }
  return check;
}

Check check_sealed_memory() {
  Check check{.name = "sealed_memory", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  const int fd = memfd_create("expertctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  const bool sealed =
      fd >= 0 && ftruncate(fd, 4096) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
  const int error = errno;
  if (fd >= 0) {
    close(fd);
  }
  if (sealed) {
    check.finding = "memfd with seals works (rings and host windows)";
    return check;
  }
  check.level = Level::kFail;
  check.finding = std::string("memfd with seals: ") + std::strerror(error);
  check.remedy = "allow memfd_create and fcntl(F_ADD_SEALS) in the container's seccomp profile";
  return check;
}

std::string limit_text(rlim_t limit, bool bytes) {
  if (limit == RLIM_INFINITY) {
    return "unlimited";
  }
  return bytes ? size_text(limit) : std::to_string(limit);
}

Check check_memlock() {
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  Check check{.name = "memlock_limit",
              .level = Level::kOk,
              .finding = limit_text(limit.rlim_cur, true) + " for this shell",
              .remedy = {},
              .without = {}};
  if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < kMemlockGood) {
    check.level = Level::kWarn;
    check.remedy = "LimitMEMLOCK=infinity in the unit, ulimit -l unlimited in containers";
    check.without = "host devices and GPUs with peer access; RDMA and pinned staging need locked memory";
  }
  return check;
}

Check check_nofile() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  Check check{.name = "nofile_limit",
              .level = Level::kOk,
              .finding = limit_text(limit.rlim_cur, false) + " for this shell",
              .remedy = {},
              .without = {}};
  if (limit.rlim_cur < kNofileLeast) {
    check.level = Level::kFail;
    check.remedy = "LimitNOFILE=65536 in the unit";
  } else if (limit.rlim_cur < kNofileGood) {
    check.level = Level::kWarn;
    check.remedy = "LimitNOFILE=65536 in the unit";
    check.without = "a few dozen sessions";
  }
  return check;
}

}  // namespace

std::pair<int, int> kernel_version(std::string_view release) {
  int major = 0;
  int minor = 0;
  if (std::sscanf(std::string(release).c_str(), "%d.%d", &major, &minor) != 2) {
    return {0, 0};
  }
  return {major, minor};
}

Checks check_system() {
  return {check_kernel(), check_sealed_memory(), check_memlock(), check_nofile()};
}

}  // namespace expertd::ctl
