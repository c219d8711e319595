// SPDX-License-Identifier: Apache-2.0
// The exclusive lock that keeps two daemons out of one runtime directory. Taken by `main` before
// anything is opened there and held for the life of the process; the kernel frees it however the
// process ends. The file itself is never removed: a second daemon could hold the removed one and a
// third the new one.
#pragma once

#include <string>
#include <utility>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::supervise {

class LockFile {
 public:
  /// Makes the directory (mode 0750) when its parent allows that. RUNTIME_DIRECTORY when directory
  /// or file cannot be had, ADDRESS_IN_USE with the other's pid when another daemon has it.
  static base::Result<LockFile> acquire(const std::string& runtime_directory);

 private:
  explicit LockFile(base::ScopedFd fd) : fd_(std::move(fd)) {}

  base::ScopedFd fd_;
};

}  // namespace expertd::supervise
