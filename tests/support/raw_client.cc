// SPDX-License-Identifier: Apache-2.0
#include "tests/support/raw_client.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <utility>

#include "tests/support/temp_dir.h"

namespace expertd::support {
namespace {

constexpr std::chrono::seconds kAnswerLimit(5);
constexpr size_t kMaxFds = 8;

void close_fd(int* fd) {
  if (*fd >= 0) {
    ::close(*fd);
    *fd = -1;
  }
}

void take_descriptors(const msghdr& message, std::vector<int>* fds) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(const_cast<msghdr*>(&message), part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      fds->push_back(fd);
    }
  }
}

}  // namespace

expertd_attach_hello make_hello(const std::string& device) {
  expertd_attach_hello hello{};
  hello.magic = EXPERTD_ATTACH_MAGIC;
  hello.type = EXPERTD_ATTACH_HELLO;
  hello.abi_major = EXPERTD_ABI_MAJOR;
  hello.abi_minor = EXPERTD_ABI_MINOR;
  hello.local_pid = ::getpid();
  std::snprintf(hello.device, sizeof(hello.device), "%s", device.c_str());
  std::snprintf(hello.name, sizeof(hello.name), "raw");
  return hello;
}

RawClient::~RawClient() {
  close();
}

void RawClient::close() {
  if (ring_ != nullptr) {
    ::munmap(std::exchange(ring_, nullptr), ring_bytes_);
  }
  close_fd(&socket_);
  close_fd(&rpc_);
  close_fd(&wake_);
}

bool RawClient::connect(const std::string& socket) {
  socket_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket.c_str());
  return ::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
}

bool RawClient::attach(const std::string& socket, const std::string& device) {
  const expertd_attach_hello hello = make_hello(device);
  if (!connect(socket) || !send(&hello, sizeof(hello))) {
    return false;
  }
  const auto answer = welcome(kAnswerLimit);
  return answer.has_value() && answer->type == EXPERTD_ATTACH_WELCOME && ring_ != nullptr;
}

bool RawClient::send(const void* bytes, size_t size, int fd) {
  return send_many(bytes, size, fd >= 0 ? std::vector<int>{fd} : std::vector<int>());
}

bool RawClient::send_many(const void* bytes, size_t size, const std::vector<int>& fds) {
  iovec part{const_cast<void*>(bytes), size};
  std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
  }
  return ::sendmsg(socket_, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(size);
}

std::optional<std::vector<uint8_t>> RawClient::receive(std::vector<int>* fds, std::chrono::milliseconds limit) {
  pollfd entry{socket_, POLLIN, 0};
  if (::poll(&entry, 1, static_cast<int>(limit.count())) <= 0) {
    return std::nullopt;
  }
  std::vector<uint8_t> bytes(4096);
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxFds * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = ::recvmsg(socket_, &message, MSG_CMSG_CLOEXEC);
  if (got <= 0) {
    return std::nullopt;
  }
  take_descriptors(message, fds);
  bytes.resize(static_cast<size_t>(got));
  return bytes;
}

std::optional<expertd_attach_welcome> RawClient::welcome(std::chrono::milliseconds limit) {
  std::vector<int> fds;
  const auto bytes = receive(&fds, limit);
  expertd_attach_welcome answer{};
  if (!bytes.has_value() || bytes->size() != sizeof(answer)) {
    return std::nullopt;
  }
  std::memcpy(&answer, bytes->data(), sizeof(answer));
  if (answer.type == EXPERTD_ATTACH_WELCOME && fds.size() >= 3) {
    rpc_ = fds[0];
    wake_ = fds[2];
    ring_bytes_ = answer.ring_bytes;
    void* mapped = ::mmap(nullptr, ring_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fds[1], 0);
    ring_ = mapped == MAP_FAILED ? nullptr : static_cast<uint8_t*>(mapped);
    close_fd(&fds[1]);
  }
  return answer;
}

bool RawClient::closed_by_peer(std::chrono::milliseconds limit) {
  return wait_until(
      [this] {
        char byte = 0;
        return ::recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
      },
      limit);
}

uint64_t RawClient::put_fd(int fd, uint32_t* reason) {
  expertd_attach_fd message{};
  message.magic = EXPERTD_ATTACH_MAGIC;
  message.type = EXPERTD_ATTACH_PUT_FD;
  std::vector<int> fds;
  *reason = EXPERTD_REASON_UNAVAILABLE;
  if (!send(&message, sizeof(message), fd)) {
    return 0;
  }
  const auto bytes = receive(&fds, kAnswerLimit);
  if (!bytes.has_value() || bytes->size() != sizeof(message)) {
    return 0;
  }
  std::memcpy(&message, bytes->data(), sizeof(message));
  *reason = message.reason;
  return message.token;
}

expertd_slot* RawClient::slot(uint64_t seq) {
  auto* slots = reinterpret_cast<expertd_slot*>(ring_ + header()->slots_offset);
  return slots + (seq - 1) % header()->slot_count;
}

expertd_completion* RawClient::completion(uint64_t seq) {
  auto* completions = reinterpret_cast<expertd_completion*>(ring_ + header()->completions_offset);
  return completions + (seq - 1) % header()->slot_count;
}

uint64_t RawClient::submit(expertd_slot given, bool keep_seq) {
  const uint64_t seq = next_seq_++;
  given.seq = keep_seq ? given.seq : seq;
  std::memcpy(slot(seq), &given, sizeof(given));
  set_tail(seq);
  return seq;
}

void RawClient::set_tail(uint64_t tail) {
  __atomic_store_n(&header()->submit_tail, tail, __ATOMIC_SEQ_CST);
  wake();
}

void RawClient::wake() {
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof(one));
}

std::optional<expertd_completion> RawClient::wait(uint64_t seq, std::chrono::milliseconds limit) {
  expertd_completion* place = completion(seq);
  const auto done = [&] { return __atomic_load_n(&place->seq, __ATOMIC_ACQUIRE) == seq; };
  for (int spin = 0; spin < 2000 && !done(); ++spin) {
    __builtin_ia32_pause();
  }
  if (!wait_until(done, limit)) {
    return std::nullopt;
  }
  expertd_completion copy{};
  std::memcpy(&copy, place, sizeof(copy));
  return copy;
}

int RawClient::take_rpc_fd() {
  return std::exchange(rpc_, -1);
}

}  // namespace expertd::support
