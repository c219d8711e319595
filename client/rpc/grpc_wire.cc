// SPDX-License-Identifier: Apache-2.0
#include "client/rpc/grpc_wire.h"

#include <nghttp2/nghttp2.h>

#include <array>

#include "proto/abi/expertd_reason.h"

namespace expertd::rpc {
namespace {

// The house's list of codes ends before it because no Reason uses it; a proxy's 401 still maps to
// it.
constexpr int kUnauthenticated = 16;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') {
    return c - '0';
  }
  if (c >= 'a' && c <= 'f') {
    return c - 'a' + 10;
  }
  if (c >= 'A' && c <= 'F') {
    return c - 'A' + 10;
  }
  return -1;
}

int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') {
    return c - 'A';
  }
  if (c >= 'a' && c <= 'z') {
    return c - 'a' + 26;
  }
  if (c >= '0' && c <= '9') {
    return c - '0' + 52;
  }
  if (c == '+') {
    return 62;
  }
  return c == '/' ? 63 : -1;
}

}  // namespace

std::string frame_message(std::string_view message) {
  std::string framed;
  framed.reserve(kMessagePrefixBytes + message.size());
  framed.push_back('\0');
  for (int shift = 24; shift >= 0; shift -= 8) {
    framed.push_back(static_cast<char>((message.size() >> shift) & 0xff));
  }
  framed.append(message);
  return framed;
}

std::string format_timeout(std::uint64_t timeout_ns) {
  struct Unit {
    char name;
    std::uint64_t ns;
  };
  static constexpr std::array<Unit, 6> kUnits = {{{'n', 1},
                                                  {'u', 1'000},
                                                  {'m', 1'000'000},
                                                  {'S', 1'000'000'000},
                                                  {'M', 60'000'000'000},
                                                  {'H', 3'600'000'000'000}}};
  // 2^64 ns are about five million hours, so that the last unit always fits its eight digits.
  constexpr std::uint64_t kLargestValue = 99'999'999;
  for (const Unit& unit : kUnits) {
    const std::uint64_t value = timeout_ns / unit.ns + (timeout_ns % unit.ns != 0 ? 1 : 0);
    if (value <= kLargestValue) {
      return std::to_string(value) + unit.name;
    }
  }
  return std::to_string(kLargestValue) + kUnits.back().name;
}

std::string percent_decode(std::string_view text) {
  std::string decoded;
  decoded.reserve(text.size());
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      const int high = hex_digit(text[i + 1]);
      const int low = hex_digit(text[i + 2]);
      if (high >= 0 && low >= 0) {
        decoded.push_back(static_cast<char>(high * 16 + low));
        i += 2;
        continue;
      }
    }
    decoded.push_back(text[i]);
  }
  return decoded;
}

std::optional<std::string> base64_decode(std::string_view text) {
  for (int padding = 0; padding < 2 && !text.empty() && text.back() == '='; ++padding) {
    text.remove_suffix(1);
  }
  // Six bits of a lone last character cannot make a byte.
  if (text.size() % 4 == 1) {
    return std::nullopt;
  }
  std::string decoded;
  decoded.reserve(text.size() / 4 * 3 + 2);
  std::uint32_t bits = 0;
  int bit_count = 0;
  for (const char c : text) {
    const int digit = base64_digit(c);
    if (digit < 0) {
      return std::nullopt;
    }
    bits = (bits << 6) | static_cast<std::uint32_t>(digit);
    bit_count += 6;
    if (bit_count >= 8) {
      bit_count -= 8;
      decoded.push_back(static_cast<char>((bits >> bit_count) & 0xff));
    }
  }
  return decoded;
}

int status_of_http(int http_status) {
  switch (http_status) {
    case 400:
      return EXPERTD_CODE_INTERNAL;
    case 401:
      return kUnauthenticated;
    case 403:
      return EXPERTD_CODE_PERMISSION_DENIED;
    case 404:
      return EXPERTD_CODE_UNIMPLEMENTED;
    case 429:
    case 502:
    case 503:
    case 504:
      return EXPERTD_CODE_UNAVAILABLE;
    default:
      return EXPERTD_CODE_UNKNOWN;
  }
}

int status_of_http2_error(std::uint32_t http2_error) {
  switch (http2_error) {
    case NGHTTP2_REFUSED_STREAM:
      return EXPERTD_CODE_UNAVAILABLE;
    case NGHTTP2_CANCEL:
      return EXPERTD_CODE_CANCELLED;
    case NGHTTP2_ENHANCE_YOUR_CALM:
      return EXPERTD_CODE_RESOURCE_EXHAUSTED;
    case NGHTTP2_INADEQUATE_SECURITY:
      return EXPERTD_CODE_PERMISSION_DENIED;
    default:
      return EXPERTD_CODE_INTERNAL;
  }
}

}  // namespace expertd::rpc
