// SPDX-License-Identifier: Apache-2.0
// GPU memory that more than one GPU or process touches: VMM allocations of the daemon, VMM allocations imported from a
// client, legacy IPC handles opened in several contexts. Made and destroyed on control threads, which may block; the
// loop thread only reads the mapping. Each object owns its mapping and gives it back in its destructor.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/device/cuda/closer.h"
#include "daemon/device/cuda/driver.h"
#include "daemon/device/device.h"
#include "daemon/device/pool.h"

namespace expertd::device::cuda {

/// One GPU as memory needs to know it.
struct GpuView {
  base::DeviceIndex index;
  CUdevice device = 0;
  CUcontext context = nullptr;
  LaunchGate* gate = nullptr;  // in the Registry
};

/// Who may touch a piece of memory: its home first, then every GPU with peer access to it.
struct Reach {
  const Driver* driver = nullptr;
  Closer* closer = nullptr;
  GpuView home;
  std::vector<GpuView> gpus;  // home included
  bool adapters = false;      // and network adapters
};

/// A VMM allocation mapped at one address for all GPUs of `reach`.
class VmmMemory : public HeldMemory {
 public:
  /// What create() of `bytes` allocates: rounded up to the granularity of the home device. POOL_EXHAUSTED for more than
  /// any GPU has, CUDA.
  static base::Result<uint64_t> allocation_bytes(const Reach& reach, uint64_t bytes);
  /// Allocates at least `bytes` (rounded up to the granularity), not zeroed. POOL_EXHAUSTED, CUDA.
  static base::Result<std::unique_ptr<VmmMemory>> create(const Reach& reach, uint64_t bytes, Pool* pool);
  /// Maps a client's allocation of allocation_bytes; the mapping is [offset, offset + bytes) of it.
  struct Import {
    base::ScopedFd fd;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    uint64_t allocation_bytes = 0;
  };
  static base::Result<std::unique_ptr<VmmMemory>> import(const Reach& reach, const Import& import);

  ~VmmMemory() override;
  VmmMemory(const VmmMemory&) = delete;
  VmmMemory& operator=(const VmmMemory&) = delete;

  CUdeviceptr address() const { return address_; }
  uint64_t allocated_bytes() const { return allocated_bytes_; }
  base::Result<base::ScopedFd> export_fd() const;

 private:
  VmmMemory() = default;
  base::Status map(const Reach& reach);
  void fill_mapping(const Reach& reach, const Import& part);

  const Driver* driver_ = nullptr;
  Pool* pool_ = nullptr;
  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr address_ = 0;
  uint64_t allocated_bytes_ = 0;
  bool has_handle_ = false;
  bool mapped_ = false;
};

/// A legacy IPC handle, opened once in the context of each GPU of `reach`: another address in each. Its end hands the
/// mappings to the Closer, because closing beside a parked stream would hang the context.
class IpcMemory : public HeldMemory {
 public:
  struct Range {
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };
  static base::Result<std::unique_ptr<IpcMemory>> open(const Reach& reach, const void* handle, const Range& range);
  ~IpcMemory() override;
  IpcMemory(const IpcMemory&) = delete;
  IpcMemory& operator=(const IpcMemory&) = delete;

 private:
  struct Opened {
    CUcontext context;
    CUdeviceptr address;
    LaunchGate* gate;
  };
  IpcMemory() = default;

  Closer* closer_ = nullptr;
  std::vector<Opened> opened_;
};

/// Pinned host memory that the host and every GPU read and write at the same address. Zeroed. Given a closer, its end
/// hands the memory over, because freeing it beside a parked stream would hang; without one, nothing may be parked.
class PinnedMemory {
 public:
  /// POOL_EXHAUSTED when the host has no such memory, CUDA.
  static base::Result<std::unique_ptr<PinnedMemory>> create(const Driver& driver, CUcontext context, uint64_t bytes,
                                                            Closer* closer = nullptr);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  void* host() const { return host_; }
  CUdeviceptr device() const { return device_; }

 private:
  PinnedMemory(const Driver& driver, CUcontext context, Closer* closer)
      : driver_(driver), context_(context), closer_(closer) {}

  const Driver& driver_;
  CUcontext context_;
  Closer* closer_;
  void* host_ = nullptr;
  CUdeviceptr device_ = 0;
};

}  // namespace expertd::device::cuda
