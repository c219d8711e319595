// SPDX-License-Identifier: Apache-2.0
// Memory of host devices: sealed memfds mapped into the daemon. Control threads only.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"
#include "daemon/device/device.h"
#include "daemon/device/pool.h"

namespace expertd::device {

/// Bytes of the window that create_host_window(bytes) makes: whole pages. ARGUMENT_RANGE outside 1..2^46.
base::Result<uint64_t> host_window_size(uint64_t bytes);
/// A new memfd of `bytes` (rounded up to whole pages), sealed against resizing, mapped and zero; `pool` counts it while
/// its memory lives.
base::Result<Window> create_host_window(uint64_t bytes, base::DeviceIndex home, Pool* pool);
/// Maps [offset, offset + bytes) of a client's memfd. UNSEALED_MEMORY unless it is sealed against shrinking: a client
/// that truncates it later would otherwise end the daemon with SIGBUS. UNSUPPORTED unless it is of tmpfs.
base::Result<std::unique_ptr<HeldMemory>> import_host_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                         base::DeviceIndex home);

}  // namespace expertd::device
