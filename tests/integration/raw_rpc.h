// SPDX-License-Identifier: Apache-2.0
// The Session service over a session's own connection with ordinary gRPC and protobuf: an implementation that shares
// nothing with the client library. One thread; tests only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "expertd/v1/error.pb.h"
#include "expertd/v1/session.grpc.pb.h"
#include "tests/support/raw_client.h"

namespace expertd::support {

/// A call's end; `info` is the ErrorInfo of a failed one.
struct RpcEnd {
  bool ok = false;
  int code = 0;
  std::string message;
  v1::ErrorInfo info;
};

class RawRpc {
 public:
  /// Takes the session's connection over from the client, which must outlive this.
  explicit RawRpc(RawClient* client);

  RpcEnd open(const std::string& name);
  /// A sealed memfd of `bytes`, registered; 0 when that failed.
  uint32_t register_memfd(uint64_t bytes);
  RpcEnd register_buffer(const v1::RegisterBufferRequest& request, uint32_t* buffer);
  RpcEnd unregister(uint32_t buffer);
  RpcEnd create_window(uint64_t bytes, v1::CreateWindowResponse* window);
  RpcEnd join(const v1::JoinGroupRequest& request, v1::JoinGroupResponse* response);
  RpcEnd leave(uint64_t group);

 private:
  RawClient* client_;
  std::unique_ptr<v1::Session::Stub> stub_;
};

/// A request for a group of one rank: R 1, E 4, H 128, K 2, M 16.
v1::JoinGroupRequest lone_group(const std::string& name);

/// A memfd of `bytes`, sealed against shrinking when asked for; the caller closes it.
int make_memfd(uint64_t bytes, bool sealed);

}  // namespace expertd::support
