// SPDX-License-Identifier: Apache-2.0
// Calls of expertd.v1.Session with nanopb messages: encoding, decoding, and errors turned into a Status with the
// daemon's Reason. Any thread but the client thread; blocks until the answer or the timeout.
#pragma once

#include <pb.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "client/rpc/channel.h"
#include "client/src/status.h"

namespace expertd::client {

struct RpcMessage {
  const pb_msgdesc_t* fields;
  void* message;
};

Status call_session(rpc::Channel* channel, const char* method, const RpcMessage& request, const RpcMessage& response,
                    uint64_t timeout_ns);

/// What a failed call means; split off for tests.
Status rpc_status(const char* method, const rpc::CallResult& result);

/// Copies text into a fixed field; false when it does not fit.
bool copy_text(std::string_view text, char* field, size_t capacity);

}  // namespace expertd::client
