// SPDX-License-Identifier: Apache-2.0
// Doctor: the runtime directory, the sockets and the daemon's own view.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "client/ctl/daemon_client.h"
#include "client/ctl/doctor.h"
#include "client/ctl/format.h"
#include "proto/abi/ring_v1.h"

namespace expertd::ctl {

namespace {

std::string mode_text(const struct stat& info) {
  char text[64];
  std::snprintf(text, sizeof(text), "mode %04o, user %u, group %u", info.st_mode & 07777U, info.st_uid, info.st_gid);
  return text;
}

Check check_directory(const std::string& directory) {
  Check check{.name = "runtime_directory", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  struct stat info {};
  if (stat(directory.c_str(), &info) != 0) {
    check.level = Level::kFail;
    check.finding = directory + ": " + std::strerror(errno);
    check.remedy = "start the daemon (its unit makes the directory), mount it into the container, or give --socket";
    return check;
  }
  check.finding = directory + ", " + mode_text(info);
  if ((info.st_mode & S_IWOTH) != 0) {
    check.level = Level::kWarn;
    check.remedy = "chmod o-w: anybody could put a socket of his own there";
  }
  return check;
}

Check check_socket(const char* name, const std::string& path) {
  Check check{.name = name, .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    check.level = Level::kFail;
    check.finding = path + ": " + std::strerror(errno);
    check.remedy = "systemctl start expertd, or give --socket";
    return check;
  }
  check.finding = path + ", " + mode_text(info);
  if (!S_ISSOCK(info.st_mode)) {
    check.level = Level::kFail;
    check.finding += ", no socket";
    check.remedy = "remove it and restart the daemon";
  } else if (access(path.c_str(), W_OK) != 0) {
    check.level = Level::kFail;
    check.finding += ", not for this user";
    check.remedy = "join the group of the socket, or use sudo";
  }
  return check;
}

Check check_answer(const std::string& socket, const Reply<v1::GetStatusResponse>& reply) {
  Check check{.name = "daemon", .level = Level::kOk, .finding = {}, .remedy = {}, .without = {}};
  if (!reply.ok) {
    check.level = Level::kFail;
    const std::string problem = socket_problem(socket);
    check.finding = "does not answer: " + (problem.empty() ? reply.error.message : problem);
    check.finding = check.finding.substr(0, check.finding.find('\n'));
    check.remedy = "systemctl status expertd; journalctl -u expertd";
    check.without = "nothing of expertd; the checks below need no daemon";
    return check;
  }
  const v1::GetStatusResponse& status = reply.value;
  check.finding = "expertd " + status.version() + ", " + status.state() + ", up " + duration_text(status.uptime_ns());
  if (status.state() != "ready") {
    check.level = Level::kWarn;
    check.remedy = "journalctl -u expertd says why it is " + status.state();
  }
  return check;
}

Check check_protocol(const v1::GetStatusResponse& status) {
  const std::string theirs = std::to_string(status.abi_major()) + "." + std::to_string(status.abi_minor());
  const std::string ours = std::to_string(EXPERTD_ABI_MAJOR) + "." + std::to_string(EXPERTD_ABI_MINOR);
  Check check{.name = "protocol",
              .level = Level::kOk,
              .finding = "daemon " + theirs + ", this tool " + ours,
              .remedy = {},
              .without = {}};
  if (status.abi_major() != EXPERTD_ABI_MAJOR) {
    check.level = Level::kFail;
    check.remedy = "use client libraries and tools of the daemon's version";
  }
  return check;
}

Check check_devices(const v1::GetStatusResponse& status) {
  int lost = 0;
  int gpus = 0;
  for (const v1::DeviceStatus& device : status.devices()) {
    lost += device.healthy() ? 0 : 1;
    gpus += device.kind() == "cuda" ? 1 : 0;
  }
  Check check{
      .name = "daemon_devices",
      .level = Level::kOk,
      .finding = std::to_string(gpus) + " GPUs, " + std::to_string(status.devices_size() - gpus) + " host devices",
      .remedy = {},
      .without = {}};
  if (lost > 0) {
    check.level = Level::kFail;
    check.finding += ", lost: " + std::to_string(lost);
    check.remedy = "systemctl restart expertd; look at dmesg for Xid messages";
  }
  return check;
}

}  // namespace

Checks check_daemon(const std::string& socket, uint64_t timeout_ns) {
  const std::filesystem::path path(socket);
  Checks checks = {check_directory(path.parent_path().string()), check_socket("control_socket", socket),
                   check_socket("attach_socket", (path.parent_path() / "attach.sock").string())};
  DaemonClient daemon(socket, timeout_ns);
  const Reply<v1::GetStatusResponse> reply = daemon.status();
  checks.push_back(check_answer(socket, reply));
  if (reply.ok) {
    checks.push_back(check_protocol(reply.value));
    checks.push_back(check_devices(reply.value));
  }
  return checks;
}

}  // namespace expertd::ctl
