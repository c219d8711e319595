// SPDX-License-Identifier: Apache-2.0
#include "client/src/rpc_call.h"

#include <pb_decode.h>
#include <pb_encode.h>

#include <cstring>
#include <optional>

#include "client/rpc/status_details.h"
#include "expertd/v1/error.pb.h"

namespace expertd::client {
namespace {

// Zero-initialised without naming each field of a generated C struct.
using ErrorInfo = expertd_v1_ErrorInfo;

int32_t reason_of_code(int code) {
  switch (code) {
    case EXPERTD_CODE_UNAVAILABLE:
      return EXPERTD_REASON_UNAVAILABLE;
    case EXPERTD_CODE_DEADLINE_EXCEEDED:
      return EXPERTD_REASON_TIMEOUT;
    case EXPERTD_CODE_CANCELLED:
      return EXPERTD_REASON_CANCELLED;
    case EXPERTD_CODE_PERMISSION_DENIED:
      return EXPERTD_REASON_PERMISSION;
    case EXPERTD_CODE_UNIMPLEMENTED:
      return EXPERTD_REASON_UNSUPPORTED;
    case EXPERTD_CODE_INVALID_ARGUMENT:
      return EXPERTD_REASON_BAD_MESSAGE;
    default:
      return EXPERTD_REASON_INTERNAL;
  }
}

bool decode(std::string_view bytes, const pb_msgdesc_t* fields, void* message) {
  pb_istream_t stream = pb_istream_from_buffer(reinterpret_cast<const pb_byte_t*>(bytes.data()), bytes.size());
  return pb_decode(&stream, fields, message);
}

std::optional<ErrorInfo> error_info_of(const std::string& details) {
  if (details.empty()) {
    return std::nullopt;
  }
  const std::optional<rpc::StatusDetails> decoded = rpc::decode_status_details(details);
  ErrorInfo info{};
  if (!decoded || !decoded->error_info || !decode(*decoded->error_info, expertd_v1_ErrorInfo_fields, &info)) {
    return std::nullopt;
  }
  return info;
}

// The daemon's own words first, then what they may leave out.
std::string text_of(const rpc::CallResult& result, const ErrorInfo& info) {
  std::string text = result.message;
  const bool named = info.field[0] != '\0' && text.find(info.field) != std::string::npos &&
                     text.find(info.value) != std::string::npos && text.find(info.other_value) != std::string::npos;
  if (info.field[0] != '\0' && !named) {
    text += format("%s%s: %s here, %s on the other side", text.empty() ? "" : "; ", info.field, info.value,
                   info.other_value);
  }
  const std::string rank = format("rank %d", info.rank);
  if (info.rank >= 0 && info.reason != EXPERTD_REASON_NONE && text.find(rank) == std::string::npos) {
    text += " (" + rank + ")";
  }
  return text;
}

}  // namespace

Status rpc_status(const char* method, const rpc::CallResult& result) {
  if (result.grpc_status == EXPERTD_CODE_OK) {
    return {};
  }
  const std::optional<ErrorInfo> info = error_info_of(result.details);
  if (info && info->reason != EXPERTD_REASON_NONE) {
    return {static_cast<int32_t>(info->reason), text_of(result, *info)};
  }
  return {reason_of_code(result.grpc_status),
          format("%s: %s (grpc status %d)", method, result.message.c_str(), result.grpc_status)};
}

Status call_session(rpc::Channel* channel, const char* method, const RpcMessage& request, const RpcMessage& response,
                    uint64_t timeout_ns) {
  size_t size = 0;
  if (!pb_get_encoded_size(&size, request.fields, request.message)) {
    return error(EXPERTD_REASON_INTERNAL, "%s: the request cannot be encoded", method);
  }
  std::string bytes(size, '\0');
  pb_ostream_t stream = pb_ostream_from_buffer(reinterpret_cast<pb_byte_t*>(bytes.data()), bytes.size());
  if (!pb_encode(&stream, request.fields, request.message)) {
    return error(EXPERTD_REASON_INTERNAL, "%s: the request cannot be encoded", method);
  }
  const std::string path = std::string("/expertd.v1.Session/") + method;
  const rpc::CallResult result = channel->call(path, bytes, timeout_ns);
  Status status = rpc_status(method, result);
  if (status.ok() && !decode(result.response, response.fields, response.message)) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "%s: the answer of %zu bytes cannot be decoded", method,
                 result.response.size());
  }
  return status;
}

bool copy_text(std::string_view text, char* field, size_t capacity) {
  if (text.size() >= capacity) {
    return false;
  }
  std::memcpy(field, text.data(), text.size());
  field[text.size()] = '\0';
  return true;
}

}  // namespace expertd::client
