// SPDX-License-Identifier: Apache-2.0
// Status and Result<T>: how every fallible call of the house reports. Value types, any thread. A Status carries a Code
// (the gRPC numbers) derived from its Reason, one of the closed list in proto/abi/expertd_reason.h, and a message to
// which callers add context as it rises; the root Reason is never overwritten.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "proto/abi/expertd_reason.h"

namespace expertd::base {

enum class Code : int {
  kOk = EXPERTD_CODE_OK,
  kCancelled = EXPERTD_CODE_CANCELLED,
  kUnknown = EXPERTD_CODE_UNKNOWN,
  kInvalidArgument = EXPERTD_CODE_INVALID_ARGUMENT,
  kDeadlineExceeded = EXPERTD_CODE_DEADLINE_EXCEEDED,
  kNotFound = EXPERTD_CODE_NOT_FOUND,
  kAlreadyExists = EXPERTD_CODE_ALREADY_EXISTS,
  kPermissionDenied = EXPERTD_CODE_PERMISSION_DENIED,
  kResourceExhausted = EXPERTD_CODE_RESOURCE_EXHAUSTED,
  kFailedPrecondition = EXPERTD_CODE_FAILED_PRECONDITION,
  kAborted = EXPERTD_CODE_ABORTED,
  kOutOfRange = EXPERTD_CODE_OUT_OF_RANGE,
  kUnimplemented = EXPERTD_CODE_UNIMPLEMENTED,
  kInternal = EXPERTD_CODE_INTERNAL,
  kUnavailable = EXPERTD_CODE_UNAVAILABLE,
};

using Reason = enum expertd_reason;

/// Name without prefix ("PEER_LOST"), sentence, code and retryability of a Reason; unknown numbers give "UNKNOWN".
std::string_view reason_name(Reason reason);
std::string_view reason_sentence(Reason reason);
Code reason_code(Reason reason);
bool reason_retryable(Reason reason);
/// True for numbers of the list.
bool reason_known(int number);

class [[nodiscard]] Status {
 public:
  Status() = default;
  /// An empty message stands for the Reason's own sentence.
  explicit Status(Reason reason, std::string message = {}) : reason_(reason), message_(std::move(message)) {}

  static Status ok() { return Status(); }
  bool is_ok() const { return reason_ == EXPERTD_REASON_NONE; }
  Reason reason() const { return reason_; }
  Code code() const { return reason_code(reason_); }
  /// The message with its context, or the Reason's sentence when nothing more is known.
  std::string message() const { return message_.empty() ? std::string(reason_sentence(reason_)) : message_; }
  /// Adds context in front ("while importing window 7: "); the Reason stays.
  Status with_context(std::string_view context) const {
    return is_ok() ? *this : Status(reason_, std::string(context) + ": " + message());
  }

 private:
  Reason reason_ = EXPERTD_REASON_NONE;
  std::string message_;
};

/// Status of the current errno: SYSTEM with "what: strerror".
Status errno_status(std::string_view what);

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  bool is_ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace expertd::base

#define EXPERTD_RETURN_IF_ERROR(expression)                 \
  do {                                                      \
    ::expertd::base::Status expertd_status_ = (expression); \
    if (!expertd_status_.is_ok()) {                         \
      return expertd_status_;                               \
    }                                                       \
  } while (false)
