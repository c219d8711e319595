// SPDX-License-Identifier: Apache-2.0
// One of the two processes of ucx_floor: a UCX worker that sends messages out of a region of memory and receives them
// into one, with as many copies as the daemon's staged path: into a send buffer, through UCX, out of a receive buffer.
// One thread, which polls.
#pragma once

#include <ucp/api/ucp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::bench {

struct FloorOptions {
  std::string transports = "tcp";
  std::string devices;  // empty: all
  uint64_t message_bytes = 256 * 1024;
  uint64_t region_bytes = 256ULL * 1024 * 1024;
  uint32_t buffers = 4;  // messages under way, at either end
  double seconds = 2;
  uint32_t round_trips = 2000;
  bool both = false;  // both sides send
};

class FloorSide {
 public:
  static base::Result<std::unique_ptr<FloorSide>> create(const FloorOptions& options);
  ~FloorSide();
  FloorSide(const FloorSide&) = delete;
  FloorSide& operator=(const FloorSide&) = delete;

  const std::string& address() const { return address_; }
  base::Status connect(const std::string& address);

  /// Sends for the given time when `sends`, and receives until the other side has ended when `receives`. How many GB/s
  /// this side sent, from its first copy to the other side's word that all has been copied out.
  base::Result<double> stream(bool sends, bool receives);
  /// Messages there and back, one at a time; half of a round trip in microseconds per trip. The other side answers.
  base::Result<std::vector<double>> ping();
  base::Status answer();

 private:
  struct Buffer {
    FloorSide* side = nullptr;
    std::vector<std::byte> data;
    uint64_t header = 0;
  };

  explicit FloorSide(const FloorOptions& options);
  base::Status open();
  base::Status open_worker();
  base::Status send_data();
  base::Status tell(unsigned id, uint64_t value);
  void progress();
  void copy_in(std::byte* data);
  void copy_out(const std::byte* data);
  static ucs_status_t on_data(void* side, const void* header, size_t header_bytes, void* data, size_t bytes,
                              const ucp_am_recv_param_t* param);
  static ucs_status_t on_word(void* word, const void* header, size_t header_bytes, void* data, size_t bytes,
                              const ucp_am_recv_param_t* param);
  static void on_sent(void* request, ucs_status_t status, void* buffer);
  static void on_received(void* request, ucs_status_t status, size_t bytes, void* buffer);

  const FloorOptions options_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_ep_h endpoint_ = nullptr;
  std::string address_;
  std::vector<std::byte> source_;
  std::vector<std::byte> target_;
  uint64_t source_at_ = 0;
  uint64_t target_at_ = 0;
  std::vector<Buffer> send_buffers_;
  std::vector<Buffer> receive_buffers_;
  std::vector<Buffer*> free_send_;
  std::vector<Buffer*> free_receive_;
  std::vector<Buffer*> arrived_;
  std::vector<void*> waiting_;  // rendezvous that nobody has started
  uint64_t received_ = 0;
  uint64_t end_after_ = 0;  // the other side's last word: so many messages in all
  uint64_t done_ = 0;       // the other side's word that it has copied out so many
  ucs_status_t failed_ = UCS_OK;
};

}  // namespace expertd::bench
