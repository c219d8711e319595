// SPDX-License-Identifier: Apache-2.0
// expertd.hpp: the C interface of expertd.h for C++20, header-only: owners that release what they hold, and Result in
// place of exceptions. Nothing here throws. Threads and forks: as expertd.h says. Struct arguments stay the C ones;
// make<T>() gives a zeroed one with its struct_size.
#ifndef EXPERTD_HPP_
#define EXPERTD_HPP_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "expertd.h"

namespace expertd {

/// A zeroed argument struct: auto args = expertd::make<expertd_dispatch_args_t>();
template <typename Struct>
Struct make() {
  Struct made{};
  made.struct_size = sizeof(Struct);
  return made;
}

/// Reason and text of what went wrong; reason 0 is success.
class [[nodiscard]] Error {
 public:
  Error() = default;
  explicit Error(expertd_status_t status)
      : status_(status), text_(status.reason == 0 ? std::string() : std::string(expertd_last_message())) {}
  bool ok() const { return status_.reason == 0; }
  int32_t reason() const { return status_.reason; }
  int32_t code() const { return status_.code; }
  bool retryable() const { return expertd_reason_is_retryable(status_.reason) != 0; }
  /// "TIMEOUT: rank 1 had not submitted the operation"
  const std::string& text() const { return text_; }

 private:
  expertd_status_t status_{};
  std::string text_;
};

/// A value or an Error. value() of a failed result is a mistake of the caller: ask ok() first.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}      // NOLINT: a value is a result
  Result(Error error) : error_(std::move(error)) {}  // NOLINT: an error is a result
  bool ok() const { return value_.has_value(); }
  explicit operator bool() const { return ok(); }
  const Error& error() const { return error_; }
  T& value() & { return *value_; }
  const T& value() const& { return *value_; }
  T&& value() && { return std::move(*value_); }
  T* operator->() { return &*value_; }
  T& operator*() { return *value_; }

 private:
  std::optional<T> value_;
  Error error_;
};

/// One issued operation; a plain value.
class Event {
 public:
  Event() = default;
  explicit Event(expertd_event_t event) : event_(event) {}
  expertd_event_t raw() const { return event_; }

  Result<bool> done() const {
    int done = 0;
    const expertd_status_t status = expertd_event_query(event_, &done);
    if (status.reason != 0) {
      return Error(status);
    }
    return done != 0;
  }
  /// 0: until the operation's own deadline.
  Result<expertd_op_result_t> wait(uint64_t timeout_ns = 0) const {
    auto result = make<expertd_op_result_t>();
    const expertd_status_t status = expertd_event_wait(event_, timeout_ns, &result);
    if (status.reason != 0) {
      return Error(status);
    }
    return result;
  }
  Error stream_wait(expertd_stream_t stream) const { return Error(expertd_event_stream_wait(event_, stream)); }

 private:
  expertd_event_t event_{};
};

/// What a dispatch leaves: the routing for its combine, and the event.
struct Dispatched {
  expertd_handle_t handle{};
  Event event;
};

