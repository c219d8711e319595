// SPDX-License-Identifier: Apache-2.0
// Decodes the bytes of grpc-status-details-bin, a google.rpc.Status, as far as the client needs
// them. A pure function, any thread; it copies what it returns and accepts any bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace expertd::rpc {

/// The type of the one detail that expertd sends with every error.
inline constexpr std::string_view kErrorInfoType = "type.googleapis.com/expertd.v1.ErrorInfo";

struct StatusDetails {
  std::int32_t code = 0;
  std::string message;
  /// Bytes of the first detail of kErrorInfoType; a present ErrorInfo of default values has none.
  std::optional<std::string> error_info;
};

/// Empty when the bytes are not a well-formed message.
std::optional<StatusDetails> decode_status_details(std::string_view bytes);

}  // namespace expertd::rpc
