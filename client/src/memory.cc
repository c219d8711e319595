// SPDX-License-Identifier: Apache-2.0
#include "client/src/memory.h"

#include <sys/mman.h>

#include <algorithm>

#include "client/src/clock.h"
#include "client/src/session.h"
#include "expertd/v1/session.pb.h"

namespace expertd::client {
namespace {

constexpr uint64_t kMaxBufferBytes = uint64_t{1} << 46;

uintptr_t address_of(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

std::pair<uintptr_t, uint64_t> key_of(const Buffer& buffer) {
  return {address_of(buffer.data), buffer.bytes};
}

uint64_t deadline() {
  return deadline_after(kControlTimeoutNs);
}

}  // namespace

Memory::~Memory() {
  for (auto& [key, buffer] : buffers_) {
    unmap(buffer.get());
  }
}

void Memory::unmap(Buffer* buffer) {
  if (buffer->kind == BufferKind::kWindow) {
    device_->unmap_window(buffer->mapping);
  } else if (buffer->kind == BufferKind::kDescriptor && buffer->mapping.data != nullptr) {
    munmap(buffer->mapping.data, buffer->mapping.bytes);
  }
  buffer->mapping = MappedWindow();
}

Status Memory::check_room(uint64_t bytes) const {
  if (bytes == 0 || bytes > kMaxBufferBytes) {
    return range_error(EXPERTD_REASON_ARGUMENT_RANGE, "bytes", static_cast<int64_t>(bytes), 1,
                       static_cast<int64_t>(kMaxBufferBytes));
  }
  const std::lock_guard lock(mutex_);
  if (buffers_.size() + views_.size() >= kMaxBuffers) {
    return range_error(EXPERTD_REASON_BUFFER_LIMIT, "buffers", static_cast<int64_t>(kMaxBuffers) + 1, 0, kMaxBuffers);
  }
  return {};
}

Status Memory::insert(std::unique_ptr<Buffer> buffer, Buffer** out) {
  buffer->session = session_;
  *out = buffer.get();
  const std::lock_guard lock(mutex_);
  if (buffer->kind == BufferKind::kView) {
    views_.push_back(std::move(buffer));
    return {};
  }
  const Key key = key_of(*buffer);
  if (!buffers_.emplace(key, std::move(buffer)).second) {
    return error(EXPERTD_REASON_BAD_STATE, "these bytes at this address are registered already");
  }
  return {};
}

std::unique_ptr<Buffer> Memory::extract(const Buffer* buffer) {
  const std::lock_guard lock(mutex_);
  const auto found = buffers_.find(key_of(*buffer));
  if (found != buffers_.end() && found->second.get() == buffer) {
    std::unique_ptr<Buffer> owned = std::move(found->second);
    buffers_.erase(found);
    return owned;
  }
  const auto view = std::find_if(views_.begin(), views_.end(), [buffer](const auto& it) { return it.get() == buffer; });
  if (view == views_.end()) {
    return nullptr;
  }
  std::unique_ptr<Buffer> owned = std::move(*view);
  views_.erase(view);
  return owned;
}

// Mappings do not overlap. Registrations of GPU memory may: a part of an allocation first, all of it later. Of those
// that begin at the same address the largest comes first.
Buffer* Memory::containing(uintptr_t address, uint64_t bytes) const {
  Buffer* touching = nullptr;
  for (auto it = buffers_.upper_bound({address, UINT64_MAX}); it != buffers_.begin();) {
    Buffer* buffer = (--it)->second.get();
    const uint64_t offset = address - address_of(buffer->data);
    if (offset < buffer->bytes) {
      touching = touching == nullptr ? buffer : touching;
      if (bytes <= buffer->bytes - offset) {
        return buffer;
      }
    }
    if (!device_->is_cuda()) {
      break;
    }
  }
  return touching;
}

Resolved Memory::resolve(const void* pointer, uint64_t bytes, Place* place, Buffer** out) const {
  const std::lock_guard lock(mutex_);
  Buffer* buffer = containing(address_of(pointer), bytes);
  if (buffer == nullptr) {
    return Resolved::kUnknown;
  }
  const uint64_t offset = address_of(pointer) - address_of(buffer->data);
  *place = {buffer->id, offset};
  *out = buffer;
  return bytes > buffer->bytes - offset ? Resolved::kOutOfBounds : Resolved::kFound;
}

Status Memory::map_granted(uint32_t id, uint64_t token, uint64_t bytes, Buffer* buffer) {
  FdReply reply;
  Status status = connection_->get_fd(token, deadline(), &reply);
  if (!status.ok()) {
    return status;
  }
  if (reply.bytes != 0 && reply.bytes != bytes) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the window was granted with %llu bytes and handed over with %llu",
                 static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(reply.bytes));
  }
  const MappedWindow before = buffer->mapping;
  status = device_->map_window(std::move(reply.fd), bytes, before, &buffer->mapping);
  if (status.ok()) {
    buffer->id = id;
    buffer->data = buffer->mapping.data;
  }
  return status;
}

Status Memory::request_window(uint64_t bytes, Buffer* buffer) {
  expertd_v1_CreateWindowRequest request{};
  request.size = bytes;
  expertd_v1_CreateWindowResponse response{};
  Status status = connection_->call("CreateWindow", {expertd_v1_CreateWindowRequest_fields, &request},
                                    {expertd_v1_CreateWindowResponse_fields, &response}, kControlTimeoutNs);
  if (!status.ok()) {
    return status;
  }
  if (response.buffer_id == 0 || response.size < bytes || response.size > 2 * kMaxBufferBytes) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the daemon granted window %u of %llu bytes for %llu", response.buffer_id,
                 static_cast<unsigned long long>(response.size), static_cast<unsigned long long>(bytes));
  }
  status = map_granted(response.buffer_id, response.fd_token, response.size, buffer);
  if (!status.ok()) {
    // Best effort: the first failure is the one to report.
    static_cast<void>(unregister(response.buffer_id));
  }
  return status;
}

