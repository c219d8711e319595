// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/attach_listener.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "daemon/base/clock.h"
#include "daemon/base/limits.h"
#include "daemon/base/log.h"
#include "proto/abi/attach_v1.h"

namespace expertd::transport {

namespace {

constexpr uint64_t kHelloNs = 5'000'000'000ULL;  // a connection that says nothing is closed after this
constexpr int kPollMs = 500;
// With no descriptor or memory left accept() fails at once while the socket stays readable: look again after this long.
constexpr int kAcceptPauseMs = 50;

union Message {
  expertd_attach_hello hello;
  expertd_attach_fd fd;
  char bytes[1024];
};

std::string text_of(const char* field, size_t capacity) {
  return std::string(field, ::strnlen(field, capacity));
}

}  // namespace

base::Result<std::unique_ptr<AttachListener>> AttachListener::create(const ListenerOptions& options,
                                                                     session::AttachApi* sessions,
                                                                     AdoptConnection adopt, SessionOver over) {
  base::Result<base::ScopedFd> listening = listen_seqpacket(options.path, options.mode, options.group);
  if (!listening.is_ok()) {
    return listening.status();
  }
  base::ScopedFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) {
    return base::errno_status("eventfd");
  }
  return std::unique_ptr<AttachListener>(new AttachListener(options, sessions, std::move(adopt), std::move(over),
                                                            std::move(listening).value(), std::move(wake)));
}

AttachListener::~AttachListener() {
  stop();
}

base::Status AttachListener::start() {
  try {
    thread_ = std::thread([this] { thread_main(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the attach listener: ") + error.what());
  }
  return base::Status::ok();
}

void AttachListener::stop() {
  if (stop_.exchange(true)) {
    return;
  }
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof(one));
  if (thread_.joinable()) {
    thread_.join();
  }
  ::unlink(options_.path.c_str());
}

void AttachListener::close_session(base::SessionId session) {
  {
    const std::lock_guard<std::mutex> lock(close_mutex_);
    close_.push_back(session);
  }
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof(one));
}

void AttachListener::hang_up() {
  // Before the first end of file, which the thread then takes for no client's.
  hung_up_.store(true, std::memory_order_seq_cst);
  (void)::shutdown(listening_.get(), SHUT_RDWR);
  const std::lock_guard<std::mutex> lock(open_mutex_);
  for (const int fd : open_) {
    (void)::shutdown(fd, SHUT_RDWR);
  }
}

void AttachListener::keep(int fd) {
  const std::lock_guard<std::mutex> lock(open_mutex_);
  open_.push_back(fd);
  if (hung_up_.load(std::memory_order_seq_cst)) {
    (void)::shutdown(fd, SHUT_RDWR);
  }
}

void AttachListener::forget(int fd) {
  const std::lock_guard<std::mutex> lock(open_mutex_);
  std::erase(open_, fd);
}

void AttachListener::thread_main() {
  std::vector<pollfd> entries;
  while (!stop_.load(std::memory_order_acquire)) {
    // While too many descriptors wait to be closed nothing is read: a hang-up is all that still ends a session.
    const bool hung_up = hung_up_.load(std::memory_order_seq_cst);
    const bool reads = !hung_up && !sessions_->discards_full();
    const bool pauses = base::now_ns() < accept_again_ns_;
    const bool accepts = reads && !pauses && connections_.size() < base::kMaxAttachConnections;
    entries.assign({{accepts ? listening_.get() : -1, POLLIN, 0}, {wake_.get(), POLLIN, 0}});
    for (const auto& [fd, connection] : connections_) {
      entries.push_back({hung_up ? -1 : fd, static_cast<short>(reads ? POLLIN : 0), 0});
    }
    if (::poll(entries.data(), entries.size(), pauses ? kAcceptPauseMs : kPollMs) < 0 && errno != EINTR) {
      continue;
    }
    if (entries[1].revents != 0) {
      uint64_t count = 0;
      (void)!::read(wake_.get(), &count, sizeof(count));
      close_requested();
    }
    for (size_t i = 2; i < entries.size(); ++i) {
      const auto found = connections_.find(entries[i].fd);
      if (entries[i].revents != 0 && found != connections_.end() && (!reads || !serve(found->second))) {
        drop(entries[i].fd, "eof");
      }
    }
    if (entries[0].revents != 0) {
      accept_clients();
    }
    if (reads) {
      expire_silent(base::now_ns());
    }
  }
  while (!connections_.empty() && !hung_up_.load(std::memory_order_seq_cst)) {
    drop(connections_.begin()->first, "drain");
  }
}

void AttachListener::expire_silent(uint64_t now_ns) {
  std::vector<int> silent;
  for (const auto& [fd, connection] : connections_) {
    if (connection.session.value == 0 && now_ns > connection.hello_deadline_ns) {
      silent.push_back(fd);
    }
  }
  for (const int fd : silent) {
    drop(fd, "eof");
  }
}

void AttachListener::close_requested() {
  std::vector<base::SessionId> sessions;
  {
    const std::lock_guard<std::mutex> lock(close_mutex_);
    sessions.swap(close_);
  }
  for (const base::SessionId session : sessions) {
    const auto found = std::find_if(connections_.begin(), connections_.end(),
                                    [&](const auto& entry) { return entry.second.session == session; });
    if (found != connections_.end()) {
      drop(found->first, "kicked");
    }
  }
}

void AttachListener::accept_clients() {
  while (connections_.size() < base::kMaxAttachConnections) {
    base::ScopedFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd.valid()) {
      if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
        base::log_warn("attach.sock cannot accept", {{"error", std::strerror(errno)}});
        accept_again_ns_ = base::now_ns() + uint64_t{kAcceptPauseMs} * 1'000'000;
      }
      return;
    }
    Connection connection;
    ucred credentials{};
    socklen_t size = sizeof(credentials);
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
      end_connection(std::move(fd));
      continue;
    }
    connection.uid = credentials.uid;
    connection.pid = static_cast<uint32_t>(std::max(0, credentials.pid));
    connection.hello_deadline_ns = base::now_ns() + kHelloNs;
    const int number = fd.get();
    connection.fd = std::move(fd);
    connections_[number] = std::move(connection);
    keep(number);
  }
}

