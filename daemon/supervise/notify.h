// SPDX-License-Identifier: Apache-2.0
// What the service manager is told, as sd_notify datagrams. Called by the supervising thread alone.
// Owned by `main`. Never blocks and never fails the daemon: a lost datagram is reported to the
// caller and sent again by its next call.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <string>
#include <string_view>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"

namespace expertd::supervise {

class Notifier {
 public:
  virtual ~Notifier() = default;
  /// Lines such as "READY=1\nSTATUS=serving 8 GPUs".
  virtual base::Status send(std::string_view state) = 0;

  base::Status ready(std::string_view status);
  base::Status stopping(std::string_view status);
  base::Status status(std::string_view status);
  base::Status watchdog();
};

/// Sends to the socket that NOTIFY_SOCKET names, or nowhere when there is none.
class SystemdNotifier final : public Notifier {
 public:
  /// `address` is the variable's value: a path, "@name" for an abstract socket, or nullptr or ""
  /// for no manager.
  static base::Result<SystemdNotifier> create(const char* address);

  base::Status send(std::string_view state) override;
  bool connected() const { return fd_.valid(); }

 private:
  SystemdNotifier() = default;

  base::ScopedFd fd_;
  sockaddr_un address_{};
  socklen_t address_bytes_ = 0;
};

}  // namespace expertd::supervise
