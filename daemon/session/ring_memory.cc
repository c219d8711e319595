// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/ring_memory.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

namespace expertd::session {

base::Result<std::unique_ptr<RingMemory>> RingMemory::create(base::SessionId session, uint64_t generation,
                                                             uint32_t slot_count) {
  const uint64_t bytes =
      EXPERTD_RING_HEADER_BYTES + uint64_t{slot_count} * (EXPERTD_SLOT_BYTES + EXPERTD_COMPLETION_BYTES);
  base::ScopedFd fd(::memfd_create("expertd-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) {
    return base::errno_status("memfd_create of a ring");
  }
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return base::errno_status("sizing a ring");
  }
  base::ScopedFd wake_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_fd.valid()) {
    return base::errno_status("eventfd of a ring");
  }
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (base == MAP_FAILED) {
    return base::errno_status("mapping a ring");
  }
  auto* header = static_cast<expertd_ring_header*>(base);
  header->magic = EXPERTD_RING_MAGIC;
  header->abi_major = EXPERTD_ABI_MAJOR;
  header->abi_minor = EXPERTD_ABI_MINOR;
  header->header_bytes = EXPERTD_RING_HEADER_BYTES;
  header->slot_count = slot_count;
  header->slot_bytes = EXPERTD_SLOT_BYTES;
  header->completion_bytes = EXPERTD_COMPLETION_BYTES;
  header->session_id = session.value;
  header->generation = generation;
  header->slots_offset = EXPERTD_RING_HEADER_BYTES;
  header->completions_offset = EXPERTD_RING_HEADER_BYTES + uint64_t{slot_count} * EXPERTD_SLOT_BYTES;
  header->total_bytes = bytes;
  return std::unique_ptr<RingMemory>(new RingMemory(std::move(fd), std::move(wake_fd), base, bytes, slot_count));
}

RingMemory::~RingMemory() {
  ::munmap(base_, bytes_);
}

}  // namespace expertd::session
