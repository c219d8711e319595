// SPDX-License-Identifier: Apache-2.0
// The host device on the caller's side: windows are sealed memfds, streams do not exist.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>

#include "client/src/device_side.h"

namespace expertd::client {
namespace {

Status only_on_gpu(const char* what) {
  return error(EXPERTD_REASON_WRONG_DEVICE_KIND, "%s belongs to GPU sessions", what);
}

Status no_capture() {
  return error(EXPERTD_REASON_UNSUPPORTED, "host sessions have no graphs to capture operations in");
}

class HostSide final : public DeviceSide {
 public:
  explicit HostSide(std::string name) : name_(std::move(name)) {}

  bool is_cuda() const override { return false; }
  const std::string& name() const override { return name_; }

  Status begin(const expertd_attach_welcome& welcome, OwnedFd, uint32_t) override {
    if (welcome.device_kind != EXPERTD_DEVICE_HOST) {
      return error(EXPERTD_REASON_WRONG_DEVICE_KIND, "%s is device kind %u of the daemon, not a host device",
                   name_.c_str(), welcome.device_kind);
    }
    return {};
  }
  void release_waiters() override {}

  Status map_window(OwnedFd fd, uint64_t bytes, const MappedWindow& at, MappedWindow* mapped) override;
  void unmap_window(const MappedWindow& mapped) override {
    if (mapped.data != nullptr) {
      munmap(mapped.data, mapped.bytes);
    }
  }

  Status export_memory(const void*, uint64_t, bool, ExportedMemory*) override { return only_on_gpu("a CUDA handle"); }
  Status buffer_id(const void*, uint64_t*) override { return only_on_gpu("a buffer id"); }
  Status allocation_of(const void*, void**, uint64_t*) override { return only_on_gpu("an allocation"); }

  Status check_stream(expertd_stream_t, bool* capturing) override {
    *capturing = false;
    return {};
  }
  Status ring_captured(uint32_t, uint64_t, expertd_stream_t) override { return no_capture(); }
  Status take_captured(uint32_t, expertd_stream_t) override { return no_capture(); }
  void exchange_capture_mode(int*) override {}
  Status ring_doorbell(uint32_t, uint64_t, expertd_stream_t) override { return {}; }
  Status wait_completion(uint32_t, uint64_t, expertd_stream_t) override { return {}; }
  Status wait_word(const void*, uint64_t, expertd_stream_t) override { return {}; }
  LocalKernels* local_kernels() override { return nullptr; }
  Status copy(void* destination, const void* source, uint64_t bytes, expertd_stream_t) override {
    std::memmove(destination, source, bytes);
    return {};
  }
  Status synchronize(expertd_stream_t, uint64_t) override { return {}; }

 private:
  const std::string name_;
};

Status HostSide::map_window(OwnedFd fd, uint64_t bytes, const MappedWindow& at, MappedWindow* mapped) {
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) {
    return system_error("fstat of a window");
  }
  if (bytes == 0 || static_cast<uint64_t>(info.st_size) < bytes) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the daemon's window has %llu bytes, %llu were promised",
                 static_cast<unsigned long long>(info.st_size), static_cast<unsigned long long>(bytes));
  }
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return error(EXPERTD_REASON_UNSEALED_MEMORY, "the daemon's window is not sealed against shrinking");
  }
  // Over the old mapping, so that the caller's pointers into the window stay good across a re-attach.
  const bool in_place = at.data != nullptr && at.bytes == bytes;
  void* data = mmap(in_place ? at.data : nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | (in_place ? MAP_FIXED : 0), fd.get(), 0);
  if (data == MAP_FAILED) {
    return system_error("mmap of a window");
  }
  if (at.data != nullptr && !in_place) {
    munmap(at.data, at.bytes);
  }
  *mapped = {data, bytes, 0};
  return {};
}

}  // namespace

std::unique_ptr<DeviceSide> create_host_side(std::string name) {
  return std::make_unique<HostSide>(std::move(name));
}

Status create_device_side(const std::string& device, std::unique_ptr<DeviceSide>* side) {
  if (device.rfind("host:", 0) == 0 && device.size() < EXPERTD_ATTACH_NAME_BYTES) {
    *side = create_host_side(device);
    return {};
  }
  if (device.rfind("cuda:", 0) == 0 || device.rfind("GPU-", 0) == 0) {
    return create_cuda_side(device, side);
  }
  if (device.rfind("MIG-", 0) == 0) {
    return error(EXPERTD_REASON_MIG_UNSUPPORTED, "%s: MIG instances cannot be used; give a whole GPU", device.c_str());
  }
  return error(EXPERTD_REASON_NO_SUCH_DEVICE, "device = \"%s\", allowed \"host:N\", \"cuda:N\" or \"GPU-...\"",
               device.c_str());
}

}  // namespace expertd::client
