// SPDX-License-Identifier: Apache-2.0
// OwnedFd: a descriptor that is closed with its owner and, because the fork handler knows it, in every forked child
// too. A child that kept the attach socket would keep its dead parent's session alive. Any thread; one owner at a time.
#pragma once

#include <cstdint>
#include <utility>

namespace expertd::client {

/// Installs the fork handler once; called by every attach.
void install_fork_handler();
/// Counts the forks between the first attach and this process: an object of another generation is a parent's object.
uint32_t fork_generation();

/// Descriptors that other objects own, for the fork handler.
void note_fd(int fd);
void forget_fd(int fd);

class OwnedFd {
 public:
  OwnedFd() = default;
  explicit OwnedFd(int fd) : fd_(fd) {
    if (fd >= 0) {
      note_fd(fd);
    }
  }
  OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  OwnedFd& operator=(OwnedFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;
  ~OwnedFd() { reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  /// Gives the descriptor away; the fork handler still closes it in children until its next owner forgets it.
  int release() { return std::exchange(fd_, -1); }
  void reset();

 private:
  int fd_ = -1;
};

}  // namespace expertd::client
