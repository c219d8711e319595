// SPDX-License-Identifier: Apache-2.0
// The C interface: texts, sessions, memory and metrics. Callers' threads.
#include <errno.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "client/src/api_check.h"
#include "client/src/clock.h"
#include "client/src/metrics.h"
#include "client/src/session.h"

#ifndef EXPERTD_CLIENT_VERSION
#define EXPERTD_CLIENT_VERSION "0.1.0"
#endif

namespace client = expertd::client;
using client::Buffer;
using client::check_given;
using client::publish;
using client::SessionUse;
using client::Status;
using client::unwrap;

namespace {

constexpr uint64_t kDefaultAttachNs = 5 * client::kNsPerS;
constexpr const char* kDefaultSocket = "/run/expertd/attach.sock";

std::string text_or(const char* text, const char* otherwise) {
  return text == nullptr ? otherwise : text;
}

Buffer* unwrap_buffer(const expertd_buffer_t* buffer) {
  return reinterpret_cast<Buffer*>(const_cast<expertd_buffer_t*>(buffer));
}

expertd_buffer_t* wrap_buffer(Buffer* buffer) {
  return reinterpret_cast<expertd_buffer_t*>(buffer);
}

// The way of every call on a session: argument check, entry, the call itself.
template <typename Call>
expertd_status_t on_session(expertd_session_t* session, Status checked, bool lost_too, const Call& call) {
  if (session == nullptr) {
    return publish(client::missing_argument("session"));
  }
  if (!checked.ok()) {
    return publish(checked);
  }
  const SessionUse use(unwrap(session), lost_too);
  return publish(use.ok() ? call(unwrap(session)) : use.status());
}

}  // namespace

const char* expertd_last_message(void) {
  return client::last_message();
}
const char* expertd_reason_name(int32_t reason) {
  return client::reason_name(reason);
}
const char* expertd_reason_sentence(int32_t reason) {
  return client::reason_sentence(reason);
}
int expertd_reason_is_retryable(int32_t reason) {
  return client::reason_is_retryable(reason) ? 1 : 0;
}
const char* expertd_version(void) {
  return EXPERTD_CLIENT_VERSION;
}

expertd_status_t expertd_attach(const expertd_attach_options_t* options, expertd_session_t** session) {
  Status status = client::both(client::check_struct(options, "options"), check_given(session, "session"));
  if (status.ok()) {
    status = check_given(options->device, "options.device");
  }
  if (!status.ok()) {
    return publish(status);
  }
  *session = nullptr;
  client::AttachRequest request;
  const char* from_environment = secure_getenv("EXPERTD_SOCKET");
  request.socket_path = text_or(options->socket_path, from_environment == nullptr ? kDefaultSocket : from_environment);
  request.device = options->device;
  request.name = text_or(options->name, program_invocation_short_name);
  request.traceparent = text_or(options->traceparent, "");
  request.timeout_ns = options->timeout_ns == 0 ? kDefaultAttachNs : options->timeout_ns;
  client::Session* attached = nullptr;
  status = client::Session::attach(std::move(request), &attached);
  if (status.ok()) {
    *session = client::wrap(attached);
  }
  return publish(status);
}

expertd_status_t expertd_detach(expertd_session_t* session) {
  if (session == nullptr) {
    return publish(client::missing_argument("session"));
  }
  return publish(client::Session::detach(unwrap(session)));
}

expertd_status_t expertd_reattach(expertd_session_t* session, uint64_t timeout_ns) {
  if (session == nullptr) {
    return publish(client::missing_argument("session"));
  }
  return publish(unwrap(session)->reattach(timeout_ns));
}

expertd_status_t expertd_session_info(expertd_session_t* session, expertd_session_info_t* info) {
  return on_session(session, client::check_struct(info, "info"), true,
                    [info](client::Session* it) { return it->info(info); });
}

expertd_status_t expertd_session_state(expertd_session_t* session) {
  return on_session(session, {}, true, [](client::Session* it) { return it->state(); });
}

expertd_status_t expertd_window_create(expertd_session_t* session, uint64_t bytes, expertd_buffer_t** buffer) {
  return on_session(session, check_given(buffer, "buffer"), false, [=](client::Session* it) {
    Buffer* made = nullptr;
    Status status = it->memory()->create_window(bytes, &made);
    *buffer = status.ok() ? wrap_buffer(made) : nullptr;
    return status;
  });
}

expertd_status_t expertd_register(expertd_session_t* session, void* data, uint64_t bytes, expertd_buffer_t** buffer) {
  Status checked = client::both(check_given(data, "data"), check_given(buffer, "buffer"));
  return on_session(session, std::move(checked), false, [=](client::Session* it) {
    Buffer* made = nullptr;
    Status status = it->memory()->register_pointer(data, bytes, &made);
    *buffer = status.ok() ? wrap_buffer(made) : nullptr;
    return status;
  });
}

expertd_status_t expertd_register_fd(expertd_session_t* session, int fd, uint64_t offset, uint64_t bytes,
                                     expertd_buffer_t** buffer) {
  return on_session(session, check_given(buffer, "buffer"), false, [=](client::Session* it) {
    Buffer* made = nullptr;
    Status status = it->memory()->register_fd(fd, offset, bytes, &made);
    *buffer = status.ok() ? wrap_buffer(made) : nullptr;
    return status;
  });
}

expertd_status_t expertd_buffer_release(expertd_buffer_t* buffer) {
  if (buffer == nullptr) {
    return publish(client::missing_argument("buffer"));
  }
  Buffer* known = unwrap_buffer(buffer);
  const SessionUse use(known->session, true);
  return publish(use.ok() ? known->session->memory()->release(known) : use.status());
}

void* expertd_buffer_data(const expertd_buffer_t* buffer) {
  return buffer == nullptr ? nullptr : unwrap_buffer(buffer)->data;
}

uint64_t expertd_buffer_bytes(const expertd_buffer_t* buffer) {
  return buffer == nullptr ? 0 : unwrap_buffer(buffer)->bytes;
}

expertd_status_t expertd_alloc(expertd_session_t* session, uint64_t bytes, void** data) {
  return on_session(session, check_given(data, "data"), false,
                    [=](client::Session* it) { return it->memory()->allocate(bytes, data); });
}

expertd_status_t expertd_free(expertd_session_t* session, void* data) {
  return on_session(session, check_given(data, "data"), true,
                    [=](client::Session* it) { return it->memory()->free_allocated(data); });
}

expertd_status_t expertd_copy(expertd_session_t* session, void* destination, const void* source, uint64_t bytes,
                              expertd_stream_t stream) {
  Status checked = client::both(check_given(destination, "destination"), check_given(source, "source"));
  return on_session(session, std::move(checked), true,
                    [=](client::Session* it) { return it->device()->copy(destination, source, bytes, stream); });
}

expertd_status_t expertd_stream_synchronize(expertd_session_t* session, expertd_stream_t stream, uint64_t timeout_ns) {
  return on_session(session, {}, true, [=](client::Session* it) { return it->synchronize(stream, timeout_ns); });
}

size_t expertd_client_metrics_text(char* text, size_t capacity) {
  const std::string all = client::metrics_text();
  if (text != nullptr && capacity > 0) {
    const size_t length = std::min(all.size(), capacity - 1);
    std::memcpy(text, all.data(), length);
    text[length] = '\0';
  }
  return all.size();
}
