// SPDX-License-Identifier: Apache-2.0
#include "client/src/connection.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "client/src/clock.h"
#include "expertd/v1/session.pb.h"

namespace expertd::client {
namespace {

constexpr size_t kThreadStackBytes = 256 << 10;
// Nothing depends on it: a bound for a poll that every event ends.
constexpr int kPollBoundMs = 1000;

Status make_hello(const AttachRequest& request, const std::string& device, expertd_attach_hello* hello) {
  hello->magic = EXPERTD_ATTACH_MAGIC;
  hello->type = EXPERTD_ATTACH_HELLO;
  hello->abi_major = EXPERTD_ABI_MAJOR;
  hello->abi_minor = EXPERTD_ABI_MINOR;
  hello->local_pid = getpid();
  if (!copy_text(device, hello->device, sizeof(hello->device))) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "length of device", static_cast<int64_t>(device.size()), 1,
                       EXPERTD_ATTACH_NAME_BYTES - 1);
  }
  const std::string name = request.name.substr(0, EXPERTD_ATTACH_NAME_BYTES - 1);
  copy_text(name, hello->name, sizeof(hello->name));
  return {};
}

}  // namespace

Status Connection::open(const AttachRequest& request, DeviceSide* device, std::unique_ptr<Connection>* connection) {
  const uint64_t deadline_ns = deadline_after(request.timeout_ns);
  expertd_attach_hello hello{};
  Status status = make_hello(request, device->name(), &hello);
  if (!status.ok()) {
    return status;
  }
  Greeting greeting;
  status = greet(request.socket_path, hello, deadline_ns, &greeting);
  if (!status.ok()) {
    return status;
  }
  auto opened = std::make_unique<Connection>(Private(), std::move(greeting), device);
  status = opened->start(deadline_ns);
  if (status.ok()) {
    status = opened->open_session(request, deadline_ns);
  }
  if (status.ok()) {
    *connection = std::move(opened);
  }
  return status;
}

Connection::Connection(Private, Greeting greeting, DeviceSide* device)
    : greeting_(std::move(greeting)), device_(device), descriptors_(greeting_.socket.get()) {}

Status Connection::start(uint64_t) {
  const expertd_attach_welcome& welcome = greeting_.welcome;
  Status status = RingClient::open(greeting_.ring, welcome.ring_bytes, greeting_.wake.get(), &ring_);
  if (!status.ok()) {
    return status;
  }
  // The mapping is all that is needed of it.
  greeting_.ring.reset();
  status = device_->begin(welcome, std::move(greeting_.flag_page), ring_->slot_count());
  if (!status.ok()) {
    return status;
  }
  stop_ = OwnedFd(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!stop_.valid()) {
    return system_error("eventfd");
  }
  std::string why;
  const int rpc_fd = greeting_.rpc.release();
  // The channel closes it, also when it fails: its number may be another file's then.
  forget_fd(rpc_fd);
  channel_ = rpc::Channel::create(rpc_fd, "expertd", &why);
  if (channel_ == nullptr) {
    return {EXPERTD_REASON_SYSTEM, why};
  }
  note_fd(channel_->fd());
  note_fd(channel_->wake_fd());

  // The thread takes no signal: the process's handlers belong on the process's own threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kThreadStackBytes);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&thread_, &attributes, thread_main, this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  if (failed != 0) {
    errno = failed;
    return system_error("pthread_create");
  }
  thread_started_ = true;
  return {};
}

Status Connection::open_session(const AttachRequest& request, uint64_t deadline_ns) {
  expertd_v1_OpenSessionRequest message{};
  const std::string name = request.name.substr(0, sizeof(message.client_id) - 1);
  copy_text(name.empty() ? "client" : name, message.client_id, sizeof(message.client_id));
  if (!copy_text(request.traceparent, message.traceparent, sizeof(message.traceparent))) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "length of traceparent",
                       static_cast<int64_t>(request.traceparent.size()), 0, sizeof(message.traceparent) - 1);
  }
  expertd_v1_OpenSessionResponse response{};
  return call("OpenSession", {expertd_v1_OpenSessionRequest_fields, &message},
              {expertd_v1_OpenSessionResponse_fields, &response}, left_until(deadline_ns));
}

Connection::~Connection() {
  finish();
  if (channel_ != nullptr) {
    forget_fd(channel_->fd());
    forget_fd(channel_->wake_fd());
  }
}

// The thread may be the one that abandons: it has woken the callers then and is still releasing their streams.
void Connection::finish() {
  abandon("the session was detached");
  if (thread_started_) {
    const uint64_t one = 1;
    static_cast<void>(!write(stop_.get(), &one, sizeof(one)));
    pthread_join(thread_, nullptr);
    thread_started_ = false;
  }
}

void Connection::abandon(const char* why) {
  if (lost_.exchange(true, std::memory_order_acq_rel)) {
    return;
  }
  descriptors_.fail();
  if (channel_ != nullptr) {
    channel_->fail_all(why);
  }
  if (ring_ != nullptr) {
    ring_->close();
  }
  device_->release_waiters();
}

Status Connection::over(std::string text) const {
  const int32_t said = ring_ == nullptr ? EXPERTD_REASON_NONE : ring_->end_reason();
  if (said == EXPERTD_REASON_NONE) {
    return {EXPERTD_REASON_UNAVAILABLE, std::move(text)};
  }
  return {said, reason_sentence(said)};
}

Status Connection::explain(Status status) const {
  return status.reason == EXPERTD_REASON_UNAVAILABLE ? over(std::move(status.text)) : std::move(status);
}

// A daemon that said why it ends serves nobody any more, also while its sockets are still open.
bool Connection::look_for_end() {
  pollfd entry{greeting_.socket.get(), POLLRDHUP, 0};
  if (!lost() && (ring_->end_reason() != EXPERTD_REASON_NONE || poll(&entry, 1, 0) > 0)) {
    abandon("the daemon is gone: the session's lease is over");
  }
  return lost();
}

void* Connection::thread_main(void* self) {
  pthread_setname_np(pthread_self(), "expertd-client");
  static_cast<Connection*>(self)->run();
  return nullptr;
}

void Connection::run() {
  bool rpc_alive = true;
  while (poll_once(&rpc_alive)) {
  }
  abandon("the daemon is gone: the session's lease is over");
}

// False when the thread has to end: the lease is over or the connection is being destroyed.
bool Connection::poll_once(bool* rpc_alive) {
  std::array<pollfd, 4> entries{};
  entries[0] = {greeting_.socket.get(), POLLIN, 0};
  entries[1] = {stop_.get(), POLLIN, 0};
  const short rpc_events = static_cast<short>(POLLIN | (channel_->wants_write() ? POLLOUT : 0));
  entries[2] = {*rpc_alive ? channel_->fd() : -1, rpc_events, 0};
  entries[3] = {*rpc_alive ? channel_->wake_fd() : -1, POLLIN, 0};
  const int ready = poll(entries.data(), entries.size(), kPollBoundMs);
  if (ready <= 0) {
    return ready == 0 || errno == EINTR;
  }
  if (entries[1].revents != 0) {
    return false;
  }
  if (entries[0].revents != 0 && !descriptors_.on_readable()) {
    return false;
  }
  if ((entries[2].revents | entries[3].revents) != 0) {
    // Without the channel operations go on; only the end of the lease ends the session.
    *rpc_alive = channel_->pump();
  }
  return true;
}

}  // namespace expertd::client
