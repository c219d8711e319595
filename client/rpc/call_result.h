// SPDX-License-Identifier: Apache-2.0
// CallResult: what one unary call came back with. A value type without invariants, used by any
// thread.
#pragma once

#include <cstddef>
#include <string>

namespace expertd::rpc {

/// Largest request or response message. It equals the default receive limit of gRPC servers.
inline constexpr std::size_t kMaxMessageBytes = std::size_t{4} << 20;

struct CallResult {
  /// The grpc-status of the server, 14 (UNAVAILABLE) when the connection is gone, 4 on deadline.
  int grpc_status = 2;
  /// Percent-decoded grpc-message, or a sentence of this library when it made the status itself.
  std::string message;
  /// Base64-decoded grpc-status-details-bin (a serialized google.rpc.Status), empty if none came.
  std::string details;
  /// The message bytes without the 5-byte prefix; only filled when grpc_status is 0.
  std::string response;
};

}  // namespace expertd::rpc
