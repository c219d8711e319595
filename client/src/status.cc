// SPDX-License-Identifier: Apache-2.0
#include "client/src/status.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "client/src/message.h"

namespace expertd::client {
namespace {

constexpr size_t kMessageBytes = 1024;
thread_local char last_message_text[kMessageBytes] = "";

struct ReasonRow {
  int32_t number;
  const char* name;
  int32_t code;
  bool retryable;
  const char* sentence;
};

constexpr ReasonRow kReasons[] = {
#define EXPERTD_REASON_ROW(name, number, code, retryable, sentence) \
  {number, #name, EXPERTD_CODE_##code, (retryable) != 0, sentence},
    EXPERTD_REASONS(EXPERTD_REASON_ROW)
#undef EXPERTD_REASON_ROW
};
constexpr ReasonRow kUnknown = {-1, "UNKNOWN", EXPERTD_CODE_UNKNOWN, false, "the number is not a known Reason"};

const ReasonRow& row_of(int32_t reason) {
  for (const ReasonRow& row : kReasons) {
    if (row.number == reason) {
      return row;
    }
  }
  return kUnknown;
}

std::string format_list(const char* pattern, va_list arguments) {
  char text[kMessageBytes];
  const int size = vsnprintf(text, sizeof(text), pattern, arguments);
  return size < 0 ? std::string(pattern) : std::string(text);
}

}  // namespace

std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  std::string text = format_list(pattern, arguments);
  va_end(arguments);
  return text;
}

Status error(int32_t reason, const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  Status status{reason, format_list(pattern, arguments)};
  va_end(arguments);
  return status;
}

Status system_error(const char* call) {
  const int number = errno;
  char text[128] = "";
  // The GNU form may return a static text instead of filling the buffer.
  const char* words = strerror_r(number, text, sizeof(text));
  return error(EXPERTD_REASON_SYSTEM, "%s: errno %d (%s)", call, number, words);
}

Status about(Status status, const Subject& subject) {
  status.subject = subject;
  return status;
}

Status range_error(int32_t reason, const char* name, int64_t value, int64_t minimum, int64_t maximum) {
  return about(error(reason, "%s = %lld, allowed %lld..%lld", name, static_cast<long long>(value),
                     static_cast<long long>(minimum), static_cast<long long>(maximum)),
               {argument_number(name), value, minimum, maximum});
}

Status missing_argument(const char* name) {
  return about(error(EXPERTD_REASON_MISSING_ARGUMENT, "%s was not given", name), {.argument = argument_number(name)});
}

expertd_status_t to_c(int32_t reason) {
  return {row_of(reason).code, reason};
}

expertd_status_t publish(const Status& status) {
  if (!status.ok()) {
    const ReasonRow& row = row_of(status.reason);
    const char* text = status.text.empty() ? row.sentence : status.text.c_str();
    snprintf(last_message_text, sizeof(last_message_text), "%s: %s", row.name, text);
  }
  return to_c(status.reason);
}

const char* last_message() {
  return last_message_text;
}
const char* reason_name(int32_t reason) {
  return row_of(reason).name;
}
const char* reason_sentence(int32_t reason) {
  return row_of(reason).sentence;
}
bool reason_is_retryable(int32_t reason) {
  return row_of(reason).retryable;
}
bool reason_is_known(int32_t reason) {
  return &row_of(reason) != &kUnknown;
}
bool is_end_of_lease(int32_t reason) {
  return reason == EXPERTD_REASON_UNAVAILABLE || reason == EXPERTD_REASON_GPU_LOST;
}

}  // namespace expertd::client
