// SPDX-License-Identifier: Apache-2.0
// Status: what a function of the library came back with, a Reason and a text; and the way from there to the caller: the
// C status and the calling thread's last message. Any thread; nothing is shared between threads.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <string>
#include <utility>

#include "expertd.h"

namespace expertd::client {

/// What a refusal is about, as the ring carries it: an argument's number of ring_v1.h (0: it has none), its value and
/// the allowed range.
struct Subject {
  uint32_t argument = 0;
  int64_t value = 0;
  int64_t minimum = 0;
  int64_t maximum = 0;
};

struct [[nodiscard]] Status {
  int32_t reason = EXPERTD_REASON_NONE;
  /// Without the name of the Reason, which publish() puts in front.
  std::string text;
  Subject subject{};
  bool ok() const { return reason == EXPERTD_REASON_NONE; }
};

/// As printf, into a string of at most 1 KiB.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

[[gnu::format(printf, 2, 3)]] Status error(int32_t reason, const char* pattern, ...);

/// SYSTEM with the name of the call and errno.
Status system_error(const char* call);

/// The same status about a subject.
Status about(Status status, const Subject& subject);

/// "name = value, allowed minimum..maximum", with the Reason given; about the argument of that name, if there is one.
Status range_error(int32_t reason, const char* name, int64_t value, int64_t minimum, int64_t maximum);

Status missing_argument(const char* name);

/// Sets the thread's last message when the status is a failure, and gives the C form.
expertd_status_t publish(const Status& status);

expertd_status_t to_c(int32_t reason);
const char* last_message();
const char* reason_name(int32_t reason);
const char* reason_sentence(int32_t reason);
bool reason_is_retryable(int32_t reason);
bool reason_is_known(int32_t reason);
/// The daemon that the session was attached to is gone: only a re-attachment helps.
bool is_end_of_lease(int32_t reason);

}  // namespace expertd::client
