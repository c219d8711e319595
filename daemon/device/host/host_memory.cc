// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace expertd::device {

namespace {

constexpr uint64_t kPageBytes = 4096;

class HostMemory : public HeldMemory {
 public:
  HostMemory(void* base, uint64_t mapped_bytes, uint64_t skip, uint64_t bytes, base::DeviceIndex home)
      : base_(base), mapped_bytes_(mapped_bytes) {
    mapping_.bytes = bytes;
    mapping_.home = home;
    mapping_.base.fill(static_cast<char*>(base) + skip);  // every host device sees the one address
  }
  ~HostMemory() override { ::munmap(base_, mapped_bytes_); }

 private:
  void* base_;
  uint64_t mapped_bytes_;
};

// Only memory whose pages come back by themselves may be read and written through a mapping that its owner shares. A
// client may punch holes into any memfd that the daemon can write. On tmpfs a hole reads as zeros and the next write
// takes a fresh page (while a hole is punched, an access to it waits for that); what fails there is the memory limit of
// the daemon's cgroup alone, as anywhere. On hugetlbfs a hole also gives the reservation of its pages back, and an
// access that then finds the pool of huge pages empty ends the daemon with SIGBUS.
base::Status check_file_system(int fd) {
  struct statfs facts {};
  if (::fstatfs(fd, &facts) != 0) {
    return base::errno_status("fstatfs of shared memory");
  }
  if (facts.f_type == HUGETLBFS_MAGIC) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        "a memfd of hugetlbfs (MFD_HUGETLB): its pages can be taken away; use one without huge pages");
  }
  if (facts.f_type != TMPFS_MAGIC) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "shared memory that is not of tmpfs; use memfd_create");
  }
  return base::Status::ok();
}

/// A window's memory with its place in the account of a device.
class PooledMemory final : public HeldMemory {
 public:
  PooledMemory(std::unique_ptr<HeldMemory> memory, Pool* pool) : memory_(std::move(memory)), pool_(pool) {
    mapping_ = memory_->mapping();
  }
  ~PooledMemory() override { pool_->give(mapping_.bytes); }

 private:
  std::unique_ptr<HeldMemory> memory_;
  Pool* pool_;
};

base::Result<Window> create_window_of(uint64_t rounded, base::DeviceIndex home) {
  base::ScopedFd fd(::memfd_create("expertd-window", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) {
    return base::errno_status("memfd_create");
  }
  if (::ftruncate(fd.get(), static_cast<off_t>(rounded)) != 0) {
    return base::errno_status("ftruncate of a window");
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return base::errno_status("sealing a window");
  }
  void* base = ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) {
    return base::errno_status("mapping a window");
  }
  Window window;
  window.memory = std::make_unique<HostMemory>(base, rounded, 0, rounded, home);
  window.fd = std::move(fd);
  window.bytes = rounded;
  return window;
}

}  // namespace

base::Result<uint64_t> host_window_size(uint64_t bytes) {
  if (bytes == 0 || bytes > (1ULL << 46)) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "window size " + std::to_string(bytes) + ", allowed 1..2^46");
  }
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

base::Result<Window> create_host_window(uint64_t bytes, base::DeviceIndex home, Pool* pool) {
  const base::Result<uint64_t> size = host_window_size(bytes);
  if (!size.is_ok()) {
    return size.status();
  }
  const uint64_t rounded = size.value();
  EXPERTD_RETURN_IF_ERROR(pool->take(rounded));
  base::Result<Window> window = create_window_of(rounded, home);
  if (!window.is_ok()) {
    pool->give(rounded);
    return window.status();
  }
  window.value().memory = std::make_unique<PooledMemory>(std::move(window.value().memory), pool);
  return window;
}

base::Result<std::unique_ptr<HeldMemory>> import_host_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                         base::DeviceIndex home) {
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return base::Status(EXPERTD_REASON_UNSEALED_MEMORY);
  }
  EXPERTD_RETURN_IF_ERROR(check_file_system(fd.get()));
  struct stat facts {};
  if (::fstat(fd.get(), &facts) != 0) {
    return base::errno_status("fstat of shared memory");
  }
  const uint64_t size = static_cast<uint64_t>(facts.st_size);
  if (bytes == 0 || offset > size || bytes > size - offset) {
    return base::Status(EXPERTD_REASON_OUT_OF_BOUNDS, "offset " + std::to_string(offset) + " + size " +
                                                          std::to_string(bytes) + " exceeds the memfd's " +
                                                          std::to_string(size) + " bytes");
  }
  if (offset % 16 != 0) {
    return base::Status(EXPERTD_REASON_UNALIGNED, "offset " + std::to_string(offset) + " is not a multiple of 16");
  }
  const uint64_t skip = offset % kPageBytes;
  void* base =
      ::mmap(nullptr, bytes + skip, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), static_cast<off_t>(offset - skip));
  if (base == MAP_FAILED) {
    return base::errno_status("mapping shared memory");
  }
  return std::unique_ptr<HeldMemory>(std::make_unique<HostMemory>(base, bytes + skip, skip, bytes, home));
}

}  // namespace expertd::device
