// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/listener.h"

#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "daemon/base/log.h"

namespace expertd::control {

namespace {

constexpr int kBacklog = 64;
// With no descriptor left accept() fails at once while the socket stays readable: look again after this long.
constexpr int kAcceptPauseMs = 50;

base::Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                        "the socket path \"" + path + "\" must have 1 to 107 bytes; choose a shorter directory");
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

const sockaddr* as_sockaddr(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

base::Status in_use(const std::string& path, const char* why) {
  return base::Status(EXPERTD_REASON_ADDRESS_IN_USE, path + ": " + why);
}

/// Removes what a dead process left at the path.
base::Status clear_stale(const std::string& path, const sockaddr_un& address) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? base::Status::ok() : base::errno_status("looking at " + path);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return in_use(path, "is there and is no socket; remove it or choose another control.socket");
  }
  const base::ScopedFd probe(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe.valid()) {
    return base::errno_status("socket");
  }
  // A full backlog answers EAGAIN: somebody listens. Only ECONNREFUSED says that nobody does.
  if (connect(probe.get(), as_sockaddr(address), sizeof(address)) == 0 || errno != ECONNREFUSED) {
    return in_use(path, "another process answers on it; is expertd running already?");
  }
  if (unlink(path.c_str()) != 0 && errno != ENOENT) {
    return base::errno_status("removing the stale " + path);
  }
  return base::Status::ok();
}

base::Result<gid_t> group_id(const std::string& name) {
  std::vector<char> buffer(16384);
  group entry{};
  group* found = nullptr;
  const int error = getgrnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found);
  if (error != 0 || found == nullptr) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "control.socket_group: there is no group \"" + name + "\"");
  }
  return found->gr_gid;
}

}  // namespace

base::Result<std::unique_ptr<Listener>> Listener::create(const ListenerOptions& options, Accepted accepted) {
  std::unique_ptr<Listener> listener(new Listener(options, std::move(accepted)));
  listener->stop_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!listener->stop_.valid()) {
    return base::errno_status("eventfd");
  }
  EXPERTD_RETURN_IF_ERROR(listener->bind_and_listen());
  try {
    listener->thread_ = std::thread([raw = listener.get()] { raw->accept_loop(); });
    pthread_setname_np(listener->thread_.native_handle(), "control-accept");
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the accept thread: ") + error.what());
  }
  return listener;
}

Listener::~Listener() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(stop_.get(), &one, sizeof(one));
    thread_.join();
  }
  struct stat info {};
  if (inode_ != 0 && lstat(options_.path.c_str(), &info) == 0 && info.st_ino == inode_ && info.st_dev == device_) {
    unlink(options_.path.c_str());
  }
}

base::Status Listener::bind_and_listen() {
  const base::Result<sockaddr_un> address = address_of(options_.path);
  if (!address.is_ok()) {
    return address.status();
  }
  EXPERTD_RETURN_IF_ERROR(clear_stale(options_.path, address.value()));
  socket_.reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket_.valid()) {
    return base::errno_status("socket");
  }
  (void)refuse_descriptors(socket_.get());
  if (bind(socket_.get(), as_sockaddr(address.value()), sizeof(sockaddr_un)) != 0) {
    return errno == EADDRINUSE ? in_use(options_.path, "another process took it just now")
                               : base::errno_status("binding " + options_.path);
  }
  struct stat info {};
  if (lstat(options_.path.c_str(), &info) == 0) {
    device_ = info.st_dev;
    inode_ = info.st_ino;
  }
  // Nobody can connect before listen(), so the mode is in force before the first client.
  EXPERTD_RETURN_IF_ERROR(set_owner_and_mode());
  if (listen(socket_.get(), kBacklog) != 0) {
    return base::errno_status("listening on " + options_.path);
  }
  return base::Status::ok();
}

base::Status Listener::set_owner_and_mode() const {
  if (!options_.group.empty()) {
    const base::Result<gid_t> gid = group_id(options_.group);
    if (!gid.is_ok()) {
      return gid.status();
    }
    if (chown(options_.path.c_str(), static_cast<uid_t>(-1), gid.value()) != 0) {
      return base::errno_status("giving " + options_.path + " to group " + options_.group);
    }
  }
  if (chmod(options_.path.c_str(), options_.mode) != 0) {
    return base::errno_status("setting the mode of " + options_.path);
  }
  return base::Status::ok();
}

bool Listener::stopped_within(int timeout_ms) const {
  pollfd stop{stop_.get(), POLLIN, 0};
  return poll(&stop, 1, timeout_ms) > 0;
}

void Listener::accept_loop() {
  while (true) {
    pollfd events[2] = {{socket_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    const int ready = poll(events, 2, -1);
    if (events[1].revents != 0) {
      return;
    }
    if (ready > 0 && events[0].revents != 0) {
      accept_one();
    }
  }
}

void Listener::accept_one() {
  base::ScopedFd connection(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!connection.valid()) {
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      base::log_warn("control.sock cannot accept", {{"error", std::strerror(errno)}});
      stopped_within(kAcceptPauseMs);
    }
    return;
  }
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (getsockopt(connection.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    base::log_warn("control.sock: no peer credentials", {{"error", std::strerror(errno)}});
    return;
  }
  const Peer peer{PeerKind::kOperator, {}, credentials.uid, static_cast<uint32_t>(credentials.pid)};
  if (!allowed(peer.uid)) {
    base::log_warn("control.sock: user refused", {{"uid", peer.uid}, {"pid", peer.pid}});
    return;
  }
  accepted_(std::move(connection), peer);
}

bool Listener::allowed(uint32_t uid) const {
  return options_.allowed_uids.empty() || uid == 0 || uid == geteuid() ||
         std::ranges::find(options_.allowed_uids, uid) != options_.allowed_uids.end();
}

}  // namespace expertd::control
