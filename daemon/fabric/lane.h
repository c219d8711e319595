// SPDX-License-Identifier: Apache-2.0
// Lane: one UCX context with one worker, and what arrives on it. A daemon has one per lane, so that lanes can have
// other options and nothing of one queues behind another, and of a lane with several devices one per device: its rails.
// Created and destroyed by a control thread while no thread runs it; everything else is of the lane's thread. Endpoints
// (endpoints.h) are closed before it.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "daemon/fabric/options.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

/// One active message as UCX hands it over; valid during the call.
struct Incoming {
  LaneKind lane = LaneKind::kControl;
  ucp_worker_h worker = nullptr;  // of the rail it came by
  uint16_t type = 0;              // WireType
  const void* header = nullptr;
  size_t header_bytes = 0;
  void* data = nullptr;  // the payload, or with rendezvous its descriptor
  size_t bytes = 0;
  bool rendezvous = false;
  uint32_t rail = 0;  // that of `worker`, where LaneCore has looked it up
};

/// What every message begins with. False: it is no message of this protocol, for `cause`.
bool read_prefix(const Incoming& message, WirePrefix* prefix, DropCause* cause);

/// Copies the header, since UCX promises no alignment. False: it has another size.
template <typename Header>
bool read_header(const Incoming& message, Header* header) {
  if (message.header_bytes != sizeof(*header)) {
    return false;
  }
  std::memcpy(header, message.header, sizeof(*header));
  return true;
}

/// Where a lane's messages go. Called within progress(): looks, copies, enqueues, and calls nothing of UCX.
class IncomingSink {
 public:
  virtual ~IncomingSink() = default;
  /// True: a rendezvous is kept and its descriptor will be received or released later.
  virtual bool incoming(const Incoming& message) = 0;
};

class Lane {
 public:
  /// Reads the environment, applies `options` where the operator set nothing. CONFIG_BAD_VALUE names an option that is
  /// not one; UNAVAILABLE or SYSTEM what UCX could not do.
  static base::Result<std::unique_ptr<Lane>> create(LaneKind kind, const LaneOptionList& options);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// Before the thread starts.
  base::Status receive_into(IncomingSink* sink);
  const std::string& address() const { return address_; }
  /// As the options have it; empty: UCX's choice.
  const std::string& devices() const { return devices_; }
  int event_fd() const { return event_fd_; }
  ucp_worker_h worker() const { return worker_; }

  bool progress() { return ucp_worker_progress(worker_) != 0; }
  /// Before a sleep on event_fd(): false when something is there already.
  bool arm() { return ucp_worker_arm(worker_) == UCS_OK; }

 private:
  struct Handler {
    Lane* lane = nullptr;
    uint16_t type = 0;
  };

  explicit Lane(LaneKind kind) : kind_(kind) {}
  base::Status open(const LaneOptionList& options);
  base::Status open_worker();
  static ucs_status_t on_message(void* handler, const void* header, size_t header_bytes, void* data, size_t bytes,
                                 const ucp_am_recv_param_t* param);

  const LaneKind kind_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;  // the worker's
  std::string address_;
  std::string devices_;
  IncomingSink* sink_ = nullptr;
  std::array<Handler, kWireTypes> handlers_{};
};

/// Those of one lane, at least one.
using Rails = std::vector<std::unique_ptr<Lane>>;
/// Opens the rails that the options of a lane ask for and has their messages go to `sink`; errors as Lane::create.
base::Result<Rails> open_rails(LaneKind kind, const LaneOptionList& options, IncomingSink* sink);

}  // namespace expertd::fabric
