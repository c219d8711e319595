// SPDX-License-Identifier: Apache-2.0
// A stand-in for the daemon inside the test's process: a real attach socket, a real ring, and the real gRPC server with
// a scripted Session service. It serves one session after the other, on host devices, and executes operations of groups
// of one rank as the identity. Its threads wait on descriptors and conditions, never on time.
#pragma once

#include <expertd/v1/error.pb.h>
#include <expertd/v1/session.grpc.pb.h>
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/server_posix.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "proto/abi/attach_v1.h"
#include "proto/abi/ll_window_v1.h"
#include "tests/unit/client_fake_socket.h"

namespace expertd::test {

class FakeDaemon : public v1::Session::Service {
 public:
  static constexpr uint32_t kSlots = 8;
  static constexpr uint32_t kCaptureWords = 5;  // of lane 0 of a group

  // Decides how an operation ends; what it leaves at Reason 0 is executed.
  using Script = std::function<void(const expertd_slot& slot, expertd_completion* completion)>;

  FakeDaemon() {
    char pattern[] = "/tmp/expertd-fake-XXXXXX";
    directory_ = mkdtemp(pattern);
    path_ = directory_ + "/attach.sock";
    stop_ = eventfd(0, EFD_CLOEXEC);
    listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path, path_.c_str(), path_.size());
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 || listen(listener_, 8) != 0) {
      abort();
    }
    grpc::ServerBuilder builder;
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    thread_ = std::thread([this] { serve(); });
  }

  ~FakeDaemon() override {
    const uint64_t one = 1;
    if (write(stop_, &one, sizeof(one)) < 0) {
      abort();
    }
    thread_.join();
    server_->Shutdown();
    close(listener_);
    close(stop_);
    unlink(path_.c_str());
    rmdir(directory_.c_str());
  }

  const std::string& path() const { return path_; }
  void set_script(Script script) {
    const std::lock_guard lock(mutex_);
    script_ = std::move(script);
  }
  // While held, operations are taken in but not completed.
  void hold(bool held) {
    held_ = held;
    poke();
  }
  // Ends the current session as a crash would: the lease closes without a word.
  void crash() {
    crash_ = true;
    poke();
  }
  void refuse_next(int32_t reason, const std::string& text) {
    const std::lock_guard lock(mutex_);
    refusal_ = {reason, text};
  }
  void fail_join(const v1::ErrorInfo& info, const std::string& text) {
    const std::lock_guard lock(mutex_);
    join_error_ = info;
    join_error_text_ = text;
  }
  std::vector<expertd_slot> seen() {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  // What is in the answers to joins beside the rest.
  void grant(v1::JoinGroupResponse granted) {
    const std::lock_guard lock(mutex_);
    grant_ = std::move(granted);
  }
  // Of the last join.
  v1::GroupConfig config() {
    const std::lock_guard lock(mutex_);
    return config_;
  }
  // Of the sessions that attach from now on.
  void set_abi_minor(uint16_t minor) { abi_minor_ = minor; }
  // Operations captured so far; the next one's entry is behind it.
  void set_captured(uint32_t count) { captured_ = count; }
  size_t buffer_count() {
    const std::lock_guard lock(mutex_);
    return regions_.size();
  }
  expertd_ring_header* header() { return reinterpret_cast<expertd_ring_header*>(ring_); }
  uint64_t wakes() const { return wakes_; }

 private:
  void poke() {
    const uint64_t one = 1;
    const std::lock_guard lock(mutex_);
    if (wake_ >= 0 && write(wake_, &one, sizeof(one)) < 0) {
      abort();
    }
  }

  void serve() {
    for (;;) {
      pollfd entries[2] = {{listener_, POLLIN, 0}, {stop_, POLLIN, 0}};
      if (poll(entries, 2, -1) < 0 || entries[1].revents != 0) {
        return;
      }
      const int lease = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      serve_session(lease);
      close(lease);
      if (stopped()) {
        return;
      }
    }
  }

  bool stopped() const {
    pollfd entry{stop_, POLLIN, 0};
    return poll(&entry, 1, 0) > 0;
  }

  void serve_session(int lease) {
    expertd_attach_hello hello{};
    int fd = -1;
    if (receive_with(lease, &hello, sizeof(hello), &fd) != static_cast<ssize_t>(sizeof(hello))) {
      return;
    }
    expertd_attach_welcome welcome{};
    welcome.magic = EXPERTD_ATTACH_MAGIC;
    welcome.type = EXPERTD_ATTACH_WELCOME;
    welcome.abi_major = EXPERTD_ABI_MAJOR;
    {
      const std::lock_guard lock(mutex_);
      if (refusal_.first != 0) {
        welcome.type = EXPERTD_ATTACH_REFUSED;
        welcome.reason = static_cast<uint32_t>(refusal_.first);
        strncpy(welcome.message, refusal_.second.c_str(), sizeof(welcome.message) - 1);
        refusal_ = {};
        send_with(lease, &welcome, sizeof(welcome), {});
        return;
      }
    }
    open_session(lease, &welcome);
    run_session(lease);
    const std::lock_guard lock(mutex_);
    munmap(ring_, kRingBytes);
    ring_ = nullptr;
    close(wake_);
    wake_ = -1;
    regions_.clear();
    window_fds_.clear();
    put_fds_.clear();
    crash_ = false;
  }

  void open_session(int lease, expertd_attach_welcome* welcome) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
      abort();
    }
    const int ring_fd = make_memfd(kRingBytes);
    void* mapping = mmap(nullptr, kRingBytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
    {
      const std::lock_guard lock(mutex_);
      wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
      ring_ = static_cast<char*>(mapping);
      seen_.clear();
    }
    done_ = 0;
    expertd_ring_header* head = header();
    head->magic = EXPERTD_RING_MAGIC;
    head->abi_major = EXPERTD_ABI_MAJOR;
    head->abi_minor = abi_minor_;
    head->header_bytes = EXPERTD_RING_HEADER_BYTES;
    head->slot_count = kSlots;
    head->slot_bytes = EXPERTD_SLOT_BYTES;
    head->completion_bytes = EXPERTD_COMPLETION_BYTES;
    head->slots_offset = EXPERTD_RING_HEADER_BYTES;
    head->completions_offset = EXPERTD_RING_HEADER_BYTES + kSlots * EXPERTD_SLOT_BYTES;
    head->total_bytes = kRingBytes;
    ++session_;
    welcome->session_id = session_;
    welcome->generation = session_;
    welcome->device_kind = EXPERTD_DEVICE_HOST;
    welcome->fd_count = 3;
    welcome->ring_bytes = kRingBytes;
    welcome->handles_per_session = 32;
    welcome->op_timeout_ns = 5'000'000'000;
    welcome->local_pid = getpid();
    grpc::AddInsecureChannelFromFd(server_.get(), pair[0]);
    send_with(lease, welcome, sizeof(*welcome), {pair[1], ring_fd, wake_});
    close(pair[1]);
    close(ring_fd);
  }

  // One thread for lease and ring, as the daemon's loop for a host device.
  void run_session(int lease) {
    auto sleeping = std::atomic_ref<uint32_t>(header()->daemon_sleeping);
    for (;;) {
      sleeping.store(1, std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      pollfd entries[3] = {{lease, POLLIN, 0}, {wake_, POLLIN, 0}, {stop_, POLLIN, 0}};
      const int timeout = has_work() ? 0 : -1;
      if (poll(entries, 3, timeout) < 0 || entries[2].revents != 0 || crash_) {
        return;
      }
      sleeping.store(0, std::memory_order_relaxed);
      uint64_t count = 0;
      if (entries[1].revents != 0 && read(wake_, &count, sizeof(count)) > 0) {
        wakes_ += count;
      }
      if (crash_ || (entries[0].revents != 0 && !serve_lease(lease))) {
        return;
      }
      execute_all();
    }
  }

  bool has_work() {
    return !held_ && std::atomic_ref<uint64_t>(header()->submit_tail).load(std::memory_order_acquire) > done_;
  }

  bool serve_lease(int lease) {
    expertd_attach_fd request{};
    int fd = -1;
    if (receive_with(lease, &request, sizeof(request), &fd) != static_cast<ssize_t>(sizeof(request))) {
      return false;
    }
    const std::lock_guard lock(mutex_);
    expertd_attach_fd reply{};
    reply.magic = EXPERTD_ATTACH_MAGIC;
    reply.type = EXPERTD_ATTACH_FD_REPLY;
    if (request.type == EXPERTD_ATTACH_PUT_FD) {
      reply.token = ++token_;
      put_fds_[reply.token] = fd;
      send_with(lease, &reply, sizeof(reply), {});
      return true;
    }
    const auto found = window_fds_.find(request.token);
    if (found == window_fds_.end()) {
      reply.reason = EXPERTD_REASON_NO_SUCH_TOKEN;
      send_with(lease, &reply, sizeof(reply), {});
      return true;
    }
    reply.token = request.token;
    send_with(lease, &reply, sizeof(reply), {found->second});
    close(found->second);
    window_fds_.erase(found);
    return true;
  }

  void execute_all() {
    while (has_work()) {
      expertd_slot slot;
      memcpy(&slot, ring_ + header()->slots_offset + (done_ % kSlots) * EXPERTD_SLOT_BYTES, sizeof(slot));
      expertd_completion completion{};
      completion.rank = -1;
      Script script;
      {
        const std::lock_guard lock(mutex_);
        seen_.push_back(slot);
        script = script_;
      }
      completion.reason = slot.refused_reason;
      if (script) {
        script(slot, &completion);
      }
      if (completion.reason == 0) {
        execute(slot, &completion);
      }
      complete(slot.seq, &completion);
      ++done_;
    }
  }

  void complete(uint64_t seq, expertd_completion* completion) {
    char* place = ring_ + header()->completions_offset + ((seq - 1) % kSlots) * EXPERTD_COMPLETION_BYTES;
    completion->seq = 0;
    memcpy(place + 8, reinterpret_cast<const char*>(completion) + 8, sizeof(*completion) - 8);
    std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(place)).store(seq, std::memory_order_release);
    std::atomic_ref<uint32_t>(header()->completion_futex).fetch_add(1, std::memory_order_seq_cst);
    if (std::atomic_ref<uint32_t>(header()->client_waiters).load(std::memory_order_seq_cst) != 0) {
      syscall(SYS_futex, &header()->completion_futex, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  char* at(const expertd_slot& slot, uint32_t tensor) {
    const expertd_tensor_ref& ref = slot.tensors[tensor];
    const std::lock_guard lock(mutex_);
    const auto found = regions_.find(ref.buffer);
    return found == regions_.end() || ref.offset >= found->second.bytes ? nullptr : found->second.data + ref.offset;
  }

  void move(const expertd_slot& slot, uint32_t from, uint32_t to, uint64_t bytes) {
    const char* source = at(slot, from);
    char* target = at(slot, to);
    if (source != nullptr && target != nullptr) {
      memcpy(target, source, bytes);
    }
  }

  void execute(const expertd_slot& slot, expertd_completion* completion) {
    if ((slot.flags & EXPERTD_SLOT_CAPTURED) != 0) {
      completion->capture_entry = ++captured_;
      completion->capture_words = kCaptureWords + slot.capture_lane;
      return;
    }
    const uint64_t rows = slot.tokens;
    switch (slot.op) {
      case EXPERTD_OP_DISPATCH:
        move(slot, EXPERTD_IN_X, EXPERTD_OUT_X, rows * slot.row_bytes);
        move(slot, EXPERTD_IN_TOPK_IDX, EXPERTD_OUT_TOPK_IDX, rows * slot.top_k * slot.topk_idx_bytes);
        move(slot, EXPERTD_IN_TOPK_WEIGHTS, EXPERTD_OUT_TOPK_WEIGHTS, rows * slot.top_k * 4);
        completion->recv_rows = slot.tokens;
        completion->expert_count_entries = 1;
        completion->expert_counts[0] = slot.tokens;
        break;
      case EXPERTD_OP_LL_DISPATCH:
        move(slot, EXPERTD_IN_X, EXPERTD_OUT_X, rows * slot.row_bytes);
        completion->expert_count_entries = 1;
        completion->expert_counts[0] = slot.tokens;
        break;
      case EXPERTD_OP_COMBINE:
      case EXPERTD_OP_LL_COMBINE:
        move(slot, EXPERTD_IN_X, EXPERTD_OUT_X, rows * slot.row_bytes);
        move(slot, EXPERTD_IN_TOPK_WEIGHTS, EXPERTD_OUT_TOPK_WEIGHTS, rows * slot.top_k * 4);
        break;
      default:
        break;
    }
  }

  uint32_t grant_locked(int fd, uint64_t offset, uint64_t bytes) {
    void* data = mmap(nullptr, offset + bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    regions_[++buffer_] = {static_cast<char*>(data) + offset, bytes};
    return buffer_;
  }

  uint64_t put_window(int fd) {
    window_fds_[++token_] = fd;
    return token_;
  }

  grpc::Status OpenSession(grpc::ServerContext*, const v1::OpenSessionRequest*,
                           v1::OpenSessionResponse* response) override {
    response->set_session_id(session_);
    response->set_daemon_version("fake");
    return grpc::Status::OK;
  }

  grpc::Status CreateWindow(grpc::ServerContext*, const v1::CreateWindowRequest* request,
                            v1::CreateWindowResponse* response) override {
    const std::lock_guard lock(mutex_);
    const uint64_t bytes = (request->size() + 4095) & ~uint64_t{4095};
    response->set_size(bytes);
    response->set_fd_token(put_window(make_memfd(bytes)));
    response->set_buffer_id(grant_locked(window_fds_[token_], 0, bytes));
    return grpc::Status::OK;
  }

  grpc::Status RegisterBuffer(grpc::ServerContext*, const v1::RegisterBufferRequest* request,
                              v1::RegisterBufferResponse* response) override {
    const std::lock_guard lock(mutex_);
    const auto found = put_fds_.find(request->fd_token());
    if (found == put_fds_.end()) {
      return {grpc::StatusCode::NOT_FOUND, "no such token"};
    }
    response->set_buffer_id(grant_locked(found->second, request->offset(), request->size()));
    close(found->second);
    put_fds_.erase(found);
    return grpc::Status::OK;
  }

  grpc::Status UnregisterBuffer(grpc::ServerContext*, const v1::UnregisterBufferRequest* request,
                                v1::UnregisterBufferResponse*) override {
    const std::lock_guard lock(mutex_);
    regions_.erase(request->buffer_id());
    return grpc::Status::OK;
  }

  grpc::Status JoinGroup(grpc::ServerContext*, const v1::JoinGroupRequest* request,
                         v1::JoinGroupResponse* response) override {
    const std::lock_guard lock(mutex_);
    if (!join_error_text_.empty()) {
      return {grpc::StatusCode::FAILED_PRECONDITION, join_error_text_,
              status_details("type.googleapis.com/expertd.v1.ErrorInfo", join_error_.SerializeAsString())};
    }
    response->set_group_id(++group_);
    response->set_epoch(1);
    response->set_op_timeout_ns(2'000'000'000);
    response->set_first_op_timeout_ns(4'000'000'000);
    config_ = request->config();
    response->MergeFrom(grant_);
    if (grant_.exchange_size() != 0) {
      response->set_exchange_fd_token(put_window(make_memfd(grant_.exchange_size())));
    }
    if (config_.mode() != v1::GROUP_MODE_NORMAL) {
      const expertd_ll_window_shape shape = {config_.expert_parallel_size(), config_.num_experts(), config_.hidden(),
                                             config_.max_tokens()};
      const uint64_t bytes = expertd_ll_window_place_payloads(&shape, config_.dispatch_dtypes(), 0).total_bytes;
      response->set_window_size(bytes);
      response->set_window_fd_token(put_window(make_memfd(bytes)));
      response->set_window_buffer_id(grant_locked(window_fds_[token_], 0, bytes));
    }
    return grpc::Status::OK;
  }

  grpc::Status LeaveGroup(grpc::ServerContext*, const v1::LeaveGroupRequest*, v1::LeaveGroupResponse*) override {
    return grpc::Status::OK;
  }

  grpc::Status GroupMask(grpc::ServerContext*, const v1::GroupMaskRequest* request,
                         v1::GroupMaskResponse* response) override {
    response->set_epoch(3);
    response->set_excluded(request->exclude());
    *response->mutable_excluded_more() = request->exclude_more();
    response->set_lost(request->readmit());
    *response->mutable_lost_more() = request->readmit_more();
    return grpc::Status::OK;
  }

  grpc::Status PlanGroup(grpc::ServerContext*, const v1::PlanGroupRequest* request,
                         v1::PlanGroupResponse* response) override {
    response->set_worst_rows(uint64_t{request->config().expert_parallel_size()} * request->config().max_tokens());
    response->set_handles(9);
    response->set_pinned_bytes(1ULL << 33);
    return grpc::Status::OK;
  }

  static constexpr uint64_t kRingBytes =
      EXPERTD_RING_HEADER_BYTES + kSlots * (EXPERTD_SLOT_BYTES + EXPERTD_COMPLETION_BYTES);

  std::string directory_;
  std::string path_;
  int stop_ = -1;
  int listener_ = -1;
  std::unique_ptr<grpc::Server> server_;
  std::thread thread_;
  std::atomic<bool> held_{false};
  std::atomic<bool> crash_{false};
  std::atomic<uint64_t> wakes_{0};
  std::atomic<uint16_t> abi_minor_{EXPERTD_ABI_MINOR};
  std::mutex mutex_;
  int wake_ = -1;
  char* ring_ = nullptr;
  uint64_t done_ = 0;
  uint64_t session_ = 0;
  uint64_t group_ = 0;
  uint64_t token_ = 0;
  uint32_t buffer_ = 0;
  std::atomic<uint32_t> captured_{0};
  std::map<uint64_t, int> put_fds_;
  std::map<uint64_t, int> window_fds_;
  std::map<uint32_t, Region> regions_;
  std::vector<expertd_slot> seen_;
  Script script_;
  std::pair<int32_t, std::string> refusal_;
  v1::GroupConfig config_;
  v1::JoinGroupResponse grant_;
  v1::ErrorInfo join_error_;
  std::string join_error_text_;
};

}  // namespace expertd::test
