// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/error_details.h"

#include <cstdint>

#include "expertd/v1/error.pb.h"

namespace expertd::control {

namespace {

// Wire format of protocol buffers: a key is (field << 3) | type, type 0 a varint, type 2 length and bytes.
constexpr uint32_t kVarint = 0;
constexpr uint32_t kLengthDelimited = 2;

// google.rpc.Status { int32 code = 1; string message = 2; repeated google.protobuf.Any details = 3; }
constexpr uint32_t kStatusCode = 1;
constexpr uint32_t kStatusMessage = 2;
constexpr uint32_t kStatusDetails = 3;
// google.protobuf.Any { string type_url = 1; bytes value = 2; }
constexpr uint32_t kAnyTypeUrl = 1;
constexpr uint32_t kAnyValue = 2;

void put_varint(std::string* out, uint64_t value) {
  while (value >= 0x80) {
    out->push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out->push_back(static_cast<char>(value));
}

void put_number(std::string* out, uint32_t field, uint64_t value) {
  put_varint(out, field << 3 | kVarint);
  put_varint(out, value);
}

void put_bytes(std::string* out, uint32_t field, std::string_view bytes) {
  put_varint(out, field << 3 | kLengthDelimited);
  put_varint(out, bytes.size());
  out->append(bytes);
}

bool continues_character(char byte) {
  return (static_cast<unsigned char>(byte) & 0xc0) == 0x80;
}

}  // namespace

std::string cut_text(std::string_view text, size_t bytes_max) {
  if (text.size() <= bytes_max) {
    return std::string(text);
  }
  size_t end = bytes_max;
  while (end > 0 && continues_character(text[end])) {
    --end;
  }
  return std::string(text.substr(0, end));
}

std::string encode_error_details(const session::ErrorDetail& error) {
  v1::ErrorInfo info;
  const base::Reason reason = error.status.reason();
  info.set_reason(static_cast<uint32_t>(reason));
  info.set_reason_name(std::string(base::reason_name(reason)));
  info.set_retryable(base::reason_retryable(reason));
  info.set_rank(error.rank);
  info.set_field(cut_text(error.field, kFieldBytesMax));
  info.set_value(cut_text(error.value, kFieldBytesMax));
  info.set_other_value(cut_text(error.other_value, kFieldBytesMax));

  std::string any;
  put_bytes(&any, kAnyTypeUrl, kErrorInfoType);
  put_bytes(&any, kAnyValue, info.SerializeAsString());

  std::string status;
  put_number(&status, kStatusCode, static_cast<uint64_t>(error.status.code()));
  put_bytes(&status, kStatusMessage, cut_text(error.status.message(), kMessageBytesMax));
  put_bytes(&status, kStatusDetails, any);
  return status;
}

}  // namespace expertd::control
