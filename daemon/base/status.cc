// SPDX-License-Identifier: Apache-2.0
#include "daemon/base/status.h"

#include <cerrno>
#include <cstring>

namespace expertd::base {

namespace {

struct ReasonRow {
  int number;
  const char* name;
  const char* sentence;
  Code code;
  bool retryable;
};

constexpr ReasonRow kRows[] = {
#define EXPERTD_REASON_ROW(name, number, code, retryable, sentence) \
  {number, #name, sentence, static_cast<Code>(EXPERTD_CODE_##code), (retryable) != 0},
    EXPERTD_REASONS(EXPERTD_REASON_ROW)
#undef EXPERTD_REASON_ROW
};

const ReasonRow* find_row(int number) {
  for (const ReasonRow& row : kRows) {
    if (row.number == number) {
      return &row;
    }
  }
  return nullptr;
}

}  // namespace

std::string_view reason_name(Reason reason) {
  const ReasonRow* row = find_row(reason);
  return row != nullptr ? row->name : "UNKNOWN";
}

std::string_view reason_sentence(Reason reason) {
  const ReasonRow* row = find_row(reason);
  return row != nullptr ? row->sentence : "a Reason this build does not know";
}

Code reason_code(Reason reason) {
  const ReasonRow* row = find_row(reason);
  return row != nullptr ? row->code : Code::kUnknown;
}

bool reason_retryable(Reason reason) {
  const ReasonRow* row = find_row(reason);
  return row != nullptr && row->retryable;
}

bool reason_known(int number) {
  return find_row(number) != nullptr;
}

Status errno_status(std::string_view what) {
  const int error = errno;
  return Status(EXPERTD_REASON_SYSTEM, std::string(what) + ": " + std::strerror(error));
}

}  // namespace expertd::base
