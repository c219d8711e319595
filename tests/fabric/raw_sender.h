// SPDX-License-Identifier: Apache-2.0
// Sends active messages that no daemon sends: a bare UCX worker of its own, used by one thread.
#pragma once

#include <ucp/api/ucp.h>

#include <string>
#include <vector>

namespace expertd::fabric_test {

class RawSender {
 public:
  /// Connects to a lane's address over tcp on the loopback.
  explicit RawSender(const std::string& address);
  ~RawSender();
  RawSender(const RawSender&) = delete;
  RawSender& operator=(const RawSender&) = delete;

  bool ready() const { return endpoint_ != nullptr; }
  /// Waits until it has gone, with a deadline; `flags` as of ucp_am_send_nbx.
  bool send(unsigned id, const void* header, size_t header_bytes, const void* data, size_t bytes, uint32_t flags);

 private:
  bool wait(ucs_status_ptr_t request);

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
};

}  // namespace expertd::fabric_test
