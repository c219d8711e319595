// SPDX-License-Identifier: Apache-2.0
// Calls of clients and operators: an error is the call's status, with its details.
#pragma once

#include "daemon/control/error_details.h"
#include "daemon/rpc/held_call.h"

namespace expertd::control {

inline grpc::Status to_grpc_status(const session::ErrorDetail& error) {
  if (error.status.is_ok()) {
    return grpc::Status::OK;
  }
  return grpc::Status(static_cast<grpc::StatusCode>(error.status.code()),
                      cut_text(error.status.message(), kMessageBytesMax), encode_error_details(error));
}

struct StatusAnswer {
  template <typename Response>
  static grpc::Status give(const session::ErrorDetail& error, Response* /*response*/) {
    return to_grpc_status(error);
  }
};

template <typename Response>
using UnaryCall = rpc::HeldCall<Response, StatusAnswer>;

}  // namespace expertd::control