void AttachListener::drop(int fd, const std::string& cause) {
  const auto found = connections_.find(fd);
  if (found == connections_.end() || hung_up_.load(std::memory_order_seq_cst)) {
    return;
  }
  forget(fd);
  const base::SessionId session = found->second.session;
  end_connection(std::move(found->second.fd));
  connections_.erase(found);
  if (session.value != 0) {
    sessions_->session_ended(session, cause);
    over_(session);
  }
}

// Packets that nobody read hold descriptors, which a close would close on this thread.
void AttachListener::end_connection(base::ScopedFd fd) {
  if (end_with_unread(fd.get())) {
    sessions_->discard_fd(std::move(fd));
  }
}

bool AttachListener::serve(Connection& connection) {
  Message message{};
  Packet packet = receive_packet(connection.fd.get(), &message, sizeof(message));
  const bool goes_on = packet.nothing || answer(connection, &message, &packet);
  for (base::ScopedFd& fd : packet.fds) {
    sessions_->discard_fd(std::move(fd));
  }
  return goes_on;
}

bool AttachListener::answer(Connection& connection, const void* bytes, Packet* packet) {
  const auto& message = *static_cast<const Message*>(bytes);
  if (packet->end_of_file) {
    return false;
  }
  if (connection.session.value == 0) {
    const bool has_fds = !packet->fds.empty() || packet->fds_missing;
    if (packet->bytes != sizeof(expertd_attach_hello) || message.hello.magic != EXPERTD_ATTACH_MAGIC ||
        message.hello.type != EXPERTD_ATTACH_HELLO || has_fds) {
      return refuse(connection, base::Status(EXPERTD_REASON_BAD_MESSAGE));
    }
    return hello(connection, &message);
  }
  const bool well_formed = packet->bytes == sizeof(expertd_attach_fd) && message.fd.magic == EXPERTD_ATTACH_MAGIC;
  return well_formed && packet->fds.size() <= 1 && pass_fd(connection, &message, packet);
}

bool AttachListener::refuse(const Connection& connection, const base::Status& status) {
  expertd_attach_welcome reply{};
  reply.magic = EXPERTD_ATTACH_MAGIC;
  reply.type = EXPERTD_ATTACH_REFUSED;
  reply.abi_major = EXPERTD_ABI_MAJOR;
  reply.abi_minor = EXPERTD_ABI_MINOR;
  reply.reason = status.reason();
  const std::string text = status.message();
  std::strncpy(reply.message, text.c_str(), sizeof(reply.message) - 1);
  (void)send_packet(connection.fd.get(), &reply, sizeof(reply), {});
  return false;
}

