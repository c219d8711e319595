// SPDX-License-Identifier: Apache-2.0
// The one place that translates UCX's statuses into the house's.
#pragma once

#include <ucs/type/status.h>

#include <string>

#include "daemon/base/status.h"

namespace expertd::fabric {

/// `what` says what was tried, and with what.
inline base::Status ucx_status(const std::string& what, ucs_status_t status) {
  if (status == UCS_OK) {
    return base::Status::ok();
  }
  base::Reason reason = EXPERTD_REASON_SYSTEM;
  switch (status) {
    case UCS_ERR_UNREACHABLE:
    case UCS_ERR_NO_DEVICE:
    case UCS_ERR_CONNECTION_RESET:
    case UCS_ERR_NOT_CONNECTED:
    case UCS_ERR_ENDPOINT_TIMEOUT:
      reason = EXPERTD_REASON_UNAVAILABLE;
      break;
    case UCS_ERR_UNSUPPORTED:
      reason = EXPERTD_REASON_UNSUPPORTED;
      break;
    default:
      break;
  }
  return base::Status(reason, what + ": UCX says \"" + ucs_status_string(status) + "\"");
}

}  // namespace expertd::fabric