/// Owns a window or a registration; to be gone before its session.
class Buffer {
 public:
  explicit Buffer(expertd_buffer_t* buffer) : buffer_(buffer) {}
  Buffer(Buffer&& other) noexcept : buffer_(std::exchange(other.buffer_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { static_cast<void>(release()); }

  void* data() const { return expertd_buffer_data(buffer_); }
  uint64_t bytes() const { return expertd_buffer_bytes(buffer_); }
  /// The destructor does it too, but cannot say how it went.
  Error release() {
    return buffer_ == nullptr ? Error() : Error(expertd_buffer_release(std::exchange(buffer_, nullptr)));
  }

 private:
  expertd_buffer_t* buffer_;
};

/// Owns one rank of a communicator; to be gone before its session.
class Group {
 public:
  explicit Group(expertd_group_t* group) : group_(group) {}
  Group(Group&& other) noexcept : group_(std::exchange(other.group_, nullptr)) {}
  Group& operator=(Group&& other) noexcept {
    std::swap(group_, other.group_);
    return *this;
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  ~Group() { static_cast<void>(leave()); }

  expertd_group_t* raw() const { return group_; }
  Error leave() { return group_ == nullptr ? Error() : Error(expertd_group_leave(std::exchange(group_, nullptr))); }

  Result<Event> barrier(expertd_stream_t stream = nullptr, uint32_t flags = 0, uint64_t timeout_ns = 0) {
    expertd_event_t event{};
    const expertd_status_t status = expertd_barrier(group_, stream, flags, timeout_ns, &event);
    return event_or_error(status, event);
  }
  Result<Dispatched> dispatch(const expertd_dispatch_args_t& args, expertd_stream_t stream = nullptr) {
    expertd_handle_t handle{};
    expertd_event_t event{};
    const expertd_status_t status = expertd_dispatch(group_, &args, stream, &handle, &event);
    return status.reason == 0 ? Result<Dispatched>({handle, Event(event)}) : Result<Dispatched>(Error(status));
  }
  Result<Event> combine(const expertd_combine_args_t& args, expertd_stream_t stream = nullptr) {
    expertd_event_t event{};
    const expertd_status_t status = expertd_combine(group_, &args, stream, &event);
    return event_or_error(status, event);
  }
  Result<Dispatched> ll_dispatch(const expertd_ll_dispatch_args_t& args, expertd_stream_t stream = nullptr) {
    expertd_handle_t handle{};
    expertd_event_t event{};
    const expertd_status_t status = expertd_ll_dispatch(group_, &args, stream, &handle, &event);
    return status.reason == 0 ? Result<Dispatched>({handle, Event(event)}) : Result<Dispatched>(Error(status));
  }
  Result<Event> ll_combine(const expertd_ll_combine_args_t& args, expertd_stream_t stream = nullptr) {
    expertd_event_t event{};
    const expertd_status_t status = expertd_ll_combine(group_, &args, stream, &event);
    return event_or_error(status, event);
  }
  Result<expertd_ll_outputs_t> ll_outputs(expertd_handle_t handle) {
    auto outputs = make<expertd_ll_outputs_t>();
    const expertd_status_t status = expertd_ll_handle_outputs(group_, handle, &outputs);
    return status.reason == 0 ? Result<expertd_ll_outputs_t>(outputs) : Result<expertd_ll_outputs_t>(Error(status));
  }
  Error free_handle(expertd_handle_t handle) { return Error(expertd_handle_free(group_, handle)); }

 private:
  static Result<Event> event_or_error(expertd_status_t status, expertd_event_t event) {
    return status.reason == 0 ? Result<Event>(Event(event)) : Result<Event>(Error(status));
  }

  expertd_group_t* group_;
};

/// Owns an attachment. Groups and buffers of it must be gone before it.
class Session {
 public:
  static Result<Session> attach(const expertd_attach_options_t& options) {
    expertd_session_t* session = nullptr;
    const expertd_status_t status = expertd_attach(&options, &session);
    return status.reason == 0 ? Result<Session>(Session(session)) : Result<Session>(Error(status));
  }
  /// On the default socket.
  static Result<Session> attach(const char* device, const char* name = nullptr) {
    auto options = make<expertd_attach_options_t>();
    options.device = device;
    options.name = name;
    return attach(options);
  }
  explicit Session(expertd_session_t* session) : session_(session) {}
  Session(Session&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
  Session& operator=(Session&& other) noexcept {
    std::swap(session_, other.session_);
    return *this;
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() { static_cast<void>(detach()); }

  expertd_session_t* raw() const { return session_; }
  Error detach() { return session_ == nullptr ? Error() : Error(expertd_detach(std::exchange(session_, nullptr))); }
  Error reattach(uint64_t timeout_ns = 0) { return Error(expertd_reattach(session_, timeout_ns)); }
  Error state() const { return Error(expertd_session_state(session_)); }
  Result<expertd_session_info_t> info() const {
    auto info = make<expertd_session_info_t>();
    const expertd_status_t status = expertd_session_info(session_, &info);
    return status.reason == 0 ? Result<expertd_session_info_t>(info) : Result<expertd_session_info_t>(Error(status));
  }

  Result<Buffer> window(uint64_t bytes) {
    expertd_buffer_t* buffer = nullptr;
    const expertd_status_t status = expertd_window_create(session_, bytes, &buffer);
    return buffer_or_error(status, buffer);
  }
  Result<Buffer> register_memory(void* data, uint64_t bytes) {
    expertd_buffer_t* buffer = nullptr;
    const expertd_status_t status = expertd_register(session_, data, bytes, &buffer);
    return buffer_or_error(status, buffer);
  }
  /// `count` elements that operations reach without a copy; freed with the session or by free().
  template <typename T>
  Result<std::span<T>> alloc(uint64_t count) {
    void* data = nullptr;
    const expertd_status_t status = expertd_alloc(session_, count * sizeof(T), &data);
    if (status.reason != 0) {
      return Error(status);
    }
    return std::span<T>(static_cast<T*>(data), count);
  }
  Error free(void* data) { return Error(expertd_free(session_, data)); }
  Error copy(void* destination, const void* source, uint64_t bytes, expertd_stream_t stream = nullptr) {
    return Error(expertd_copy(session_, destination, source, bytes, stream));
  }
  Error synchronize(expertd_stream_t stream = nullptr, uint64_t timeout_ns = 0) {
    return Error(expertd_stream_synchronize(session_, stream, timeout_ns));
  }

  Result<expertd_group_plan_t> plan(const expertd_group_options_t& options) {
    auto plan = make<expertd_group_plan_t>();
    const expertd_status_t status = expertd_group_plan(session_, &options, &plan);
    return status.reason == 0 ? Result<expertd_group_plan_t>(plan) : Result<expertd_group_plan_t>(Error(status));
  }
  Result<Group> join(const expertd_group_options_t& options) {
    expertd_group_t* group = nullptr;
    const expertd_status_t status = expertd_group_join(session_, &options, &group);
    return status.reason == 0 ? Result<Group>(Group(group)) : Result<Group>(Error(status));
  }
  Result<Event> layout(const expertd_layout_args_t& args, expertd_stream_t stream = nullptr) {
    expertd_event_t event{};
    const expertd_status_t status = expertd_layout(session_, &args, stream, &event);
    return status.reason == 0 ? Result<Event>(Event(event)) : Result<Event>(Error(status));
  }

 private:
  static Result<Buffer> buffer_or_error(expertd_status_t status, expertd_buffer_t* buffer) {
    return status.reason == 0 ? Result<Buffer>(Buffer(buffer)) : Result<Buffer>(Error(status));
  }

  expertd_session_t* session_;
};

}  // namespace expertd

#endif  // EXPERTD_HPP_
