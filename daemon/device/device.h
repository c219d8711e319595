// SPDX-License-Identifier: Apache-2.0
// Device: the control side of one device (host or CUDA) beside its DevicePort. Calls come from control threads, may
// block and may synchronise; the loop thread never calls them. Owned by main. Implementations serialise inside.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/engine/ports.h"

namespace expertd::device {

/// Memory that the daemon holds for a session: a window it allocated or a buffer it opened. The destructor unmaps in
/// every device's context; it may block and runs only after the engines reported the last operation that could touch
/// it.
class HeldMemory {
 public:
  virtual ~HeldMemory() = default;
  const engine::Mapping& mapping() const { return mapping_; }

 protected:
  engine::Mapping mapping_;
};

struct Window {
  std::unique_ptr<HeldMemory> memory;
  base::ScopedFd fd;   // what the client maps: a sealed memfd, or a VMM allocation
  uint64_t bytes = 0;  // after rounding
};

struct SessionGrant {
  base::ScopedFd flag_page_fd;  // CUDA only
  uint64_t flag_page_bytes = 0;
};

struct DeviceInfo {
  bool is_cuda = false;
  std::string uuid;  // "host:N" or "GPU-...": what clients name
  std::string name;
  bool mps_active = false;
  std::string doorbell_form;  // "host", "words" or "kernels" (MPS)
  std::string kernels;        // "bulk" (with the copy unit of sm_90), "generic", or "host"
  // CUDA: what the context took when the device started. The source is "process" (the driver's account of this
  // process), "device" (how much more of the GPU was in use after the start than before) or empty (not known).
  uint64_t context_bytes = 0;
  std::string context_source;
  uint64_t pool_used_bytes = 0;  // all that the device allocated: windows and its own tables
  uint64_t window_bytes = 0;     // windows of sessions, of ended ones too until they are reclaimed
  uint32_t armed_streams = 0;
  uint32_t armed_streams_max = 0;
  uint32_t lane_streams = 0;        // of capture lanes, beside the armed ones
  uint32_t parked_streams_max = 0;  // of both together
  uint64_t peer_access_mask = 0;
  bool healthy = true;
};

/// What a rank of a group takes, to the byte as it is allocated.
struct GroupMemory {
  uint64_t table_bytes = 0;   // on the device, beside the handles, rounding included. Host devices: once for all ranks
  uint64_t handle_bytes = 0;  // on the device: all handles
  uint32_t handle_count = 0;  // handle_capacity() will say the same
  uint64_t pinned_bytes = 0;  // of the host, besides
};

/// Hears that a device lost its context, which nothing mends inside the process. Any thread, a loop's too; it must not
/// block. Told at least once per loss, by whoever saw it.
class LossObserver {
 public:
  virtual ~LossObserver() = default;
  virtual void context_lost(base::DeviceIndex device) = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  /// Whom to tell of a loss; once, before any other thread knows the device. The observer outlives it.
  virtual void watch_context(LossObserver* /*observer*/) {}
  /// Whether the context can be lost, so that somebody besides the loop should ask for it now and then.
  virtual bool can_lose_context() const { return false; }
  /// Asks for the context and tells the observer when it is lost. For a thread that does nothing else: it may be stuck
  /// in the driver for as long as a loop may.
  virtual void probe_context() {}
  virtual base::DeviceIndex index() const = 0;
  virtual DeviceInfo info() const = 0;
  virtual engine::DevicePort& port() = 0;

  /// Memory of the process that kernels of every GPU read and write from now on, at the same address, until the process
  /// ends; page-aligned. Nothing is to be done on host devices. POOL_EXHAUSTED, UNSUPPORTED, CUDA.
  virtual base::Status share_host_memory(void* /*data*/, uint64_t /*bytes*/) { return base::Status::ok(); }

  /// Memory of a GPU that kernels of all GPUs that reach it and network adapters read and write; zeroed. UNSUPPORTED on
  /// host devices, CUDA where the GPU or its driver has no such memory, POOL_EXHAUSTED.
  virtual base::Result<std::unique_ptr<HeldMemory>> create_fabric_memory(uint64_t /*bytes*/) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "a host device has no memory of a GPU");
  }
  /// Copies between such memory and the host's, and waits for it.
  virtual base::Status copy_and_wait(void* /*to*/, const void* /*from*/, uint64_t /*bytes*/) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "a host device has no memory of a GPU");
  }

  virtual base::Result<Window> create_window(uint64_t bytes) = 0;
  /// Bytes that create_window(bytes) would take: rounded up as the device does it. Nothing is allocated.
  virtual base::Result<uint64_t> window_size(uint64_t bytes) const = 0;
  /// A descriptor of the client: sealed memfd (host) or VMM allocation of allocation_bytes (CUDA).
  virtual base::Result<std::unique_ptr<HeldMemory>> import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                              uint64_t allocation_bytes) = 0;
  /// A legacy CUDA IPC handle (64 bytes). Equal pids were refused before.
  virtual base::Result<std::unique_ptr<HeldMemory>> import_ipc(const void* handle, uint64_t offset, uint64_t bytes) = 0;

  /// What a session needs on this device (CUDA: flag page and an armed stream); closed after its last part ended.
  virtual base::Result<SessionGrant> open_session(base::SessionId session) = 0;
  virtual void close_session(base::SessionId session) = 0;
  /// The session's flag page as launch() wants it in SlotWords; null on host devices.
  virtual void* session_flag_page(base::SessionId session) = 0;

  /// Tables of one rank of a group: count matrices of kExchangePages pages, handles. Called for every local rank on its
  /// own device before the group's first launch. destroy_group after the last part of the group ended.
  virtual base::Status create_group(const engine::GroupShape& shape, uint32_t handle_limit) = 0;
  /// What create_group() would take for one rank; nothing is allocated. Which devices the other ranks are on is not
  /// asked for (shape.devices is not read): pinned_bytes is what it takes when one of them is a GPU of the daemon that
  /// this GPU does not reach, and 0 when there is none such or no other rank. ARGUMENT_RANGE for shapes that
  /// create_group() refuses.
  virtual base::Result<GroupMemory> plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const = 0;
  virtual void destroy_group(base::GroupId group, base::Rank rank) = 0;
  /// Another descriptor of the memory through which a rank's client exchanges with the others, of a group with
  /// shape.copies; `memory` stays with the group. UNSUPPORTED where there is none.
  virtual base::Result<Window> exchange_window(base::GroupId /*group*/, base::Rank /*rank*/) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "the device has no memory for copy engines");
  }
  /// Handles that the rank's tables hold: what create_group was asked for, or fewer for large groups; 0 if unknown.
  virtual uint32_t handle_capacity(base::GroupId group, base::Rank rank) const = 0;
};

}  // namespace expertd::device
