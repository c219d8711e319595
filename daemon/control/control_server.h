// SPDX-License-Identifier: Apache-2.0
// The gRPC server of the daemon: session services on connections handed over by the attach socket, operator services on
// control.sock. It has no listening port of its own; every connection is adopted with a known peer. `main` creates and
// ends it; adopt_session_connection, session_ended and the health setters may be called from any thread. It calls
// SessionApi and OperatorApi from its own threads and never keeps a gRPC thread waiting for them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/ids.h"
#include "daemon/base/limits.h"
#include "daemon/base/status.h"
#include "daemon/session/api.h"

namespace expertd::control {

struct ControlOptions {
  std::string socket;  // path of control.sock
  uint32_t socket_mode = 0660;
  std::string socket_group;            // empty: leave the group of the process
  std::vector<uint32_t> allowed_uids;  // empty: whom the mode lets in; root and the daemon's uid always may
  bool enable_reflection = false;
  uint64_t call_deadline_max_ns = 3'600'000'000'000;
  std::string version;            // of the daemon, for OpenSession
  uint32_t session_threads = 4;   // for session calls that wait: one session holds at most one, one user all but one
  uint32_t operator_threads = 2;  // for operator calls
  uint32_t operator_connections_max = base::kMaxOperatorConnections;
};

enum class Serving { kNotReady, kReady };

class ControlServer {
 public:
  /// Builds and starts the server; it serves adopted connections from here on, control.sock not yet. Both APIs must
  /// outlive it.
  static base::Result<std::unique_ptr<ControlServer>> create(const ControlOptions& options,
                                                             session::SessionApi& session_api,
                                                             session::OperatorApi& operator_api);
  /// Shuts down at once if shutdown() was not called; waits for API calls in progress, which their deadlines bound.
  ~ControlServer();
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

  /// Takes the daemon's end of a connected stream socket; every call on it is this session's, of this user.
  base::Status adopt_session_connection(base::ScopedFd fd, base::SessionId session, uint32_t uid);
  /// Ends the session's connections and the calls on them.
  void session_ended(base::SessionId session);

  /// Opens control.sock. ADDRESS_IN_USE when another process answers on it; a stale socket file is replaced.
  base::Status start_listening();

  /// Health of "expertd.ready"; health of "" (the process answers) is serving until shutdown.
  void set_serving(Serving serving);
  /// Health of "expertd.gpu.N".
  void set_device_healthy(base::DeviceIndex device, bool healthy);

  /// Closes control.sock, lets calls end until the deadline (absolute, base::now_ns clock), then cancels them. False
  /// when an API call was still running at the deadline; the destructor waits for it.
  bool shutdown(uint64_t deadline_ns);

 private:
  struct Parts;  // what needs gRPC's headers

  explicit ControlServer(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::control
