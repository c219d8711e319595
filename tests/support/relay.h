// SPDX-License-Identifier: Apache-2.0
// A TCP relay on a loopback port in front of a daemon's peer port, with what a network does to connections: delay,
// little bandwidth, silence, resets, connects that hang. TCP keeps the bytes of one connection complete and in order,
// so nothing here loses or reorders bytes; lost are whole connections, and what overtakes is other connections. What
// UCX carries does not pass here: its addresses are inside of what the daemons exchange (support/node_network.h is for
// that). One thread of its own; the functions may be called by any thread. Tests only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace expertd::support {

enum class Way { kToDaemon, kToCaller };

/// How bytes go one way.
struct RelayRule {
  uint64_t delay_ms = 0;
  uint64_t bytes_per_s = 0;  // of a connection; 0: as fast as they come
  bool held = false;         // nothing is read any more and nothing goes on; when it ends, all goes on
};

class Relay {
 public:
  /// Listens at once; callers are refused until there is a target.
  Relay();
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  /// "127.0.0.1:PORT", where connections from now on lead.
  void set_target(const std::string& address);
  std::string address() const;

  void set_rule(Way way, const RelayRule& rule);
  /// Connections from now on are accepted and nobody is behind them: half-open.
  void set_mute(bool mute);
  /// Resets every connection.
  void cut();
  /// Resets all connections when so many more bytes (1 or more) have gone that way, all together; those included.
  void cut_after(Way way, uint64_t bytes);
  /// No connection is accepted, and the kernel's queue is full: connects hang. Already open ones go on.
  void stop_accepting();
  void go_on_accepting();

  /// Since the beginning.
  uint64_t accepted() const;
  uint64_t passed_bytes(Way way) const;
  uint64_t cuts() const;  // connections that were reset

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::support
