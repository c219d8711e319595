// SPDX-License-Identifier: Apache-2.0
#include "client/rpc/unary_response.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "proto/abi/expertd_reason.h"

namespace expertd::rpc {
namespace {

std::optional<int> parse_number(std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) {
    return std::nullopt;
  }
  return number;
}

bool is_grpc_content(std::string_view content_type) {
  constexpr std::string_view kGrpc = "application/grpc";
  if (!content_type.starts_with(kGrpc)) {
    return false;
  }
  // "application/grpc-web" is another protocol; "+proto" and parameters are variants of this one.
  const std::string_view rest = content_type.substr(kGrpc.size());
  return rest.empty() || rest.front() == '+' || rest.front() == ';';
}

}  // namespace

void UnaryResponse::add_header(std::string_view name, std::string_view value) {
  if (name == ":status") {
    http_status_ = parse_number(value).value_or(0);
  } else if (name == "content-type") {
    content_is_grpc_ = is_grpc_content(value);
  } else if (name == "grpc-status") {
    // A negative or unreadable status must not pass for OK or for no status at all.
    const int number = parse_number(value).value_or(EXPERTD_CODE_UNKNOWN);
    grpc_status_ = number < 0 ? EXPERTD_CODE_UNKNOWN : number;
  } else if (name == "grpc-message") {
    message_ = percent_decode(value);
  } else if (name == "grpc-status-details-bin") {
    // Details only refine the status, so that undecodable ones are dropped and the status is kept.
    details_ = base64_decode(value).value_or(std::string());
  }
}

bool UnaryResponse::refuse(int grpc_status, std::string message) {
  body_.clear();
  CallResult refusal;
  refusal.grpc_status = grpc_status;
  refusal.message = std::move(message);
  refusal_ = std::move(refusal);
  return false;
}

bool UnaryResponse::read_prefix() {
  if (prefix_[0] != 0) {
    return refuse(EXPERTD_CODE_INTERNAL, "the response is compressed, which was not offered");
  }
  body_size_ = 0;
  for (std::size_t i = 1; i < prefix_.size(); ++i) {
    body_size_ = (body_size_ << 8) | prefix_[i];
  }
  if (body_size_ > kMaxMessageBytes) {
    return refuse(EXPERTD_CODE_RESOURCE_EXHAUSTED, "the response of " + std::to_string(body_size_) +
                                                       " bytes is over the limit of " +
                                                       std::to_string(kMaxMessageBytes));
  }
  body_.reserve(body_size_);
  return true;
}

bool UnaryResponse::add_data(std::string_view bytes) {
  if (refusal_.has_value()) {
    return false;
  }
  // The body of something that is not gRPC (an error page) is dropped; its :status decides.
  if (http_status_ != 200 || !content_is_grpc_) {
    return true;
  }
  while (prefix_size_ < prefix_.size() && !bytes.empty()) {
    prefix_[prefix_size_++] = static_cast<std::uint8_t>(bytes.front());
    bytes.remove_prefix(1);
    if (prefix_size_ == prefix_.size() && !read_prefix()) {
      return false;
    }
  }
  if (bytes.size() > body_size_ - body_.size()) {
    return refuse(EXPERTD_CODE_INTERNAL, "more than one message answered a unary call");
  }
  body_.append(bytes);
  return true;
}

CallResult UnaryResponse::finish_without_status(std::uint32_t http2_error) const {
  CallResult result;
  if (http_status_ != 0 && http_status_ != 200) {
    result.grpc_status = status_of_http(http_status_);
    result.message = "the server answered with HTTP status " + std::to_string(http_status_);
  } else if (http2_error != 0) {
    result.grpc_status = status_of_http2_error(http2_error);
    result.message = "the stream was reset with HTTP/2 error " + std::to_string(http2_error);
  } else {
    result.grpc_status = EXPERTD_CODE_UNKNOWN;
    result.message =
        content_is_grpc_ ? "the response ended without a grpc-status" : "the response is not a gRPC response";
  }
  return result;
}

CallResult UnaryResponse::finish_with_status(int grpc_status) && {
  CallResult result;
  result.grpc_status = grpc_status;
  result.message = std::move(message_);
  result.details = std::move(details_);
  if (grpc_status != EXPERTD_CODE_OK) {
    return result;
  }
  if (prefix_size_ < prefix_.size() || body_.size() < body_size_) {
    result.grpc_status = EXPERTD_CODE_INTERNAL;
    result.message = "the call ended with OK but without a whole message";
    return result;
  }
  result.response = std::move(body_);
  return result;
}

CallResult UnaryResponse::finish(std::uint32_t http2_error) && {
  if (refusal_.has_value()) {
    return std::move(*refusal_);
  }
  if (grpc_status_.has_value()) {
    return std::move(*this).finish_with_status(*grpc_status_);
  }
  return finish_without_status(http2_error);
}

}  // namespace expertd::rpc
