// SPDX-License-Identifier: Apache-2.0
// AttachApi: what the attach listener asks of the session service. Listener thread.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/status.h"

namespace expertd::session {

struct AttachRequest {
  std::string device;  // "host:N" or a GPU's UUID
  std::string name;
  uint32_t uid = 0;
  uint32_t pid = 0;       // as the kernel told; 0 across pid namespaces
  int32_t local_pid = 0;  // as the client told: its getpid()
};

struct AttachGrant {
  base::SessionId session;
  uint64_t generation = 0;
  uint32_t device_index = 0;
  bool is_cuda = false;
  bool mps_active = false;
  int ring_fd = -1;  // owned by the session; valid until it ends
  int wake_fd = -1;
  uint64_t ring_bytes = 0;
  base::ScopedFd flag_page_fd;
  uint64_t flag_page_bytes = 0;
  uint32_t handles_per_session = 0;
  uint64_t op_timeout_ns = 0;
};

struct TakenFd {
  base::ScopedFd fd;
  uint64_t bytes = 0;
};

class AttachApi {
 public:
  virtual ~AttachApi() = default;
  virtual base::Result<AttachGrant> attach(const AttachRequest& request) = 0;
  /// The lease ended: everything of the session is stopped and, once quiet, given back. Returns at once.
  virtual void session_ended(base::SessionId session, const std::string& cause) = 0;
  /// A descriptor from the client, kept until register_fd names its token; discarded when it is refused.
  virtual base::Result<uint64_t> put_fd(base::SessionId session, base::ScopedFd fd) = 0;
  /// The descriptor of a window that was created for the session.
  virtual base::Result<TakenFd> take_fd(base::SessionId session, uint64_t token) = 0;
  /// Closes a descriptor that came from a client, or holds some that did, on a thread of its own: that may take hours.
  virtual void discard_fd(base::ScopedFd fd) = 0;
  /// Too many of them wait: nothing more may be taken from clients until this is over.
  virtual bool discards_full() const = 0;
};

}  // namespace expertd::session
