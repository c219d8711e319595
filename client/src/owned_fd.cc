// SPDX-License-Identifier: Apache-2.0
// The descriptors of the library as a bitmap, because a fork handler may take no lock: another thread of the parent
// could have held it.
#include "client/src/owned_fd.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>

namespace expertd::client {
namespace {

// The kernel's default ceiling (fs.nr_open). Pages of the map that are never used take no memory.
constexpr uint32_t kMaxFds = 1u << 20;
std::atomic<uint64_t> noted_fds[kMaxFds / 64];
std::atomic<uint32_t> words_in_use{0};
std::atomic<uint32_t> generation{1};
std::atomic<bool> handler_installed{false};

void close_in_child() {
  generation.fetch_add(1, std::memory_order_relaxed);
  const uint32_t words = words_in_use.load(std::memory_order_relaxed);
  for (uint32_t word = 0; word < words; ++word) {
    uint64_t bits = noted_fds[word].exchange(0, std::memory_order_relaxed);
    while (bits != 0) {
      const int bit = __builtin_ctzll(bits);
      bits &= bits - 1;
      close(static_cast<int>(word * 64) + bit);
    }
  }
}

}  // namespace

void install_fork_handler() {
  if (!handler_installed.exchange(true, std::memory_order_relaxed)) {
    pthread_atfork(nullptr, nullptr, close_in_child);
  }
}

uint32_t fork_generation() {
  return generation.load(std::memory_order_relaxed);
}

void note_fd(int fd) {
  const uint32_t index = static_cast<uint32_t>(fd);
  if (fd < 0 || index >= kMaxFds) {
    return;
  }
  const uint32_t word = index / 64;
  uint32_t used = words_in_use.load(std::memory_order_relaxed);
  while (used <= word && !words_in_use.compare_exchange_weak(used, word + 1, std::memory_order_relaxed)) {
  }
  noted_fds[word].fetch_or(uint64_t{1} << (index % 64), std::memory_order_relaxed);
}

void forget_fd(int fd) {
  const uint32_t index = static_cast<uint32_t>(fd);
  if (fd >= 0 && index < kMaxFds) {
    noted_fds[index / 64].fetch_and(~(uint64_t{1} << (index % 64)), std::memory_order_relaxed);
  }
}

void OwnedFd::reset() {
  if (fd_ >= 0) {
    forget_fd(fd_);
    close(fd_);
    fd_ = -1;
  }
}

}  // namespace expertd::client
