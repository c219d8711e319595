// SPDX-License-Identifier: Apache-2.0
// expertctl's connection to the daemon on control.sock: one blocking call per function, each with the deadline. Used by
// the main thread. The only part of expertctl that knows gRPC. Never retries and never prints.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "expertd/v1/control.pb.h"

namespace expertd::ctl {

/// Why a call failed, ready to be told to the operator.
struct CallError {
  int exit_code = 0;
  std::string message;
  std::string reason;  // name of the daemon's Reason; empty when the daemon did not answer
};

template <typename T>
struct Reply {
  bool ok = false;
  T value{};
  CallError error;
};

class DaemonClient {
 public:
  DaemonClient(std::string socket, uint64_t timeout_ns);
  ~DaemonClient();
  DaemonClient(const DaemonClient&) = delete;
  DaemonClient& operator=(const DaemonClient&) = delete;

  Reply<v1::GetStatusResponse> status();
  Reply<v1::ListSessionsResponse> sessions();
  Reply<v1::GetCountersResponse> counters();
  Reply<v1::ListPeersResponse> peers();
  Reply<v1::ListWaitsResponse> waits(uint32_t last);
  Reply<v1::ListNodesResponse> nodes();
  Reply<v1::MeasurePairResponse> measure_pair(const v1::MeasurePairRequest& request);
  Reply<v1::DrainResponse> drain(uint64_t timeout_ns);
  Reply<v1::SetLogLevelResponse> set_log_level(const std::string& level);
  /// grpc.health.v1 of "" or "expertd.ready".
  Reply<bool> serving(const std::string& service);

 private:
  struct Parts;  // what needs gRPC's headers
  std::unique_ptr<Parts> parts_;
};

/// $EXPERTD_RUNTIME_DIRECTORY/control.sock, or /run/expertd/control.sock.
std::string default_socket();

/// Why nobody answers on a socket ("no such file", ...); empty when somebody does.
std::string socket_problem(const std::string& path);

/// A connection that ends when the daemon does.
class LifeLine {
 public:
  explicit LifeLine(const std::string& socket);
  ~LifeLine();
  LifeLine(const LifeLine&) = delete;
  LifeLine& operator=(const LifeLine&) = delete;
  /// True when the daemon ended within this time.
  bool wait_for_end(uint64_t timeout_ns);

 private:
  int fd_ = -1;
};

}  // namespace expertd::ctl
