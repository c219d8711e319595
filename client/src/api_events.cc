// SPDX-License-Identifier: Apache-2.0
// The C interface: events and buffer pairs. Callers' threads.
#include "client/src/api_check.h"
#include "client/src/buffer_pair.h"
#include "client/src/session.h"

namespace client = expertd::client;
using client::BufferPair;
using client::check_given;
using client::publish;
using client::SessionUse;
using client::Status;
using client::unwrap;

namespace {

// Results of operations that ended stay readable after the daemon's end.
template <typename Call>
expertd_status_t on_event(expertd_event_t event, Status checked, const Call& call) {
  if (event.session == nullptr) {
    return publish(client::missing_argument("event.session"));
  }
  if (!checked.ok()) {
    return publish(checked);
  }
  const SessionUse use(unwrap(event.session), true);
  return publish(use.ok() ? call(unwrap(event.session)) : use.status());
}

template <typename Call>
expertd_status_t on_pair(expertd_buffer_pair_t* pair, Status checked, const Call& call) {
  if (pair == nullptr) {
    return publish(client::missing_argument("pair"));
  }
  if (!checked.ok()) {
    return publish(checked);
  }
  const SessionUse use(unwrap(pair)->session(), true);
  return publish(use.ok() ? call(unwrap(pair)) : use.status());
}

}  // namespace

expertd_status_t expertd_event_query(expertd_event_t event, int* done) {
  return on_event(event, check_given(done, "done"), [=](client::Session* it) { return it->query(event.seq, done); });
}

expertd_status_t expertd_event_wait(expertd_event_t event, uint64_t timeout_ns, expertd_op_result_t* result) {
  Status checked =
      result == nullptr ? Status() : client::check_struct(result, "result", offsetof(expertd_op_result_t, executor));
  return on_event(event, std::move(checked),
                  [=](client::Session* it) { return it->wait(event.seq, timeout_ns, result); });
}

expertd_status_t expertd_event_stream_wait(expertd_event_t event, expertd_stream_t stream) {
  return on_event(event, {}, [=](client::Session* it) { return it->stream_wait(event.seq, stream); });
}

expertd_status_t expertd_buffer_create(expertd_session_t* session, uint64_t elements, expertd_data_type_t dtype,
                                       expertd_buffer_pair_t** pair) {
  Status status = client::both(check_given(session, "session"), check_given(pair, "pair"));
  if (!status.ok()) {
    return publish(status);
  }
  *pair = nullptr;
  const SessionUse use(unwrap(session));
  if (!use.ok()) {
    return publish(use.status());
  }
  BufferPair* made = nullptr;
  status = BufferPair::create(unwrap(session), elements, dtype, &made);
  *pair = status.ok() ? client::wrap(made) : nullptr;
  return publish(status);
}

expertd_status_t expertd_buffer_pair_destroy(expertd_buffer_pair_t* pair) {
  return on_pair(pair, {}, [](BufferPair* it) { return BufferPair::destroy(it); });
}

void* expertd_buffer_send(const expertd_buffer_pair_t* pair) {
  return pair == nullptr ? nullptr : unwrap(pair)->send();
}

void* expertd_buffer_receive(const expertd_buffer_pair_t* pair) {
  return pair == nullptr ? nullptr : unwrap(pair)->receive();
}

expertd_status_t expertd_queue_record(expertd_buffer_pair_t* pair, expertd_event_t event, expertd_hook_t hook,
                                      void* user) {
  return on_pair(pair, {}, [=](BufferPair* it) { return it->record(event, hook, user); });
}

expertd_status_t expertd_queue_stream_wait(expertd_buffer_pair_t* pair, expertd_stream_t stream) {
  return on_pair(pair, {}, [=](BufferPair* it) { return it->stream_wait(stream); });
}

expertd_status_t expertd_queue_query(expertd_buffer_pair_t* pair, uint32_t* pending) {
  return on_pair(pair, check_given(pending, "pending"), [=](BufferPair* it) {
    *pending = it->pending();
    return Status();
  });
}

expertd_status_t expertd_queue_poll(expertd_buffer_pair_t* pair, uint32_t* taken) {
  return on_pair(pair, check_given(taken, "taken"), [=](BufferPair* it) { return it->poll(taken); });
}

expertd_status_t expertd_queue_synchronize(expertd_buffer_pair_t* pair, uint64_t timeout_ns) {
  return on_pair(pair, {}, [=](BufferPair* it) { return it->synchronize(timeout_ns); });
}
