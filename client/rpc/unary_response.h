// SPDX-License-Identifier: Apache-2.0
// UnaryResponse: collects the headers, message bytes and trailers of one stream and gives the
// verdict at its end. Used by the pump thread only, through Http2Session, which owns one per
// stream. It never holds more than one message of kMaxMessageBytes and knows nothing of sockets.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "client/rpc/call_result.h"
#include "client/rpc/grpc_wire.h"

namespace expertd::rpc {

class UnaryResponse {
 public:
  /// Takes a field of the headers or of the trailers; the later one wins.
  void add_header(std::string_view name, std::string_view value);

  /// False when the response cannot be accepted; the stream is then to be reset, and finish() says
  /// why.
  bool add_data(std::string_view bytes);

  /// The verdict; http2_error is the code of the reset, 0 (NO_ERROR) when the stream ended as it
  /// should.
  CallResult finish(std::uint32_t http2_error) &&;

 private:
  bool refuse(int grpc_status, std::string message);
  bool read_prefix();
  CallResult finish_without_status(std::uint32_t http2_error) const;
  CallResult finish_with_status(int grpc_status) &&;

  int http_status_ = 0;
  bool content_is_grpc_ = false;
  std::optional<int> grpc_status_;
  std::string message_;
  std::string details_;
  std::array<std::uint8_t, kMessagePrefixBytes> prefix_{};
  std::size_t prefix_size_ = 0;
  std::size_t body_size_ = 0;
  std::string body_;
  std::optional<CallResult> refusal_;
};

}  // namespace expertd::rpc
