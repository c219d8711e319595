// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/node_facts.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "daemon/base/fd.h"
#include "daemon/fabric/bootstrap/address.h"
#include "daemon/group/rendezvous_port.h"

namespace expertd::fabric {

namespace {

constexpr size_t kKeyBytesMin = 16;
constexpr size_t kKeyBytesMax = 256;

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 && name[0] != '\0' ? name.data() : "localhost";
}

}  // namespace

base::Result<std::string> read_cluster_key(const std::string& path) {
  if (path.empty()) {
    return std::string();
  }
  const base::ScopedFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  std::array<char, kKeyBytesMax + 3> bytes{};  // a line end of two, and one to see that it is longer
  const ssize_t count = fd.valid() ? read(fd.get(), bytes.data(), bytes.size()) : -1;
  if (count < 0) {
    return base::Status(EXPERTD_REASON_CONFIG_UNREADABLE,
                        "fabric.cluster_key_file: " + path + ": " + std::strerror(errno));
  }
  std::string key(bytes.data(), static_cast<size_t>(count));
  while (key.ends_with('\n') || key.ends_with('\r')) {
    key.pop_back();
  }
  const bool printable = std::ranges::all_of(key, [](char c) { return c > ' ' && c <= '~'; });
  if (key.size() < kKeyBytesMin || key.size() > kKeyBytesMax || !printable) {
    return base::Status(
        EXPERTD_REASON_CONFIG_BAD_VALUE,
        "fabric.cluster_key_file: " + path +
            " must hold one line of 16 to 256 printable ASCII characters without spaces; \"openssl rand "
            "-hex 32\" makes one");
  }
  return key;
}

std::string advertised_address(const std::string& advertise, const std::string& listen, uint16_t port) {
  std::string host = advertise;
  if (host.empty()) {
    const base::Result<HostPort> place = parse_host_port(listen);
    const bool any = !place.is_ok() || place.value().host == "0.0.0.0" || place.value().host == "::";
    host = any ? host_name() : place.value().host;
  }
  const bool v6 = host.find(':') != std::string::npos;
  return (v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

std::string node_name_or_host(const std::string& node_name) {
  return node_name.empty() ? host_name().substr(0, group::kMaxNameBytes) : node_name;
}

}  // namespace expertd::fabric
