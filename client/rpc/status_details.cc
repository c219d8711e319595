// SPDX-License-Identifier: Apache-2.0
#include "client/rpc/status_details.h"

#include <pb_decode.h>

#include <utility>

namespace expertd::rpc {
namespace {

// Field numbers of google.rpc.Status and google.protobuf.Any.
constexpr std::uint32_t kStatusCode = 1;
constexpr std::uint32_t kStatusMessage = 2;
constexpr std::uint32_t kStatusDetails = 3;
constexpr std::uint32_t kAnyTypeUrl = 1;
constexpr std::uint32_t kAnyValue = 2;

struct Any {
  std::string type_url;
  std::string value;
};

bool read_string(pb_istream_t* stream, std::string* value) {
  pb_istream_t field;
  if (!pb_make_string_substream(stream, &field)) {
    return false;
  }
  value->resize(field.bytes_left);
  const bool ok = pb_read(&field, reinterpret_cast<pb_byte_t*>(value->data()), field.bytes_left);
  return pb_close_string_substream(stream, &field) && ok;
}

// Calls `take(tag, wire_type)` for each field; it consumes the field and returns false when the
// bytes are malformed.
template <typename Take>
bool for_each_field(pb_istream_t* stream, const Take& take) {
  pb_wire_type_t wire_type = PB_WT_VARINT;
  std::uint32_t tag = 0;
  bool eof = false;
  while (pb_decode_tag(stream, &wire_type, &tag, &eof)) {
    if (!take(tag, wire_type)) {
      return false;
    }
  }
  // A zero tag also counts as the end there; nothing may follow it.
  return eof && stream->bytes_left == 0;
}

bool read_any(pb_istream_t* stream, Any* any) {
  pb_istream_t field;
  if (!pb_make_string_substream(stream, &field)) {
    return false;
  }
  const bool ok = for_each_field(&field, [&](std::uint32_t tag, pb_wire_type_t wire_type) {
    if (wire_type == PB_WT_STRING && tag == kAnyTypeUrl) {
      return read_string(&field, &any->type_url);
    }
    if (wire_type == PB_WT_STRING && tag == kAnyValue) {
      return read_string(&field, &any->value);
    }
    return pb_skip_field(&field, wire_type);
  });
  return ok && pb_close_string_substream(stream, &field);
}

bool read_code(pb_istream_t* stream, std::int32_t* code) {
  std::uint64_t number = 0;
  if (!pb_decode_varint(stream, &number)) {
    return false;
  }
  // An int32 travels sign-extended to 64 bits; the low half is the number.
  *code = static_cast<std::int32_t>(static_cast<std::uint32_t>(number));
  return true;
}

}  // namespace

std::optional<StatusDetails> decode_status_details(std::string_view bytes) {
  pb_istream_t stream = pb_istream_from_buffer(reinterpret_cast<const pb_byte_t*>(bytes.data()), bytes.size());
  StatusDetails details;
  const bool ok = for_each_field(&stream, [&](std::uint32_t tag, pb_wire_type_t wire_type) {
    if (wire_type == PB_WT_VARINT && tag == kStatusCode) {
      return read_code(&stream, &details.code);
    }
    if (wire_type == PB_WT_STRING && tag == kStatusMessage) {
      return read_string(&stream, &details.message);
    }
    if (wire_type != PB_WT_STRING || tag != kStatusDetails) {
      return pb_skip_field(&stream, wire_type);
    }
    Any any;
    if (!read_any(&stream, &any)) {
      return false;
    }
    if (any.type_url == kErrorInfoType && !details.error_info.has_value()) {
      details.error_info = std::move(any.value);
    }
    return true;
  });
  if (!ok) {
    return std::nullopt;
  }
  return details;
}

}  // namespace expertd::rpc
