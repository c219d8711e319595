// SPDX-License-Identifier: Apache-2.0
// Memory of the caller: descriptors, GPU memory, and what expertd_alloc makes. Callers' threads.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "client/src/clock.h"
#include "client/src/memory.h"
#include "expertd/v1/session.pb.h"

namespace expertd::client {
namespace {

constexpr uint64_t kPage = 4096;

uint64_t deadline() {
  return deadline_after(kControlTimeoutNs);
}

Status check_descriptor(int fd, uint64_t offset, uint64_t bytes) {
  struct stat info {};
  if (fstat(fd, &info) != 0) {
    return system_error("fstat of the descriptor");
  }
  const uint64_t size = static_cast<uint64_t>(info.st_size);
  if (offset > size || bytes > size - offset) {
    return range_error(EXPERTD_REASON_OUT_OF_BOUNDS, "offset + bytes", static_cast<int64_t>(offset + bytes), 1,
                       static_cast<int64_t>(size));
  }
  if (offset % 16 != 0) {
    return error(EXPERTD_REASON_UNALIGNED, "offset = %llu, allowed multiples of 16",
                 static_cast<unsigned long long>(offset));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return error(EXPERTD_REASON_UNSEALED_MEMORY, "the descriptor is not a memfd with F_SEAL_SHRINK");
  }
  return {};
}

// Maps the pages around [offset, offset + bytes) of the buffer's descriptor.
Status map_descriptor(Buffer* buffer) {
  const uint64_t first_page = buffer->fd_offset & ~(kPage - 1);
  const uint64_t lead = buffer->fd_offset - first_page;
  void* base = mmap(nullptr, lead + buffer->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, buffer->fd.get(),
                    static_cast<off_t>(first_page));
  if (base == MAP_FAILED) {
    return system_error("mmap of the descriptor");
  }
  buffer->mapping = {base, lead + buffer->bytes, 0};
  buffer->data = static_cast<char*>(base) + lead;
  return {};
}

}  // namespace

Status Memory::put_descriptor(Buffer* buffer) {
  expertd_v1_RegisterBufferRequest request{};
  uint64_t token = 0;
  Status status = connection_->put_fd(buffer->fd.get(), deadline(), &token);
  if (!status.ok()) {
    return status;
  }
  request.which_source = expertd_v1_RegisterBufferRequest_fd_token_tag;
  request.source.fd_token = token;
  request.offset = buffer->fd_offset;
  request.size = buffer->bytes;
  expertd_v1_RegisterBufferResponse response{};
  status = connection_->call("RegisterBuffer", {expertd_v1_RegisterBufferRequest_fields, &request},
                             {expertd_v1_RegisterBufferResponse_fields, &response}, kControlTimeoutNs);
  buffer->id = response.buffer_id;
  return status;
}

Status Memory::register_fd(int fd, uint64_t offset, uint64_t bytes, Buffer** buffer) {
  if (device_->is_cuda()) {
    return error(EXPERTD_REASON_WRONG_DEVICE_KIND, "a memfd belongs to host sessions, this one is on %s",
                 device_->name().c_str());
  }
  Status status = check_room(bytes);
  if (status.ok()) {
    status = check_descriptor(fd, offset, bytes);
  }
  if (!status.ok()) {
    return status;
  }
  auto made = std::make_unique<Buffer>();
  made->kind = BufferKind::kDescriptor;
  made->fd = OwnedFd(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  made->fd_offset = offset;
  made->bytes = bytes;
  if (!made->fd.valid()) {
    return system_error("dup of the descriptor");
  }
  status = map_descriptor(made.get());
  if (status.ok()) {
    status = put_descriptor(made.get());
  }
  if (!status.ok()) {
    unmap(made.get());
    return status;
  }
  return insert(std::move(made), buffer);
}

Status Memory::register_exported(Buffer* buffer) {
  ExportedMemory exported;
  const bool same_pid = connection_->welcome().local_pid == getpid();
  Status status = device_->export_memory(buffer->data, buffer->bytes, same_pid, &exported);
  if (!status.ok()) {
    return status;
  }
  expertd_v1_RegisterBufferRequest request{};
  request.offset = exported.offset;
  request.size = buffer->bytes;
  if (exported.has_ipc_handle) {
    request.which_source = expertd_v1_RegisterBufferRequest_cuda_ipc_handle_tag;
    request.source.cuda_ipc_handle.size = sizeof(exported.ipc_handle);
    std::copy_n(exported.ipc_handle, sizeof(exported.ipc_handle), request.source.cuda_ipc_handle.bytes);
  } else {
    uint64_t token = 0;
    status = connection_->put_fd(exported.fd.get(), deadline(), &token);
    if (!status.ok()) {
      return status;
    }
    request.which_source = expertd_v1_RegisterBufferRequest_fd_token_tag;
    request.source.fd_token = token;
    request.allocation_size = exported.allocation_bytes;
  }
  expertd_v1_RegisterBufferResponse response{};
  status = connection_->call("RegisterBuffer", {expertd_v1_RegisterBufferRequest_fields, &request},
                             {expertd_v1_RegisterBufferResponse_fields, &response}, kControlTimeoutNs);
  buffer->id = response.buffer_id;
  buffer->identity = exported.buffer_id;
  return status;
}

Status Memory::register_new(std::unique_ptr<Buffer> made, Buffer** buffer) {
  made->kind = BufferKind::kDevice;
  Status status = register_exported(made.get());
  const uint32_t id = made->id;
  if (status.ok()) {
    status = insert(std::move(made), buffer);
    if (!status.ok()) {
      // The first failure is the one to report.
      static_cast<void>(unregister(id));
    }
  }
  return status;
}

Status Memory::register_pointer(void* data, uint64_t bytes, Buffer** buffer) {
  Status status = check_room(bytes);
  if (!status.ok()) {
    return status;
  }
  auto made = std::make_unique<Buffer>();
  made->data = data;
  made->bytes = bytes;
  Place place;
  Buffer* parent = nullptr;
  if (resolve(data, bytes, &place, &parent) == Resolved::kFound) {
    made->kind = BufferKind::kView;
    made->id = place.buffer;
    return insert(std::move(made), buffer);
  }
  if (!device_->is_cuda()) {
    return error(EXPERTD_REASON_UNSEALED_MEMORY,
                 "memory at %p is not a sealed memfd; use expertd_alloc or expertd_register_fd", data);
  }
  return register_new(std::move(made), buffer);
}

// Null while there is room. What an operation in flight uses is left alone, and so is what the one that is being put
// together uses: its sequence has not ended either. What graphs name the daemon keeps anyway.
Buffer* Memory::least_recently_used() const {
  const RingClient& ring = *connection_->ring();
  const std::lock_guard lock(mutex_);
  const size_t used = buffers_.size() + views_.size();
  if (used < kMaxBuffers - kBuffersShared) {
    return nullptr;
  }
  size_t automatic = 0;
  Buffer* oldest = nullptr;
  for (const auto& [key, it] : buffers_) {
    automatic += it->automatic ? 1 : 0;
    const bool idle = it->automatic && it->captured_by == 0 && (it->last_use == 0 || ring.has_ended(it->last_use));
    if (idle && (oldest == nullptr || it->last_use < oldest->last_use)) {
      oldest = it.get();
    }
  }
  return automatic < kBuffersShared && used < kMaxBuffers ? nullptr : oldest;
}

void Memory::keep_captured(Buffer* buffer, uint64_t group) {
  const std::lock_guard lock(mutex_);
  buffer->captured_by = group;
}

void Memory::forget_captured(uint64_t group) {
  const std::lock_guard lock(mutex_);
  for (const auto& [key, it] : buffers_) {
    it->captured_by = it->captured_by == group ? 0 : it->captured_by;
  }
}

Status Memory::register_allocation(void* data, uint64_t bytes, Buffer** buffer) {
  Buffer* replaced = least_recently_used();
  if (replaced != nullptr) {
    // Best effort: without room the new one is refused by name.
    static_cast<void>(release(replaced));
  }
  Status status = check_room(bytes);
  if (!status.ok()) {
    return status;
  }
  auto made = std::make_unique<Buffer>();
  made->data = data;
  made->bytes = bytes;
  made->automatic = true;
  return register_new(std::move(made), buffer);
}

Status Memory::allocate(uint64_t bytes, void** data) {
  Buffer* buffer = nullptr;
  if (device_->is_cuda()) {
    Status status = create_window(bytes, &buffer);
    *data = status.ok() ? buffer->data : nullptr;
    return status;
  }
  Status status = check_room(bytes);
  if (!status.ok()) {
    return status;
  }
  const OwnedFd fd(memfd_create("expertd-alloc", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const uint64_t rounded = (bytes + kPage - 1) & ~(kPage - 1);
  if (!fd.valid() || ftruncate(fd.get(), static_cast<off_t>(rounded)) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    return system_error("memfd_create");
  }
  status = register_fd(fd.get(), 0, rounded, &buffer);
  *data = status.ok() ? buffer->data : nullptr;
  return status;
}

}  // namespace expertd::client
