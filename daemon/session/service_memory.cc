// SPDX-License-Identifier: Apache-2.0
// Memory of sessions: descriptors in passing, registered buffers, windows.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "daemon/base/clock.h"
#include "daemon/session/service.h"
#include "daemon/session/session.h"

namespace expertd::session {

namespace {

// How often an unregistration looks whether the operations that use the buffer have ended.
constexpr std::chrono::milliseconds kBusyPoll(1);
constexpr size_t kIpcHandleBytes = 64;

// A device closes what it imports on the caller's thread, so it gets only what cannot make it wait: memory files and,
// for a GPU, descriptors of NVIDIA's driver, which VMM allocations are. Neither question is put to a file's server.
base::Status check_importable(bool is_cuda, int fd) {
  if (!is_cuda) {
    return DescriptorCloser::is_memory_file(fd) ? base::Status::ok() : base::Status(EXPERTD_REASON_UNSEALED_MEMORY);
  }
  constexpr uint32_t kNvidiaMajor = 195;  // registered in the kernel's list of devices
  struct statx facts {};
  const bool known = ::statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &facts) == 0;
  if (!known || !S_ISCHR(facts.stx_mode) || facts.stx_rdev_major != kNvidiaMajor) {
    return base::Status(EXPERTD_REASON_IPC_OPEN_FAILED, "the descriptor is no exported VMM allocation");
  }
  return base::Status::ok();
}

// Admission checks offsets into a buffer, so the buffer itself must begin at an aligned address: kernels access it in
// units of 16 bytes, and a misaligned one would cost the GPU's context, that is, every session.
base::Status check_range(uint64_t offset, uint64_t size) {
  if (size == 0 || offset % 16 != 0) {
    return base::Status(size == 0 ? EXPERTD_REASON_ARGUMENT_RANGE : EXPERTD_REASON_UNALIGNED,
                        "offset " + std::to_string(offset) + ", size " + std::to_string(size));
  }
  return base::Status::ok();
}

}  // namespace

base::Result<uint64_t> SessionService::put_fd(base::SessionId id, base::ScopedFd fd) {
  base::Result<uint64_t> token = keep_fd(id, &fd);
  discard_fd(std::move(fd));  // if it was not kept
  return token;
}

base::Result<uint64_t> SessionService::keep_fd(base::SessionId id, base::ScopedFd* fd) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  Session& session = *found.value();
  const std::lock_guard<std::mutex> lock(session.mutex);
  if (session.ended) {
    return base::Status(EXPERTD_REASON_NO_SUCH_SESSION);
  }
  if (session.fds.size() >= base::kMaxPendingFds) {
    return base::Status(EXPERTD_REASON_BUFFER_LIMIT,
                        "more than " + std::to_string(base::kMaxPendingFds) + " descriptors wait to be used");
  }
  const uint64_t token = session.next_token++;
  session.fds[token].fd = std::move(*fd);
  return token;
}

base::Result<TakenFd> SessionService::take_fd(base::SessionId id, uint64_t token) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  Session& session = *found.value();
  const std::lock_guard<std::mutex> lock(session.mutex);
  const auto entry = session.fds.find(token);
  if (entry == session.fds.end() || !entry->second.for_client) {
    return base::Status(EXPERTD_REASON_NO_SUCH_TOKEN);
  }
  TakenFd taken{std::move(entry->second.fd), entry->second.bytes};
  session.fds.erase(entry);
  return taken;
}

