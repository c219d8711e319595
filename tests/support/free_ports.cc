// SPDX-License-Identifier: Apache-2.0
#include "tests/support/free_ports.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

namespace expertd::support {

std::vector<uint16_t> free_ports(uint32_t count) {
  std::vector<int> sockets;
  std::vector<uint16_t> ports;
  for (uint32_t i = 0; i < count; ++i) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    socklen_t size = sizeof(address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 &&
        ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0) {
      ports.push_back(ntohs(address.sin_port));
    } else {
      ports.push_back(0);  // who uses it fails to start
    }
    sockets.push_back(fd);
  }
  std::for_each(sockets.begin(), sockets.end(), ::close);
  return ports;
}

}  // namespace expertd::support
