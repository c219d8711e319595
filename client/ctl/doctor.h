// SPDX-License-Identifier: Apache-2.0
// The checks of `expertctl doctor`: what this node has, what it lacks, what to do and what works without. They need no
// daemon. Main thread. They change nothing on the node, and load vendor libraries only for the time of their check.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace expertd::ctl {

enum class Level { kOk, kWarn, kFail };
std::string_view level_name(Level level);

struct Check {
  std::string name;  // snake_case, stable
  Level level = Level::kOk;
  std::string finding;
  std::string remedy;   // what to do; empty when nothing is to be done
  std::string without;  // what works if it stays as it is; empty when all does
};
using Checks = std::vector<Check>;

/// Kernel, sealed shared memory, limits.
Checks check_system();
/// Directory, sockets, and what the daemon says about itself.
Checks check_daemon(const std::string& socket, uint64_t timeout_ns);
/// NVIDIA driver, GPUs, peer access, NVLink, MIG, MPS, ways of sharing memory.
Checks check_gpus();
/// UCX, RDMA devices; NCCL, which expertd does not use.
Checks check_fabric();

std::string doctor_text(const Checks& checks);
nlohmann::json doctor_json(const Checks& checks);
bool any_failed(const Checks& checks);

/// Parts of the checks, by themselves for tests.
/// "1.2.3-debian" -> {1, 2}; {0, 0} when there is no version in it.
std::pair<int, int> kernel_version(std::string_view release);
/// Transports named in the output of `ucx_info -d`, each once, in order.
std::vector<std::string> ucx_transports(const std::string& ucx_info);
/// "GPU-01020304-..." of 16 bytes.
std::string gpu_uuid_text(const unsigned char (&bytes)[16]);

}  // namespace expertd::ctl
