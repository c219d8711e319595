// SPDX-License-Identifier: Apache-2.0
#include "daemon/supervise/notify.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

namespace expertd::supervise {

namespace {

/// The STATUS line; a newline inside would start another assignment.
std::string status_line(std::string_view status) {
  std::string line = "STATUS=" + std::string(status);
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line;
}

}  // namespace

base::Status Notifier::ready(std::string_view status) {
  return send("READY=1\n" + status_line(status));
}

base::Status Notifier::stopping(std::string_view status) {
  return send("STOPPING=1\n" + status_line(status));
}

base::Status Notifier::status(std::string_view status) {
  return send(status_line(status));
}

base::Status Notifier::watchdog() {
  return send("WATCHDOG=1");
}

base::Result<SystemdNotifier> SystemdNotifier::create(const char* address) {
  SystemdNotifier notifier;
  const std::string_view name = address == nullptr ? std::string_view() : address;
  if (name.empty()) {
    return notifier;
  }
  if ((name.front() != '/' && name.front() != '@') || name.size() < 2 ||
      name.size() >= sizeof(notifier.address_.sun_path)) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        "NOTIFY_SOCKET=" + std::string(name) + " is neither a path nor @name");
  }
  notifier.address_.sun_family = AF_UNIX;
  std::memcpy(notifier.address_.sun_path, name.data(), name.size());
  if (name.front() == '@') {
    notifier.address_.sun_path[0] = '\0';  // an abstract name has no terminating zero, a path has
  }
  const size_t terminator = name.front() == '@' ? 0 : 1;
  notifier.address_bytes_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size() + terminator);
  notifier.fd_.reset(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!notifier.fd_.valid()) {
    return base::errno_status("socket for NOTIFY_SOCKET");
  }
  return notifier;
}

base::Status SystemdNotifier::send(std::string_view state) {
  if (!fd_.valid()) {
    return base::Status::ok();
  }
  // The C interface of every socket address is a cast.
  const auto* address = reinterpret_cast<const sockaddr*>(&address_);
  if (::sendto(fd_.get(), state.data(), state.size(), MSG_NOSIGNAL, address, address_bytes_) < 0) {
    return base::errno_status("notification to the service manager");
  }
  return base::Status::ok();
}

}  // namespace expertd::supervise
