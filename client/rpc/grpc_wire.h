// SPDX-License-Identifier: Apache-2.0
// The text and number formats of gRPC over HTTP/2: message prefix, timeout, percent- and
// base64-coded headers, and the statuses that stand in when the server sent none. Pure functions,
// any thread; none of them fails on hostile bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace expertd::rpc {

/// One flag byte (0 = not compressed) and the message's size in four bytes, big-endian.
inline constexpr std::size_t kMessagePrefixBytes = 5;

/// The message with its prefix; the caller has checked it against kMaxMessageBytes.
std::string frame_message(std::string_view message);

/// Value of the grpc-timeout header: at most eight digits and a unit, rounded up so that the server
/// never gives up before the client does.
std::string format_timeout(std::uint64_t timeout_ns);

/// Decodes %XX; a malformed escape stays as it is, because a garbled text is better than none.
std::string percent_decode(std::string_view text);

/// Standard alphabet, with or without padding; empty when a character or the length is wrong.
std::optional<std::string> base64_decode(std::string_view text);

/// The gRPC status that stands for an HTTP :status when no grpc-status came.
int status_of_http(int http_status);

/// The gRPC status that stands for an HTTP/2 error code of RST_STREAM.
int status_of_http2_error(std::uint32_t http2_error);

}  // namespace expertd::rpc
