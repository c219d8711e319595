// SPDX-License-Identifier: Apache-2.0
#include "client/src/message.h"

#include <cstring>

namespace expertd::client {
namespace {

std::string who(const expertd_completion& completion) {
  return completion.rank >= 0 ? format("rank %d", completion.rank) : std::string("a rank");
}

std::string timeout_text(const expertd_completion& completion) {
  switch (completion.missing) {
    case EXPERTD_MISSING_SUBMISSION:
      return who(completion) + " had not submitted the operation";
    case EXPERTD_MISSING_DOORBELL:
      return who(completion) + " had submitted, but its stream had not reached the operation";
    case EXPERTD_MISSING_COUNTS:
      // A node whose ranks have not all submitted: only there is known which of them is late.
      if (completion.rank < 0 && completion.maximum > completion.minimum) {
        return format(
            "nothing came of the node of ranks %lld to %lld: one of its ranks had not submitted the operation, "
            "and the results of the others name it",
            static_cast<long long>(completion.minimum), static_cast<long long>(completion.maximum));
      }
      return who(completion) + " had not delivered its row counts";
    case EXPERTD_MISSING_ROWS:
      return who(completion) + " had not delivered its rows";
    default:
      return completion.rank >= 0 ? who(completion) + " was late" : std::string("the deadline of the operation passed");
  }
}

std::string rejected_text(const expertd_completion& completion) {
  std::string text = who(completion) + "'s part of the operation was refused";
  if (completion.peer_reason != 0) {
    text += format(" with %s", reason_name(static_cast<int32_t>(completion.peer_reason)));
  }
  return text;
}

std::string payload_names(int64_t payloads) {
  std::string text;
#define EXPERTD_PAYLOAD_NAMED(name, bit, word) text += (payloads & (bit)) == 0 ? "" : text.empty() ? word : ", " word;
  EXPERTD_PAYLOADS(EXPERTD_PAYLOAD_NAMED)
#undef EXPERTD_PAYLOAD_NAMED
  return text;
}

// "tokens = 300, allowed 0..256"; the range is left out where the daemon gave none.
std::string argument_text(const expertd_completion& completion) {
  std::string text = argument_name(completion.argument);
  if (completion.argument == EXPERTD_ARGUMENT_DISPATCH_DTYPE) {
    return text + " = " + payload_names(completion.value) + ", allowed " + payload_names(completion.maximum) +
           " (dispatch_dtypes of the group)";
  }
  text += format(" = %lld", static_cast<long long>(completion.value));
  if (completion.minimum != 0 || completion.maximum != 0) {
    text += format(", allowed %lld..%lld", static_cast<long long>(completion.minimum),
                   static_cast<long long>(completion.maximum));
  }
  return text;
}

std::string unaligned_text(const expertd_completion& completion) {
  return format("%s = %lld, allowed multiples of 16", argument_name(completion.argument),
                static_cast<long long>(completion.value));
}

std::string with_sentence(int32_t reason, const expertd_completion& completion) {
  std::string text = reason_sentence(reason);
  if (completion.argument != EXPERTD_ARGUMENT_NONE) {
    text += ": " + argument_text(completion);
  }
  if (completion.rank >= 0) {
    text += format(" (rank %d)", completion.rank);
  }
  return text;
}

bool is_about_a_range(int32_t reason) {
  switch (reason) {
    case EXPERTD_REASON_DESCRIPTOR_MALFORMED:
    case EXPERTD_REASON_OUT_OF_BOUNDS:
    case EXPERTD_REASON_WRONG_DTYPE:
    case EXPERTD_REASON_ARGUMENT_RANGE:
    case EXPERTD_REASON_TOKENS_EXCEED_MAX:
    case EXPERTD_REASON_EXPERT_OUT_OF_RANGE:
    case EXPERTD_REASON_CAPACITY_EXCEEDED:
      return true;
    default:
      return false;
  }
}

std::string text_of(int32_t reason, const expertd_completion& completion) {
  switch (reason) {
    case EXPERTD_REASON_TIMEOUT:
      return timeout_text(completion);
    case EXPERTD_REASON_PEER_LOST:
      return who(completion) + " of the group is gone";
    case EXPERTD_REASON_PEER_REJECTED:
      return rejected_text(completion);
    case EXPERTD_REASON_MISSING_ARGUMENT:
      return format("%s was not given", argument_name(completion.argument));
    case EXPERTD_REASON_UNALIGNED:
      return unaligned_text(completion);
    default:
      break;
  }
  if (is_about_a_range(reason) && completion.argument != EXPERTD_ARGUMENT_NONE) {
    return argument_text(completion) + (completion.rank >= 0 ? format(" (rank %d)", completion.rank) : "");
  }
  return with_sentence(reason, completion);
}

}  // namespace

const char* argument_name(uint32_t argument) {
  switch (argument) {
#define EXPERTD_ARGUMENT_CASE(name, number, text) \
  case number:                                    \
    return text;
    EXPERTD_ARGUMENTS(EXPERTD_ARGUMENT_CASE)
#undef EXPERTD_ARGUMENT_CASE
    default:
      return "argument";
  }
}

uint32_t argument_number(const char* name) {
#define EXPERTD_ARGUMENT_NAMED(id, number, text) \
  if (strcmp(name, text) == 0) {                 \
    return number;                               \
  }
  EXPERTD_ARGUMENTS(EXPERTD_ARGUMENT_NAMED)
#undef EXPERTD_ARGUMENT_NAMED
  return EXPERTD_ARGUMENT_NONE;
}

Status completion_status(const expertd_completion& completion) {
  const int32_t reason = static_cast<int32_t>(completion.reason);
  if (reason == EXPERTD_REASON_NONE) {
    return {};
  }
  return {reason, text_of(reason, completion)};
}

}  // namespace expertd::client