Status Memory::create_window(uint64_t bytes, Buffer** buffer) {
  Status status = check_room(bytes);
  auto made = std::make_unique<Buffer>();
  if (status.ok()) {
    status = request_window(bytes, made.get());
  }
  if (!status.ok()) {
    return status;
  }
  made->bytes = bytes;
  return insert(std::move(made), buffer);
}

Status Memory::adopt_window(uint32_t id, uint64_t token, uint64_t bytes, Buffer** buffer) {
  Status status = check_room(bytes);
  auto made = std::make_unique<Buffer>();
  made->of_group = true;
  if (status.ok()) {
    status = map_granted(id, token, bytes, made.get());
  }
  if (!status.ok()) {
    return status;
  }
  made->bytes = bytes;
  return insert(std::move(made), buffer);
}

Status Memory::free_allocated(void* data) {
  Place place;
  Buffer* buffer = nullptr;
  if (resolve(data, 1, &place, &buffer) == Resolved::kUnknown || place.offset != 0) {
    return error(EXPERTD_REASON_NO_SUCH_BUFFER, "%p was not returned by expertd_alloc", data);
  }
  return release(buffer);
}

Status Memory::unregister(uint32_t id) {
  expertd_v1_UnregisterBufferRequest request{};
  request.buffer_id = id;
  expertd_v1_UnregisterBufferResponse response{};
  Status status = connection_->call("UnregisterBuffer", {expertd_v1_UnregisterBufferRequest_fields, &request},
                                    {expertd_v1_UnregisterBufferResponse_fields, &response}, kControlTimeoutNs);
  if (status.reason == EXPERTD_REASON_TIMEOUT) {
    return error(EXPERTD_REASON_BUFFER_BUSY, "an operation in flight still used buffer %u after 5 s", id);
  }
  return status;
}

Status Memory::release(Buffer* buffer) {
  if (buffer->of_group) {
    return error(EXPERTD_REASON_BAD_STATE, "a group's window goes with its group");
  }
  if (buffer->kind != BufferKind::kView) {
    Status status = buffer->kind == BufferKind::kWindow ? session_->wait_unused(buffer->data, buffer->bytes) : Status();
    if (!status.ok()) {
      return status;
    }
    status = unregister(buffer->id);
    // What the daemon does not know any more, or with the daemon gone, is released here all the same.
    if (status.reason != EXPERTD_REASON_NO_SUCH_BUFFER && !is_end_of_lease(status.reason) && !status.ok()) {
      return status;
    }
  }
  const std::unique_ptr<Buffer> owned = extract(buffer);
  if (owned == nullptr) {
    return error(EXPERTD_REASON_NO_SUCH_BUFFER, "the buffer was released already");
  }
  unmap(owned.get());
  return {};
}

Status Memory::refresh(Buffer* buffer) {
  const uint32_t stale = buffer->id;
  if (buffer->automatic) {
    return release(buffer);
  }
  Status status = unregister(stale);
  if (!status.ok() && status.reason != EXPERTD_REASON_NO_SUCH_BUFFER) {
    return status;
  }
  Buffer renewed;
  renewed.data = buffer->data;
  renewed.bytes = buffer->bytes;
  status = register_exported(&renewed);
  const std::lock_guard lock(mutex_);
  buffer->id = status.ok() ? renewed.id : kNoBuffer;
  buffer->identity = renewed.identity;
  return status;
}

void Memory::drop(Buffer* buffer) {
  const std::unique_ptr<Buffer> owned = extract(buffer);
  if (owned != nullptr) {
    // The group is left already: what does not end in time belongs to a stream that the caller holds back.
    static_cast<void>(session_->wait_unused(owned->data, owned->bytes));
    unmap(owned.get());
  }
}

Status Memory::recreate_one(Buffer* buffer) {
  switch (buffer->kind) {
    case BufferKind::kWindow:
      if (buffer->of_group) {
        // It ended with the daemon; the id may be another buffer's now. Joining anew makes a window of its own.
        buffer->id = kNoBuffer;
        return {};
      }
      return request_window(buffer->bytes, buffer);
    case BufferKind::kDescriptor:
      return put_descriptor(buffer);
    case BufferKind::kDevice:
      return register_exported(buffer);
    case BufferKind::kView:
      break;
  }
  return {};
}

Status Memory::recreate() {
  Map before;
  {
    const std::lock_guard lock(mutex_);
    before.swap(buffers_);
  }
  Status first;
  for (auto& [key, buffer] : before) {
    if (buffer->automatic) {
      // Its memory may have been freed long ago, which must not keep the session from coming back.
      continue;
    }
    Status status = recreate_one(buffer.get());
    if (!status.ok()) {
      // It stays known, with an id that the daemon refuses by name; 0 would mean "not given".
      buffer->id = kNoBuffer;
      first = first.ok() ? std::move(status) : std::move(first);
    }
    Buffer* inserted = nullptr;
    // Old and new addresses cannot collide: everything old is still mapped.
    static_cast<void>(insert(std::move(buffer), &inserted));
  }
  return first;
}

}  // namespace expertd::client
