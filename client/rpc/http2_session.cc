// SPDX-License-Identifier: Apache-2.0
#include "client/rpc/http2_session.h"

#include <nghttp2/nghttp2.h>

#include <algorithm>
#include <array>
#include <utility>

#include "client/rpc/grpc_wire.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::rpc {
namespace {

constexpr std::string_view kUserAgent = "expertd-client/1";
// A window below the largest message only costs WINDOW_UPDATE frames; these bound what a slow pump
// lets pile up.
constexpr std::uint32_t kStreamWindowBytes = 1 << 20;
constexpr std::int32_t kConnectionWindowBytes = 4 << 20;
// nghttp2 ends the connection at a field of 64 KiB. Servers that heed the advertised limit end only
// the call; gRPC 1.51 does not heed it for a status, so that the daemon has to bound its messages
// anyway.
constexpr std::uint32_t kHeaderListBytes = 64 << 10;

nghttp2_nv make_field(std::string_view name, std::string_view value) {
  nghttp2_nv field{};
  // nghttp2 copies both and writes to neither; its interface is just not const.
  field.name = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(name.data()));
  field.value = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(value.data()));
  field.namelen = name.size();
  field.valuelen = value.size();
  field.flags = NGHTTP2_NV_FLAG_NONE;
  return field;
}

std::string_view make_view(const std::uint8_t* bytes, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

CallResult make_unavailable(std::string message) {
  CallResult result;
  result.grpc_status = EXPERTD_CODE_UNAVAILABLE;
  result.message = std::move(message);
  return result;
}

struct CallbacksDeleter {
  void operator()(nghttp2_session_callbacks* callbacks) const { nghttp2_session_callbacks_del(callbacks); }
};

}  // namespace

// The functions that nghttp2 calls from within receive() and produce(); they only touch the
// session's own state.
struct Http2Callbacks {
  static Http2Session* self(void* user_data) { return static_cast<Http2Session*>(user_data); }

  static int on_header(nghttp2_session*, const nghttp2_frame* frame, const std::uint8_t* name, std::size_t name_size,
                       const std::uint8_t* value, std::size_t value_size, std::uint8_t, void* user_data) {
    Http2Session::Stream* stream = self(user_data)->find(frame->hd.stream_id);
    if (stream != nullptr && !stream->complete) {
      stream->response.add_header(make_view(name, name_size), make_view(value, value_size));
    }
    return 0;
  }

  static int on_data(nghttp2_session* session, std::uint8_t, std::int32_t stream_id, const std::uint8_t* data,
                     std::size_t size, void* user_data) {
    Http2Session::Stream* stream = self(user_data)->find(stream_id);
    if (stream == nullptr || stream->complete || stream->response.add_data(make_view(data, size))) {
      return 0;
    }
    self(user_data)->complete(stream, std::move(stream->response).finish(NGHTTP2_NO_ERROR));
    return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream_id, NGHTTP2_CANCEL);
  }

  static int on_frame(nghttp2_session* session, const nghttp2_frame* frame, void* user_data) {
    if (frame->hd.type == NGHTTP2_GOAWAY) {
      self(user_data)->draining_ = true;
      return 0;
    }
    const bool may_end = frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA;
    if (!may_end || (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) {
      return 0;
    }
    Http2Session::Stream* stream = self(user_data)->find(frame->hd.stream_id);
    if (stream == nullptr || stream->complete) {
      return 0;
    }
    self(user_data)->complete(stream, std::move(stream->response).finish(NGHTTP2_NO_ERROR));
    // A server may answer before it has read the whole request; nobody wants the rest of it then.
    if (stream->request_sent < stream->request.size()) {
      return nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_CANCEL);
    }
    return 0;
  }

  static int on_frame_not_sent(nghttp2_session*, const nghttp2_frame* frame, int error, void* user_data) {
    Http2Session::Stream* stream = self(user_data)->find(frame->hd.stream_id);
    if (frame->hd.type == NGHTTP2_HEADERS && stream != nullptr && !stream->complete) {
      // Mostly because of a GOAWAY; on_stream_close follows and frees the stream.
      self(user_data)->complete(stream,
                                make_unavailable(std::string("the call was not sent: ") + nghttp2_strerror(error)));
    }
    return 0;
  }

  static int on_stream_close(nghttp2_session*, std::int32_t stream_id, std::uint32_t http2_error, void* user_data) {
    Http2Session::Stream* stream = self(user_data)->find(stream_id);
    if (stream != nullptr) {
      if (!stream->complete) {
        self(user_data)->complete(stream, std::move(stream->response).finish(http2_error));
      }
      self(user_data)->streams_.erase(stream_id);
    }
    return 0;
  }

  static ssize_t read_request(nghttp2_session*, std::int32_t stream_id, std::uint8_t* out, std::size_t size,
                              std::uint32_t* data_flags, nghttp2_data_source*, void* user_data) {
    Http2Session::Stream* stream = self(user_data)->find(stream_id);
    if (stream == nullptr) {
      return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    }
    const std::size_t count = std::min(size, stream->request.size() - stream->request_sent);
    stream->request.copy(reinterpret_cast<char*>(out), count, stream->request_sent);
    stream->request_sent += count;
    if (stream->request_sent == stream->request.size()) {
      *data_flags |= NGHTTP2_DATA_FLAG_EOF;
    }
    return static_cast<ssize_t>(count);
  }
};

