// SPDX-License-Identifier: Apache-2.0
// One unary gRPC call in progress: ends exactly once, by its answer or by its cancellation, whichever is first, from
// any thread. The answer's side holds a shared handle that may outlive the call; gRPC owns the reactor. Nothing waits
// here.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "daemon/session/api.h"

namespace expertd::rpc {

/// Answer::give(error, &response) says how such calls tell an error: the status, and what belongs into the response,
/// which goes out with OK alone.
template <typename Response, typename Answer>
class HeldCall {
 public:
  /// The reactor lives until gRPC is done with the call; `response` likewise.
  static std::shared_ptr<HeldCall> start(Response* response) {
    auto call = std::make_shared<HeldCall>();
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
  static std::shared_ptr<const std::atomic<bool>> cancelled(const std::shared_ptr<HeldCall>& call) {
    return {call, &call->was_cancelled_};
  }

  /// Runs `cancelled` when nobody waits any more, also when that was before.
  void on_cancel(std::function<void()> cancelled) {
    {
      const std::lock_guard lock(mutex_);
      if (!was_cancelled_.load(std::memory_order_relaxed)) {
        cancelled_ = std::move(cancelled);
        return;
      }
    }
    cancelled();
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
    const grpc::Status status = Answer::give(error, &response);
    // The claim keeps reactor and response alive: gRPC drops them only after Finish.
    if (status.ok()) {
      response_->Swap(&response);
    }
    reactor->Finish(status);
  }

 private:
  class Reactor final : public grpc::ServerUnaryReactor {
   public:
    explicit Reactor(std::shared_ptr<HeldCall> call) : call_(std::move(call)) {}

   private:
    void OnCancel() override { call_->cancel(); }
    void OnDone() override { delete this; }

    const std::shared_ptr<HeldCall> call_;
  };

  grpc::ServerUnaryReactor* claim() {
    const std::lock_guard lock(mutex_);
    return std::exchange(reactor_, nullptr);
  }

  void cancel() {
    std::function<void()> cancelled;
    {
      const std::lock_guard lock(mutex_);
      was_cancelled_.store(true, std::memory_order_release);  // pairs with whoever holds cancelled()
      cancelled = std::move(cancelled_);
    }
    if (cancelled) {
      cancelled();
    }
    if (grpc::ServerUnaryReactor* const reactor = claim(); reactor != nullptr) {
      reactor->Finish({grpc::StatusCode::CANCELLED, "the call was cancelled or its deadline passed"});
    }
  }

  std::mutex mutex_;
  grpc::ServerUnaryReactor* reactor_ = nullptr;  // under mutex_; null: ended
  std::atomic<bool> was_cancelled_{false};       // written under mutex_
  std::function<void()> cancelled_;              // under mutex_
  Response* response_ = nullptr;                 // touched by the one who claimed
};

}  // namespace expertd::rpc
