// SPDX-License-Identifier: Apache-2.0
#include "daemon/supervise/lock_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace expertd::supervise {

namespace {

constexpr mode_t kDirectoryMode = 0750;
constexpr mode_t kFileMode = 0640;

base::Status directory_status(const std::string& directory, const std::string& problem, int error) {
  return base::Status(EXPERTD_REASON_RUNTIME_DIRECTORY,
                      directory + ": " + problem + ": " + std::strerror(error) +
                          "; create it for the user of the daemon (systemd: "
                          "RuntimeDirectory=expertd), or set runtime_directory to a directory that "
                          "this user can write");
}

std::string holder(int fd) {
  std::array<char, 24> text{};
  const ssize_t bytes = ::pread(fd, text.data(), text.size() - 1, 0);
  std::string pid(text.data(), bytes > 0 ? static_cast<size_t>(bytes) : 0);
  pid.erase(std::min(pid.find_first_not_of("0123456789"), pid.size()));
  return pid.empty() ? "another expertd" : "another expertd (pid " + pid + ")";
}

/// For the person who looks; the lock does not depend on it.
void write_pid(int fd) {
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(fd, 0) != 0 || ::pwrite(fd, pid.data(), pid.size(), 0) < 0) {
    errno = 0;
  }
}

}  // namespace

base::Result<LockFile> LockFile::acquire(const std::string& runtime_directory) {
  if (::mkdir(runtime_directory.c_str(), kDirectoryMode) != 0 && errno != EEXIST) {
    return directory_status(runtime_directory, "cannot be created", errno);
  }
  const std::string path = runtime_directory + "/expertd.lock";
  base::ScopedFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, kFileMode));
  if (!fd.valid()) {
    return directory_status(runtime_directory, "expertd.lock cannot be opened", errno);
  }
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) {
      return base::errno_status("flock " + path);
    }
    return base::Status(
        EXPERTD_REASON_ADDRESS_IN_USE,
        path + ": " + holder(fd.get()) + " uses this runtime directory; stop it, or set runtime_directory");
  }
  write_pid(fd.get());
  return LockFile(std::move(fd));
}

}  // namespace expertd::supervise