void Http2Session::SessionDeleter::operator()(nghttp2_session* session) const {
  nghttp2_session_del(session);
}

std::unique_ptr<Http2Session> Http2Session::create(std::string authority, std::string* error) {
  auto session = std::make_unique<Http2Session>(Private(), std::move(authority));
  if (!session->open(error)) {
    return nullptr;
  }
  return session;
}

bool Http2Session::open(std::string* error) {
  nghttp2_session_callbacks* raw_callbacks = nullptr;
  int rc = nghttp2_session_callbacks_new(&raw_callbacks);
  const std::unique_ptr<nghttp2_session_callbacks, CallbacksDeleter> callbacks(raw_callbacks);
  nghttp2_session* raw_session = nullptr;
  if (rc == 0) {
    nghttp2_session_callbacks_set_on_header_callback(raw_callbacks, Http2Callbacks::on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(raw_callbacks, Http2Callbacks::on_data);
    nghttp2_session_callbacks_set_on_frame_recv_callback(raw_callbacks, Http2Callbacks::on_frame);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(raw_callbacks, Http2Callbacks::on_frame_not_sent);
    nghttp2_session_callbacks_set_on_stream_close_callback(raw_callbacks, Http2Callbacks::on_stream_close);
    rc = nghttp2_session_client_new(&raw_session, raw_callbacks, this);
  }
  session_.reset(raw_session);
  if (rc == 0) {
    const std::array<nghttp2_settings_entry, 3> settings = {{
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, kStreamWindowBytes},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, kHeaderListBytes},
    }};
    rc = nghttp2_submit_settings(raw_session, NGHTTP2_FLAG_NONE, settings.data(), settings.size());
  }
  if (rc == 0) {
    rc = nghttp2_session_set_local_window_size(raw_session, NGHTTP2_FLAG_NONE, 0, kConnectionWindowBytes);
  }
  if (rc != 0 && error != nullptr) {
    *error = std::string("while opening an HTTP/2 session: ") + nghttp2_strerror(rc);
  }
  return rc == 0;
}

void Http2Session::start(CallStart call) {
  const std::string timeout = format_timeout(call.timeout_ns);
  const std::array<nghttp2_nv, 8> fields = {
      make_field(":method", "POST"),       make_field(":scheme", "http"),
      make_field(":path", call.method),    make_field(":authority", authority_),
      make_field("te", "trailers"),        make_field("content-type", "application/grpc"),
      make_field("grpc-timeout", timeout), make_field("user-agent", kUserAgent),
  };
  nghttp2_data_provider body{};
  body.read_callback = Http2Callbacks::read_request;
  const std::int32_t stream_id =
      nghttp2_submit_request(session_.get(), nullptr, fields.data(), fields.size(), &body, nullptr);
  if (stream_id < 0) {
    completions_.push_back(
        {call.call_id, make_unavailable(std::string("the call was not sent: ") + nghttp2_strerror(stream_id))});
    return;
  }
  Stream& stream = streams_[stream_id];
  stream.call_id = call.call_id;
  stream.request = std::move(call.framed_request);
}

void Http2Session::cancel(std::uint64_t call_id) {
  const auto found = std::find_if(streams_.begin(), streams_.end(),
                                  [call_id](const auto& entry) { return entry.second.call_id == call_id; });
  if (found == streams_.end() || found->second.complete) {
    return;
  }
  found->second.complete = true;
  // It fails only without memory; the stream then ends by the timeout that the server was told.
  static_cast<void>(nghttp2_submit_rst_stream(session_.get(), NGHTTP2_FLAG_NONE, found->first, NGHTTP2_CANCEL));
}

bool Http2Session::receive(std::span<const std::uint8_t> bytes) {
  const ssize_t consumed = nghttp2_session_mem_recv(session_.get(), bytes.data(), bytes.size());
  return consumed >= 0 && static_cast<std::size_t>(consumed) == bytes.size();
}

bool Http2Session::produce(std::string* out, std::size_t limit) {
  while (out->size() < limit) {
    const std::uint8_t* chunk = nullptr;
    const ssize_t size = nghttp2_session_mem_send(session_.get(), &chunk);
    if (size < 0) {
      return false;
    }
    if (size == 0) {
      return true;
    }
    out->append(make_view(chunk, static_cast<std::size_t>(size)));
  }
  return true;
}

bool Http2Session::over() const {
  return nghttp2_session_want_read(session_.get()) == 0 && nghttp2_session_want_write(session_.get()) == 0;
}

std::vector<Completion> Http2Session::take_completions() {
  return std::exchange(completions_, {});
}

Http2Session::Stream* Http2Session::find(std::int32_t stream_id) {
  const auto found = streams_.find(stream_id);
  return found == streams_.end() ? nullptr : &found->second;
}

void Http2Session::complete(Stream* stream, CallResult result) {
  stream->complete = true;
  completions_.push_back({stream->call_id, std::move(result)});
}

}  // namespace expertd::rpc
