// SPDX-License-Identifier: Apache-2.0
// DescriptorCloser: closes descriptors that came from clients, on threads that nobody waits for. close() takes as long
// as whoever is behind the file likes: a FUSE server answers FLUSH when it wants to, and the last close of a socket
// with SO_LINGER waits for its peer. Memory files have a thread of their own, since closing one takes only as long as
// freeing its pages: a close that is stuck then keeps nobody's memory. Any thread calls; owned by the session service.
#pragma once

#include <array>
#include <cstddef>
#include <memory>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::session {

class DescriptorCloser {
 public:
  DescriptorCloser();
  /// A close that is stuck is left to the end of the process.
  ~DescriptorCloser();
  DescriptorCloser(const DescriptorCloser&) = delete;
  DescriptorCloser& operator=(const DescriptorCloser&) = delete;

  base::Status start();
  /// Takes every descriptor, at once.
  void close(base::ScopedFd fd);
  /// kMaxClosingFds wait on one thread: whoever takes descriptors from clients is to stop until this is over.
  bool full() const;

  /// A memfd or a file of its kind. Asks the kernel alone, never the file's server.
  static bool is_memory_file(int fd);

 private:
  struct Lane;
  static void work(const std::shared_ptr<Lane>& lane);

  std::array<std::shared_ptr<Lane>, 2>
      lanes_;  // memory files, all others; shared with the threads, which may outlive this
};

}  // namespace expertd::session
