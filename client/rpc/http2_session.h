// SPDX-License-Identifier: Apache-2.0
// Http2Session: the client half of HTTP/2 with gRPC's headers, by libnghttp2. Used by the pump
// thread only; it owns the streams and turns bytes received into completions and calls into bytes
// to send. It does no input or output itself, takes no lock and never calls out: the Channel
// fetches the completions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "client/rpc/call_result.h"
#include "client/rpc/unary_response.h"

struct nghttp2_session;

namespace expertd::rpc {

struct Completion {
  std::uint64_t call_id = 0;
  CallResult result;
};

struct CallStart {
  std::uint64_t call_id = 0;
  std::string method;
  std::string framed_request;
  std::uint64_t timeout_ns = 0;
};

class Http2Session {
  struct Private {
    explicit Private() = default;
  };

 public:
  static std::unique_ptr<Http2Session> create(std::string authority, std::string* error);

  /// Only for create().
  Http2Session(Private, std::string authority) : authority_(std::move(authority)) {}
  // nghttp2 keeps a pointer to this object.
  Http2Session(const Http2Session&) = delete;
  Http2Session& operator=(const Http2Session&) = delete;

  void start(CallStart call);
  /// Resets the stream of a call whose caller has left; there will be no completion.
  void cancel(std::uint64_t call_id);

  /// False when the peer broke the protocol beyond repair.
  bool receive(std::span<const std::uint8_t> bytes);
  /// Appends what is to be sent until there is nothing more or out holds limit bytes; false =
  /// unusable.
  bool produce(std::string* out, std::size_t limit);

  /// The peer sent GOAWAY: calls in flight go on, new ones will fail.
  bool draining() const { return draining_; }
  /// Nothing more can come or go.
  bool over() const;
  /// Streams not closed yet, with those whose call is already complete.
  std::size_t open_streams() const { return streams_.size(); }
  std::vector<Completion> take_completions();

 private:
  friend struct Http2Callbacks;

  struct Stream {
    std::uint64_t call_id = 0;
    std::string request;
    std::size_t request_sent = 0;
    UnaryResponse response;
    bool complete = false;
  };
  struct SessionDeleter {
    void operator()(nghttp2_session* session) const;
  };

  bool open(std::string* error);
  Stream* find(std::int32_t stream_id);
  void complete(Stream* stream, CallResult result);

  std::string authority_;
  std::unordered_map<std::int32_t, Stream> streams_;
  std::vector<Completion> completions_;
  bool draining_ = false;
  // Declared last: its destruction may still call back into the members above.
  std::unique_ptr<nghttp2_session, SessionDeleter> session_;
};

}  // namespace expertd::rpc