// Gives memory a buffer id in the session's tables; with a descriptor it waits there for the client to fetch it.
base::Result<BufferGrant> SessionService::install(const SessionRef& session, std::unique_ptr<device::HeldMemory> memory,
                                                  base::ScopedFd fd, uint64_t reserved) {
  const engine::Mapping* mapping = &memory->mapping();
  BufferGrant grant;
  grant.size = mapping->bytes;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    session->window_bytes -= reserved;
    if (session->ended) {
      return base::Status(EXPERTD_REASON_NO_SUCH_SESSION);
    }
    if (session->buffers.size() >= options_.max_buffers) {
      return base::Status(EXPERTD_REASON_BUFFER_LIMIT,
                          "session.max_buffers = " + std::to_string(options_.max_buffers) + " buffers are in use");
    }
    if (fd.valid() && session->fds.size() >= base::kMaxPendingFds) {
      return base::Status(EXPERTD_REASON_BUFFER_LIMIT, "fetch the descriptors of earlier windows first");
    }
    const bool is_window = fd.valid();
    if (!is_window) {
      EXPERTD_RETURN_IF_ERROR(check_registered(*session, mapping->bytes));
    }
    (is_window ? session->window_bytes : session->registered_bytes) += mapping->bytes;
    grant.buffer_id = 1;
    while (session->buffers.count(grant.buffer_id) != 0) {
      ++grant.buffer_id;
    }
    session->buffers[grant.buffer_id] = {std::move(memory), is_window};
    if (is_window) {
      grant.fd_token = session->next_token++;
      session->fds[grant.fd_token] = {std::move(fd), mapping->bytes, true};
    }
  }
  // The session itself is kept alive by the task; its tables belong to the loop.
  const base::Status entered =
      session->place.loop->run([session, id = grant.buffer_id, mapping] { session->tables.buffers[id] = mapping; });
  if (!entered.is_ok()) {
    const std::unique_ptr<device::HeldMemory> unused = take_buffer(*session, grant.buffer_id);
    std::map<uint64_t, Session::PendingFd>::node_type unused_fd;  // as the memory, closed without the lock
    const std::lock_guard<std::mutex> lock(session->mutex);
    unused_fd = session->fds.extract(grant.fd_token);
    return entered;
  }
  return grant;
}

// Addresses are what registered memory costs the daemon: a sparse memfd may be as large as all of them. The caller
// holds the session's mutex.
base::Status SessionService::check_registered(const Session& session, uint64_t bytes) const {
  const uint64_t limit = options_.max_registered_bytes;
  if (limit != 0 && (bytes > limit || session.registered_bytes > limit - bytes)) {
    return base::Status(EXPERTD_REASON_BUFFER_LIMIT,
                        std::to_string(bytes) + " bytes: session.max_registered_bytes = " + std::to_string(limit) +
                            ", " + std::to_string(session.registered_bytes) + " in use");
  }
  return base::Status::ok();
}

// The caller lets it go outside of the session's lock: that may block.
std::unique_ptr<device::HeldMemory> SessionService::take_buffer(Session& session, uint32_t buffer_id) {
  const std::lock_guard<std::mutex> lock(session.mutex);
  const auto found = session.buffers.find(buffer_id);
  if (found == session.buffers.end()) {
    return nullptr;
  }
  std::unique_ptr<device::HeldMemory> memory = std::move(found->second.memory);
  (found->second.is_window ? session.window_bytes : session.registered_bytes) -= memory->mapping().bytes;
  session.buffers.erase(found);
  for (auto& [group, membership] : session.memberships) {
    if (membership.window_buffer == buffer_id) {
      membership.window_buffer = 0;  // the next buffer of this id is not the group's
    }
  }
  return memory;
}

base::Result<BufferGrant> SessionService::register_ipc(base::SessionId id, const std::string& handle, uint64_t offset,
                                                       uint64_t size) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  const SessionRef session = found.value();
  if (handle.size() != kIpcHandleBytes) {
    return base::Status(EXPERTD_REASON_BAD_MESSAGE,
                        "a CUDA IPC handle has 64 bytes, got " + std::to_string(handle.size()));
  }
  EXPERTD_RETURN_IF_ERROR(check_range(offset, size));
  if (session->identity.local_pid == static_cast<int32_t>(::getpid())) {
    return base::Status(EXPERTD_REASON_IPC_SAME_PID, "client and daemon both have local pid " +
                                                         std::to_string(::getpid()) +
                                                         "; use a window or pass a VMM descriptor");
  }
  base::Result<std::unique_ptr<device::HeldMemory>> memory =
      session->place.device->import_ipc(handle.data(), offset, size);
  if (!memory.is_ok()) {
    return memory.status().with_context("registering a CUDA IPC handle");
  }
  return install(session, std::move(memory).value(), base::ScopedFd(), 0);
}

