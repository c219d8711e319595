// SPDX-License-Identifier: Apache-2.0
// Memory: the buffers of a session, by address: windows of the daemon mapped here, registered memory of the caller, and
// memory the library allocated. Any thread; the lock is never held during a call to the daemon, except that
// re-attaching, which runs alone, re-creates everything. Owned by the Session; buffers live until released or detached.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "client/src/connection.h"
#include "client/src/device_side.h"
#include "client/src/status.h"

namespace expertd::client {

class Session;

/// The daemon's limit of buffers of a session.
inline constexpr size_t kMaxBuffers = 1024;
/// As many as this there may always be of automatic registrations; more of them leave as many places to others.
inline constexpr size_t kBuffersShared = 128;
/// No buffer of any session.
inline constexpr uint32_t kNoBuffer = UINT32_MAX;
inline constexpr uint64_t kControlTimeoutNs = 5'000'000'000;

enum class BufferKind {
  kWindow,      // memory of the daemon, mapped here
  kDescriptor,  // a sealed memfd, of the caller or of expertd_alloc, mapped here
  kDevice,      // GPU memory of the caller
  kView         // a part of another buffer: registering registered memory
};

struct Buffer {
  Session* session = nullptr;
  BufferKind kind = BufferKind::kWindow;
  void* data = nullptr;
  uint64_t bytes = 0;
  uint32_t id = 0;
  MappedWindow mapping;
  OwnedFd fd;              // kDescriptor, for a re-attach
  uint64_t fd_offset = 0;  // kDescriptor
  uint64_t identity = 0;   // kDevice: the driver's id of the allocation
  bool automatic = false;  // kDevice: registered by the library on first use
  uint64_t last_use = 0;   // automatic: sequence of the last operation that names it; under the submit lock
  // Automatic: the group that captured it last; the daemon keeps it until that one is left.
  uint64_t captured_by = 0;
  bool of_group = false;  // kWindow: re-created by joining, not by re-attaching
};

/// Where a tensor lies, as ring descriptors say it.
struct Place {
  uint32_t buffer = 0;
  uint64_t offset = 0;
};

enum class Resolved { kFound, kUnknown, kOutOfBounds };

class Memory {
 public:
  Memory(Session* session, DeviceSide* device) : session_(session), device_(device) {}
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /// The attachment that ids belong to. While nothing else runs.
  void bind(Connection* connection) { connection_ = connection; }
  /// Gives every buffer its counterpart in the new attachment; what was registered on first use waits for its next one.
  Status recreate();

  Status create_window(uint64_t bytes, Buffer** buffer);
  /// A window that the daemon made with a group.
  Status adopt_window(uint32_t id, uint64_t token, uint64_t bytes, Buffer** buffer);
  Status register_fd(int fd, uint64_t offset, uint64_t bytes, Buffer** buffer);
  Status register_pointer(void* data, uint64_t bytes, Buffer** buffer);
  /// GPU: all of an allocation in which a tensor was found. Near the limit of buffers it takes the place of the
  /// automatic registration that was not used for the longest time. Under the submit lock.
  Status register_allocation(void* data, uint64_t bytes, Buffer** buffer);
  Status allocate(uint64_t bytes, void** data);
  Status free_allocated(void* data);
  /// BUFFER_BUSY leaves it as it was.
  Status release(Buffer* buffer);
  /// GPU: the memory behind a registration was freed and its address used again. An automatic registration is dropped,
  /// one of the caller's is renewed.
  Status refresh(Buffer* buffer);
  /// Unmaps a group's window; the daemon frees its side with the group.
  void drop(Buffer* buffer);
  /// A captured operation of the group names the buffer; the group is left.
  void keep_captured(Buffer* buffer, uint64_t group);
  void forget_captured(uint64_t group);

  Resolved resolve(const void* pointer, uint64_t bytes, Place* place, Buffer** buffer) const;

 private:
  // Address and bytes: a registration of a part of an allocation and one of all of it may begin at the same address.
  using Key = std::pair<uintptr_t, uint64_t>;
  using Map = std::map<Key, std::unique_ptr<Buffer>>;

  Status check_room(uint64_t bytes) const;
  Status map_granted(uint32_t id, uint64_t token, uint64_t bytes, Buffer* buffer);
  Status request_window(uint64_t bytes, Buffer* buffer);
  Status put_descriptor(Buffer* buffer);
  Status register_exported(Buffer* buffer);
  Status register_new(std::unique_ptr<Buffer> made, Buffer** buffer);
  Buffer* least_recently_used() const;
  Status unregister(uint32_t id);
  Status recreate_one(Buffer* buffer);
  Status insert(std::unique_ptr<Buffer> buffer, Buffer** out);
  std::unique_ptr<Buffer> extract(const Buffer* buffer);
  Buffer* containing(uintptr_t address, uint64_t bytes) const;
  void unmap(Buffer* buffer);

  Session* const session_;
  DeviceSide* const device_;
  Connection* connection_ = nullptr;
  mutable std::mutex mutex_;
  Map buffers_;
  std::vector<std::unique_ptr<Buffer>> views_;
};

}  // namespace expertd::client
