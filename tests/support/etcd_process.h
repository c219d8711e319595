// SPDX-License-Identifier: Apache-2.0
// A real etcd of one member as a child process, on loopback ports that nobody else has, with its data in a fresh
// directory. A machine without one fails the test. One thread; it is killed with the object. Tests only.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "tests/support/temp_dir.h"

namespace expertd::support {

class EtcdProcess {
 public:
  /// `port`, `peer_port`: both free.
  EtcdProcess(uint16_t port, uint16_t peer_port) : port_(port), peer_port_(peer_port) {}
  ~EtcdProcess() { kill(); }
  EtcdProcess(const EtcdProcess&) = delete;
  EtcdProcess& operator=(const EtcdProcess&) = delete;

  /// Starts it (again, with what it had) and returns when it serves; false with its log when it does not.
  bool start();
  void kill();
  /// "http://127.0.0.1:PORT", known before it is started.
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_); }

 private:
  const uint16_t port_;
  const uint16_t peer_port_;
  TempDir directory_;
  uint32_t starts_ = 0;
  pid_t pid_ = -1;
};

}  // namespace expertd::support