bool AttachListener::hello(Connection& connection, const void* bytes) {
  const auto& message = *static_cast<const expertd_attach_hello*>(bytes);
  if (message.abi_major != EXPERTD_ABI_MAJOR) {
    return refuse(connection,
                  base::Status(EXPERTD_REASON_PROTOCOL_VERSION,
                               "client speaks protocol " + std::to_string(message.abi_major) + "." +
                                   std::to_string(message.abi_minor) + ", daemon " + std::to_string(EXPERTD_ABI_MAJOR) +
                                   "." + std::to_string(EXPERTD_ABI_MINOR)));
  }
  const std::vector<uint32_t>& allowed = options_.allowed_uids;
  if (!allowed.empty() && std::find(allowed.begin(), allowed.end(), connection.uid) == allowed.end()) {
    return refuse(connection, base::Status(EXPERTD_REASON_PERMISSION, "uid " + std::to_string(connection.uid) +
                                                                          " is not in control.allowed_uids"));
  }
  session::AttachRequest request;
  request.device = text_of(message.device, sizeof(message.device));
  request.name = text_of(message.name, sizeof(message.name));
  request.uid = connection.uid;
  request.pid = connection.pid;
  request.local_pid = message.local_pid;
  base::Result<session::AttachGrant> attached = sessions_->attach(request);
  if (!attached.is_ok()) {
    return refuse(connection, attached.status());
  }
  session::AttachGrant& grant = attached.value();
  connection.session = grant.session;
  int pair[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    return refuse(connection, base::errno_status("socketpair"));
  }
  base::ScopedFd ours(pair[0]);
  base::ScopedFd theirs(pair[1]);
  if (const base::Status adopted = adopt_(std::move(ours), grant.session, connection.uid); !adopted.is_ok()) {
    return refuse(connection, adopted);
  }
  expertd_attach_welcome reply{};
  reply.magic = EXPERTD_ATTACH_MAGIC;
  reply.type = EXPERTD_ATTACH_WELCOME;
  reply.abi_major = EXPERTD_ABI_MAJOR;
  reply.abi_minor = EXPERTD_ABI_MINOR;
  reply.local_pid = static_cast<int32_t>(::getpid());
  reply.device_kind = grant.is_cuda ? EXPERTD_DEVICE_CUDA : EXPERTD_DEVICE_HOST;
  reply.device_index = grant.device_index;
  reply.mps_active = grant.mps_active ? 1 : 0;
  reply.session_id = grant.session.value;
  reply.generation = grant.generation;
  reply.ring_bytes = grant.ring_bytes;
  reply.flag_page_bytes = grant.flag_page_bytes;
  reply.handles_per_session = grant.handles_per_session;
  reply.op_timeout_ns = grant.op_timeout_ns;
  std::vector<int> fds = {theirs.get(), grant.ring_fd, grant.wake_fd};
  if (grant.flag_page_fd.valid()) {
    fds.push_back(grant.flag_page_fd.get());
  }
  reply.fd_count = static_cast<uint32_t>(fds.size());
  return send_packet(connection.fd.get(), &reply, sizeof(reply), fds);
}

bool AttachListener::pass_fd(Connection& connection, const void* bytes, Packet* packet) {
  const auto& message = *static_cast<const expertd_attach_fd*>(bytes);
  expertd_attach_fd reply{};
  reply.magic = EXPERTD_ATTACH_MAGIC;
  reply.type = EXPERTD_ATTACH_FD_REPLY;
  if (message.type == EXPERTD_ATTACH_PUT_FD && !packet->fds.empty()) {
    base::Result<uint64_t> token = sessions_->put_fd(connection.session, std::move(packet->fds.front()));
    reply.reason = token.status().reason();
    reply.token = token.is_ok() ? token.value() : 0;
    return send_packet(connection.fd.get(), &reply, sizeof(reply), {});
  }
  if (message.type == EXPERTD_ATTACH_PUT_FD && packet->fds_missing) {
    reply.reason = EXPERTD_REASON_SYSTEM;  // this process has no number free for it; the client may try again
    return send_packet(connection.fd.get(), &reply, sizeof(reply), {});
  }
  if (message.type == EXPERTD_ATTACH_GET_FD && packet->fds.empty() && !packet->fds_missing) {
    base::Result<session::TakenFd> taken = sessions_->take_fd(connection.session, message.token);
    reply.reason = taken.status().reason();
    reply.token = message.token;
    if (!taken.is_ok()) {
      return send_packet(connection.fd.get(), &reply, sizeof(reply), {});
    }
    reply.bytes = taken.value().bytes;
    return send_packet(connection.fd.get(), &reply, sizeof(reply), {taken.value().fd.get()});
  }
  return false;  // not a message of the protocol: the session ends
}

}  // namespace expertd::transport
