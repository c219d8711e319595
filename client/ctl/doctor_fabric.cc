// SPDX-License-Identifier: Apache-2.0
// Doctor: what carries bytes between nodes.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>

#include "client/ctl/doctor.h"
#include "client/ctl/shared_library.h"

namespace expertd::ctl {

namespace {

std::string first_line_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) {
    out += (out.empty() ? "" : ", ") + word;
  }
  return out;
}

/// Standard output of `ucx_info -d`, at most ten seconds of it; empty when it is not installed.
std::string run_ucx_info() {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen("timeout 10 ucx_info -d 2>/dev/null", "r"), pclose);
  std::string out;
  char buffer[4096];
  while (pipe != nullptr) {
    const size_t got = fread(buffer, 1, sizeof(buffer), pipe.get());
    if (got == 0) {
      break;
    }
    out.append(buffer, got);
  }
  return out;
}

Check check_ucx() {
  Check check{.name = "ucx", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  const SharedLibrary ucp("libucp.so.0");
  auto* const get_version = ucp.find<void(unsigned*, unsigned*, unsigned*)>("ucp_get_version");
  if (get_version == nullptr) {
    check.level = Level::kWarn;
    check.finding = "libucp.so.0 is not there";
    check.remedy = "install libucx0";
    check.without = "everything inside one node";
    return check;
  }
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  get_version(&major, &minor, &patch);
  check.finding = "UCX " + std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  const std::vector<std::string> transports = ucx_transports(run_ucx_info());
  check.finding += transports.empty() ? ", transports unknown (no ucx_info: package ucx-utils)"
                                      : ", transports " + joined(transports);
  const bool cuda = std::ranges::any_of(transports, [](const std::string& name) { return name.starts_with("cuda"); });
  if (!transports.empty() && !cuda) {
    check.finding += ", no CUDA";
    check.without = "GPU bytes between nodes go through pinned host memory";
  }
  return check;
}

Check check_rdma() {
  Check check{.name = "rdma", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  const std::filesystem::path root("/sys/class/infiniband");
  std::error_code error;
  std::vector<std::string> active;
  std::vector<std::string> inactive;
  for (const auto& device : std::filesystem::directory_iterator(root, error)) {
    std::error_code port_error;
    for (const auto& port : std::filesystem::directory_iterator(device.path() / "ports", port_error)) {
      const std::string name = device.path().filename().string() + "/" + port.path().filename().string() + " (" +
                               first_line_of(port.path() / "link_layer") + ", " + first_line_of(port.path() / "rate") +
                               ")";
      (first_line_of(port.path() / "state").find("ACTIVE") != std::string::npos ? active : inactive).push_back(name);
    }
  }
  std::ranges::sort(active);
  check.finding = active.empty() ? "no active RDMA port" : joined(active);
  if (!inactive.empty()) {
    check.finding += ", down: " + joined(inactive);
  }
  if (active.empty()) {
    check.level = Level::kWarn;
    check.remedy = "nothing on a single node; else load the NIC's driver and look at `rdma link`";
    check.without = "everything inside one node, TCP between nodes";
  }
  return check;
}

Check check_nccl() {
  Check check{.name = "nccl",
              .level = Level::kOk,
              .finding = "not there, expertd does not use it",
              .remedy = {},
              .without = {}};
  const SharedLibrary nccl("libnccl.so.2");
  auto* const get_version = nccl.find<int(int*)>("ncclGetVersion");
  int version = 0;
  if (get_version != nullptr && get_version(&version) == 0) {
    check.finding = "version code " + std::to_string(version) + ", for comparison only: expertd does not use it";
  }
  return check;
}

}  // namespace

std::vector<std::string> ucx_transports(const std::string& ucx_info) {
  static const std::string kKey = "Transport:";
  std::vector<std::string> out;
  std::istringstream lines(ucx_info);
  for (std::string line; std::getline(lines, line);) {
    const size_t key = line.find(kKey);
    if (key == std::string::npos) {
      continue;
    }
    std::istringstream rest(line.substr(key + kKey.size()));
    std::string name;
    rest >> name;
    if (!name.empty() && std::ranges::find(out, name) == out.end()) {
      out.push_back(name);
    }
  }
  return out;
}

Checks check_fabric() {
  return {check_ucx(), check_rdma(), check_nccl()};
}

}  // namespace expertd::ctl