base::Result<BufferGrant> SessionService::register_fd(base::SessionId id, uint64_t token, uint64_t offset,
                                                      uint64_t size, uint64_t allocation_size) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  const SessionRef session = found.value();
  base::ScopedFd fd;
  base::Status fits;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    const auto entry = session->fds.find(token);
    if (entry == session->fds.end() || entry->second.for_client) {
      return base::Status(EXPERTD_REASON_NO_SUCH_TOKEN);
    }
    fd = std::move(entry->second.fd);
    session->fds.erase(entry);
    fits = check_registered(*session, size);  // before it is mapped; install() counts
  }
  const base::Status importable = check_importable(session->place.device->info().is_cuda, fd.get());
  for (const base::Status& check : {importable, check_range(offset, size), fits}) {
    if (!check.is_ok()) {
      discard_fd(std::move(fd));
      return check;
    }
  }
  base::Result<std::unique_ptr<device::HeldMemory>> memory =
      session->place.device->import_fd(std::move(fd), offset, size, allocation_size);
  if (!memory.is_ok()) {
    return memory.status().with_context("registering shared memory");
  }
  return install(session, std::move(memory).value(), base::ScopedFd(), 0);
}

// Reserved before the device is asked: two windows that are created at a time share the limit.
base::Status SessionService::reserve_window(Session& session, uint64_t size) {
  const uint64_t limit = options_.max_window_bytes;
  const std::lock_guard<std::mutex> lock(session.mutex);
  if (limit != 0 && (size > limit || session.window_bytes > limit - size)) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "session.max_window_bytes = " + std::to_string(limit) + ", " +
                                                           std::to_string(session.window_bytes) + " in use");
  }
  session.window_bytes += size;
  return base::Status::ok();
}

base::Result<BufferGrant> SessionService::create_window(base::SessionId id, uint64_t size) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  const SessionRef session = found.value();
  EXPERTD_RETURN_IF_ERROR(reserve_window(*session, size));
  base::Result<device::Window> window = session->place.device->create_window(size);
  if (!window.is_ok()) {
    const std::lock_guard<std::mutex> lock(session->mutex);
    session->window_bytes -= size;
    return window.status().with_context("creating a window");
  }
  return install(session, std::move(window.value().memory), std::move(window.value().fd), size);
}

base::Status SessionService::remove_buffer(const SessionRef& session, uint32_t buffer_id, uint64_t deadline_ns) {
  const engine::Mapping* mapping = nullptr;
  {
    const std::lock_guard<std::mutex> lock(session->mutex);
    const auto found = session->buffers.find(buffer_id);
    if (found == session->buffers.end()) {
      return base::Status(EXPERTD_REASON_NO_SUCH_BUFFER, "buffer " + std::to_string(buffer_id));
    }
    mapping = &found->second.memory->mapping();
  }
  LoopPort* loop = session->place.loop;
  auto busy = std::make_shared<bool>(true);
  while (true) {
    // Admission stops at once, so that the wait ends; a buffer that stays busy is given back to the client as it was.
    EXPERTD_RETURN_IF_ERROR(loop->run([session, loop, mapping, buffer_id, busy] {
      *busy = loop->uses(session->id, mapping);
      session->tables.buffers[buffer_id] = nullptr;
    }));
    if (!*busy) {
      break;
    }
    if (base::now_ns() >= deadline_ns) {
      EXPERTD_RETURN_IF_ERROR(
          loop->run([session, mapping, buffer_id] { session->tables.buffers[buffer_id] = mapping; }));
      return base::Status(EXPERTD_REASON_BUFFER_BUSY, "buffer " + std::to_string(buffer_id));
    }
    std::this_thread::sleep_for(kBusyPoll);
  }
  const std::unique_ptr<device::HeldMemory> unused = take_buffer(*session, buffer_id);
  return base::Status::ok();
}

base::Status SessionService::unregister(base::SessionId id, uint32_t buffer_id, uint64_t deadline_ns) {
  base::Result<SessionRef> found = find(id);
  if (!found.is_ok()) {
    return found.status();
  }
  return remove_buffer(found.value(), buffer_id, deadline_ns);
}

}  // namespace expertd::session
