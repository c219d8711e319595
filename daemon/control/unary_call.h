// SPDX-License-Identifier: Apache-2.0
// One unary gRPC call in progress: ends exactly once, by its answer or by its cancellation, whichever is first, from
// any thread. The answer's side holds a shared handle that may outlive the call; gRPC owns the reactor. Nothing waits
// here.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "daemon/control/error_details.h"
#include "daemon/session/api.h"

namespace expertd::control {

inline grpc::Status to_grpc_status(const session::ErrorDetail& error) {
  if (error.status.is_ok()) {
    return grpc::Status::OK;
  }
  return grpc::Status(static_cast<grpc::StatusCode>(error.status.code()),
                      cut_text(error.status.message(), kMessageBytesMax), encode_error_details(error));
}

template <typename Response>
class UnaryCall {
 public:
  /// The reactor lives until gRPC is done with the call; `response` likewise.
  static std::shared_ptr<UnaryCall> start(Response* response) {
    auto call = std::make_shared<UnaryCall>();
    call->response_ = response;
    call->reactor_ = new Reactor(call);  // deleted by its OnDone
    return call;
  }

  /// For the service method to return. Valid until the call ends, so take it before anyone can end it.
  grpc::ServerUnaryReactor* reactor() {
    const std::lock_guard lock(mutex_);
    return reactor_;
  }

  /// True once the client took the call back or its deadline passed; keeps the call.
  static std::shared_ptr<const std::atomic<bool>> cancelled(const std::shared_ptr<UnaryCall>& call) {
    return {call, &call->cancelled_};
  }

  bool ended() {
    const std::lock_guard lock(mutex_);
    return reactor_ == nullptr;
  }

  void finish(const session::ErrorDetail& error, Response&& response = {}) {
    grpc::ServerUnaryReactor* const reactor = claim();
    if (reactor == nullptr) {
      return;
    }
    // The claim keeps reactor and response alive: gRPC drops them only after Finish.
    if (error.status.is_ok()) {
      response_->Swap(&response);
    }
    reactor->Finish(to_grpc_status(error));
  }

 private:
  class Reactor final : public grpc::ServerUnaryReactor {
   public:
    explicit Reactor(std::shared_ptr<UnaryCall> call) : call_(std::move(call)) {}

   private:
    void OnCancel() override {
      call_->cancelled_.store(true, std::memory_order_release);
      session::ErrorDetail error;
      error.status = base::Status(EXPERTD_REASON_CANCELLED, "the call was cancelled or its deadline passed");
      call_->finish(error);
    }
    void OnDone() override { delete this; }

    const std::shared_ptr<UnaryCall> call_;
  };

  grpc::ServerUnaryReactor* claim() {
    const std::lock_guard lock(mutex_);
    return std::exchange(reactor_, nullptr);
  }

  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  grpc::ServerUnaryReactor* reactor_ = nullptr;  // under mutex_; null: ended
  Response* response_ = nullptr;                 // touched by the one who claimed
};

}  // namespace expertd::control
