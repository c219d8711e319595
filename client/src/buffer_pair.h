// SPDX-License-Identifier: Apache-2.0
// BufferPair: a send and a receive buffer with an ordered queue of at most 64 recorded events. Any thread; hooks run on
// the thread that takes the event off, without the lock. Owned by the Session.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>

#include "client/src/memory.h"
#include "client/src/status.h"

namespace expertd::client {

class Session;

class BufferPair {
 public:
  static constexpr size_t kMaxRecorded = 64;

  explicit BufferPair(Session* session) : session_(session) {}

  static Status create(Session* session, uint64_t elements, expertd_data_type_t dtype, BufferPair** pair);
  static Status destroy(BufferPair* pair);

  Session* session() const { return session_; }
  void* send() const { return send_; }
  void* receive() const { return receive_; }

  Status record(expertd_event_t event, expertd_hook_t hook, void* user);
  Status stream_wait(expertd_stream_t stream);
  uint32_t pending();
  /// The first failure among what was taken; the queue goes on behind it.
  Status poll(uint32_t* taken);
  Status synchronize(uint64_t timeout_ns);

 private:
  struct Recorded {
    uint64_t event = 0;
    expertd_hook_t hook = nullptr;
    void* user = nullptr;
  };

  bool take_front(uint64_t event, Recorded* recorded);
  Status finish(const Recorded& recorded);

  Session* const session_;
  void* send_ = nullptr;
  void* receive_ = nullptr;
  std::mutex mutex_;
  std::deque<Recorded> queue_;
};

inline BufferPair* unwrap(expertd_buffer_pair_t* pair) {
  return reinterpret_cast<BufferPair*>(pair);
}
inline const BufferPair* unwrap(const expertd_buffer_pair_t* pair) {
  return reinterpret_cast<const BufferPair*>(pair);
}
inline expertd_buffer_pair_t* wrap(BufferPair* pair) {
  return reinterpret_cast<expertd_buffer_pair_t*>(pair);
}

}  // namespace expertd::client
