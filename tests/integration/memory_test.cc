// SPDX-License-Identifier: Apache-2.0
// Memory of sessions: windows, registered descriptors, what is refused, and that sessions cannot reach each other's.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "tests/integration/raw_rpc.h"
#include "tests/support/daemon_process.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr uint64_t kPage = 4096;

class SessionMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    session_ = ClientSession(daemon_.attach_socket(), "host:0");
    ASSERT_TRUE(session_.ok()) << describe(session_.attached());
  }

  Outcome create_window(uint64_t bytes, expertd_buffer_t** buffer) {
    return outcome_of(expertd_window_create(session_.get(), bytes, buffer));
  }
  Outcome register_fd(int fd, uint64_t offset, uint64_t bytes, expertd_buffer_t** buffer) {
    return outcome_of(expertd_register_fd(session_.get(), fd, offset, bytes, buffer));
  }
  double window_bytes() { return daemon_.metric("expertd_pool_bytes{gpu=\"host\",state=\"used\"}"); }

  DaemonProcess daemon_{
      2, {"--session-max-buffers=8", "--session-max-window-bytes=16MiB", "--session-max-registered-bytes=4GiB"}};
  ClientSession session_;
};

TEST_F(SessionMemory, AWindowIsMappedZeroedAndWritable) {
  expertd_buffer_t* window = nullptr;
  ASSERT_TRUE(create_window(3 * kPage, &window).ok());
  ASSERT_GE(expertd_buffer_bytes(window), 3 * kPage);
  auto* bytes = static_cast<uint8_t*>(expertd_buffer_data(window));
  for (uint64_t i = 0; i < 3 * kPage; ++i) {
    ASSERT_EQ(bytes[i], 0) << i;
  }
  std::memset(bytes, 0x5a, 3 * kPage);
  EXPECT_TRUE(outcome_of(expertd_buffer_release(window)).ok());
}

TEST_F(SessionMemory, ReleasingAWindowGivesItsBytesBack) {
  const double before = window_bytes();
  expertd_buffer_t* window = nullptr;
  ASSERT_TRUE(create_window(1 << 20, &window).ok());
  EXPECT_GE(window_bytes(), before + (1 << 20));
  EXPECT_TRUE(outcome_of(expertd_buffer_release(window)).ok());
  EXPECT_EQ(window_bytes(), before);
}

TEST_F(SessionMemory, WindowBytesAreLimitedAndTheLimitIsNamed) {
  expertd_buffer_t* window = nullptr;
  const Outcome outcome = create_window(17 << 20, &window);
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_POOL_EXHAUSTED);
  EXPECT_NE(outcome.message.find("session.max_window_bytes"), std::string::npos) << outcome.message;
  EXPECT_EQ(window, nullptr);
  EXPECT_TRUE(create_window(1 << 20, &window).ok()) << "a refusal must not use the limit up";
}

TEST_F(SessionMemory, RegisteredBytesAreLimitedAndTheLimitIsNamed) {
  constexpr uint64_t kSparse = 3ULL << 30;  // no page of it exists
  expertd_buffer_t* first = nullptr;
  expertd_buffer_t* second = nullptr;
  const int fd = make_memfd(kSparse, true);
  EXPECT_TRUE(register_fd(fd, 0, kSparse, &first).ok());
  Outcome outcome = register_fd(fd, 0, kSparse, &second);
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_BUFFER_LIMIT);
  EXPECT_NE(outcome.message.find("session.max_registered_bytes"), std::string::npos) << outcome.message;
  EXPECT_TRUE(create_window(16 << 20, &second).ok()) << "registered memory is not counted as windows";
  EXPECT_TRUE(outcome_of(expertd_buffer_release(first)).ok());
  EXPECT_TRUE(register_fd(fd, 0, kSparse, &first).ok()) << "releasing a buffer gives its bytes back";
  ::close(fd);
}

TEST_F(SessionMemory, RegisteredMemoryDoesNotUseTheLimitOfWindowsUp) {
  const int fd = make_memfd(15 << 20, true);
  expertd_buffer_t* buffer = nullptr;
  ASSERT_TRUE(register_fd(fd, 0, 15 << 20, &buffer).ok());
  expertd_buffer_t* window = nullptr;
  EXPECT_TRUE(create_window(10 << 20, &window).ok()) << expertd_last_message();
  EXPECT_EQ(create_window(10 << 20, &window).status.reason, EXPERTD_REASON_POOL_EXHAUSTED);
  ::close(fd);
}

TEST_F(SessionMemory, AWindowOfNoBytesIsRefused) {
  expertd_buffer_t* window = nullptr;
  EXPECT_EQ(create_window(0, &window).status.reason, EXPERTD_REASON_ARGUMENT_RANGE);
}

TEST_F(SessionMemory, ThePoolOfADeviceIsLimited) {
  DaemonProcess small(1, {"--device-pool-max-bytes=4MiB"});
  ASSERT_TRUE(small.start());
  const ClientSession session(small.attach_socket(), "host:0");
  expertd_buffer_t* first = nullptr;
  expertd_buffer_t* second = nullptr;
  EXPECT_TRUE(outcome_of(expertd_window_create(session.get(), 3 << 20, &first)).ok());
  const Outcome outcome = outcome_of(expertd_window_create(session.get(), 2 << 20, &second));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_POOL_EXHAUSTED);
  EXPECT_EQ(expertd_reason_is_retryable(outcome.status.reason), 1);
  const int fd = make_memfd(8 << 20, true);
  expertd_buffer_t* registered = nullptr;
  EXPECT_TRUE(outcome_of(expertd_register_fd(session.get(), fd, 0, 8 << 20, &registered)).ok()) << "no window";
  ::close(fd);
  EXPECT_TRUE(outcome_of(expertd_buffer_release(first)).ok());
  EXPECT_TRUE(outcome_of(expertd_window_create(session.get(), 2 << 20, &second)).ok());
}

TEST_F(SessionMemory, RegisteredMemoryTakesNothingOfThePoolOrOfTheWindowLimit) {
  DaemonProcess small(2, {"--device-pool-max-bytes=4MiB", "--session-max-window-bytes=4MiB"});
  ASSERT_TRUE(small.start());
  const ClientSession session(small.attach_socket(), "host:0");
  const ClientSession neighbour(small.attach_socket(), "host:1");
  void* own = nullptr;
  expertd_buffer_t* window = nullptr;
  EXPECT_TRUE(outcome_of(expertd_alloc(session.get(), 8 << 20, &own)).ok()) << expertd_last_message();
  EXPECT_TRUE(outcome_of(expertd_window_create(session.get(), 3 << 20, &window)).ok()) << expertd_last_message();
  EXPECT_TRUE(outcome_of(expertd_window_create(neighbour.get(), 3 << 20, &window)).ok()) << "a device of its own";
  EXPECT_EQ(small.metric("expertd_pool_bytes{gpu=\"host\",state=\"used\"}"), 6 << 20);
  EXPECT_EQ(small.metric("expertd_pool_bytes{gpu=\"host\",state=\"free\"}"), 2 << 20);
  EXPECT_GE(small.metric("expertd_pool_bytes{gpu=\"host\",state=\"registered\"}"), 8 << 20);
}

TEST_F(SessionMemory, BuffersAreLimitedInNumber) {
  Outcome last;
  for (int i = 0; i < 9 && last.ok(); ++i) {
    void* data = nullptr;
    last = outcome_of(expertd_alloc(session_.get(), kPage, &data));
    EXPECT_EQ(last.ok(), i < 8) << i;
  }
  EXPECT_EQ(last.status.reason, EXPERTD_REASON_BUFFER_LIMIT);
  EXPECT_NE(last.message.find("session.max_buffers"), std::string::npos) << last.message;
}

TEST_F(SessionMemory, AllocatedMemoryIsAlignedAndFreedOnce) {
  void* data = nullptr;
  ASSERT_TRUE(outcome_of(expertd_alloc(session_.get(), 1000, &data)).ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 128, 0u);
  EXPECT_TRUE(outcome_of(expertd_free(session_.get(), data)).ok());
  EXPECT_EQ(expertd_free(session_.get(), data).reason, EXPERTD_REASON_NO_SUCH_BUFFER);
}

TEST_F(SessionMemory, ASealedDescriptorIsRegisteredAndTheCallersOwnStaysHis) {
  const int fd = make_memfd(2 * kPage, true);
  expertd_buffer_t* buffer = nullptr;
  ASSERT_TRUE(register_fd(fd, 0, 2 * kPage, &buffer).ok()) << expertd_last_message();
  void* own = ::mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(own, MAP_FAILED);
  std::memset(own, 0x11, 2 * kPage);
  EXPECT_EQ(static_cast<uint8_t*>(expertd_buffer_data(buffer))[kPage], 0x11);
  EXPECT_TRUE(outcome_of(expertd_buffer_release(buffer)).ok());
  EXPECT_EQ(static_cast<uint8_t*>(own)[0], 0x11);
  ::munmap(own, 2 * kPage);
  ::close(fd);
}

TEST_F(SessionMemory, AnUnsealedDescriptorIsRefused) {
  const int fd = make_memfd(kPage, false);
  expertd_buffer_t* buffer = nullptr;
  EXPECT_EQ(register_fd(fd, 0, kPage, &buffer).status.reason, EXPERTD_REASON_UNSEALED_MEMORY);
  ::close(fd);
}

TEST_F(SessionMemory, ARangeOutsideTheDescriptorIsRefused) {
  const int fd = make_memfd(kPage, true);
  expertd_buffer_t* buffer = nullptr;
  EXPECT_FALSE(register_fd(fd, 0, 2 * kPage, &buffer).ok());
  EXPECT_FALSE(register_fd(fd, UINT64_MAX - 15, 32, &buffer).ok());
  EXPECT_FALSE(register_fd(fd, 8, 64, &buffer).ok()) << "offsets are multiples of 16";
  ::close(fd);
}

TEST_F(SessionMemory, MemoryOfTheHeapCannotBeRegisteredOnAHostDevice) {
  std::vector<uint8_t> bytes(kPage);
  expertd_buffer_t* buffer = nullptr;
  const Outcome outcome = outcome_of(expertd_register(session_.get(), bytes.data(), bytes.size(), &buffer));
  EXPECT_EQ(outcome.status.reason, EXPERTD_REASON_UNSEALED_MEMORY);
  EXPECT_NE(outcome.message.find("expertd_alloc"), std::string::npos) << outcome.message;
}

/// The same rules on the daemon's side, past the client library's own checks.
class RawMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    ASSERT_TRUE(client_.attach(daemon_.attach_socket(), "host:0"));
    rpc_ = std::make_unique<RawRpc>(&client_);
    ASSERT_TRUE(rpc_->open("raw").ok);
  }

  RpcEnd register_raw_fd(int fd, uint64_t offset, uint64_t size) {
    uint32_t reason = 0;
    v1::RegisterBufferRequest request;
    request.set_fd_token(client_.put_fd(fd, &reason));
    EXPECT_EQ(reason, 0u);
    request.set_offset(offset);
    request.set_size(size);
    uint32_t buffer = 0;
    ::close(fd);
    return rpc_->register_buffer(request, &buffer);
  }

  DaemonProcess daemon_;
  RawClient client_;
  std::unique_ptr<RawRpc> rpc_;
};

TEST_F(RawMemory, AnUnsealedDescriptorIsRefusedByTheDaemonToo) {
  const RpcEnd end = register_raw_fd(make_memfd(kPage, false), 0, kPage);
  EXPECT_EQ(end.info.reason_name(), "UNSEALED_MEMORY") << end.message;
}

TEST_F(RawMemory, DescriptorsThatAreNoMemoryAreRefused) {
  int ends[2] = {-1, -1};
  ASSERT_EQ(::pipe(ends), 0);
  const RpcEnd end = register_raw_fd(ends[0], 0, kPage);
  EXPECT_FALSE(end.ok);
  EXPECT_NE(end.info.reason(), 0u) << end.message;
  ::close(ends[1]);
  EXPECT_FALSE(register_raw_fd(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC), 0, kPage).ok);
}

TEST_F(RawMemory, SizesPastTheDescriptorsEndAreRefused) {
  EXPECT_FALSE(register_raw_fd(make_memfd(kPage, true), 0, kPage + 1).ok);
  EXPECT_FALSE(register_raw_fd(make_memfd(kPage, true), 0, 0).ok);
  EXPECT_FALSE(register_raw_fd(make_memfd(kPage, true), UINT64_MAX - 15, 32).ok);
  EXPECT_FALSE(register_raw_fd(make_memfd(kPage, true), 16, UINT64_MAX - 8).ok);
  EXPECT_TRUE(register_raw_fd(make_memfd(kPage, true), 16, kPage - 16).ok);
}

TEST_F(RawMemory, AnOffsetThatIsNotAlignedIsRefused) {
  const RpcEnd end = register_raw_fd(make_memfd(kPage, true), 8, 64);
  EXPECT_EQ(end.info.reason_name(), "UNALIGNED") << end.message;
}

TEST_F(RawMemory, ACudaHandleOnAHostDeviceHasTheWrongKind) {
  v1::RegisterBufferRequest request;
  request.set_cuda_ipc_handle(std::string(64, '\x01'));
  request.set_size(kPage);
  uint32_t buffer = 0;
  const RpcEnd end = rpc_->register_buffer(request, &buffer);
  EXPECT_EQ(end.info.reason_name(), "WRONG_DEVICE_KIND") << end.message;
  EXPECT_EQ(end.code, EXPERTD_CODE_INVALID_ARGUMENT);
}

TEST_F(RawMemory, ACudaHandleOfAWrongSizeIsRefusedNamingTheRightOne) {
  v1::RegisterBufferRequest request;
  request.set_cuda_ipc_handle("short");
  request.set_size(kPage);
  uint32_t buffer = 0;
  const RpcEnd end = rpc_->register_buffer(request, &buffer);
  EXPECT_EQ(end.code, EXPERTD_CODE_OUT_OF_RANGE) << end.message;
  EXPECT_NE(end.message.find("64"), std::string::npos) << end.message;
}

TEST_F(RawMemory, ATokenIsGoodForOneRegistration) {
  uint32_t reason = 0;
  const int fd = make_memfd(kPage, true);
  v1::RegisterBufferRequest request;
  request.set_fd_token(client_.put_fd(fd, &reason));
  request.set_size(kPage);
  ::close(fd);
  uint32_t buffer = 0;
  EXPECT_TRUE(rpc_->register_buffer(request, &buffer).ok);
  EXPECT_EQ(rpc_->register_buffer(request, &buffer).info.reason_name(), "NO_SUCH_TOKEN");
}

TEST_F(RawMemory, TheWindowOfAnotherSessionCannotBeNamed) {
  RawClient other_client;
  ASSERT_TRUE(other_client.attach(daemon_.attach_socket(), "host:0"));
  RawRpc other(&other_client);
  v1::CreateWindowResponse window;
  ASSERT_TRUE(rpc_->create_window(kPage, &window).ok);
  EXPECT_EQ(other.unregister(window.buffer_id()).info.reason_name(), "NO_SUCH_BUFFER");
  // Nor through the ring: a layout that reads from it.
  expertd_slot slot{};
  slot.op = EXPERTD_OP_LAYOUT;
  slot.tokens = 4;
  slot.top_k = 2;
  slot.topk_idx_bytes = 8;
  slot.num_experts = 4;
  slot.num_ranks = 2;
  slot.tensors[EXPERTD_IN_TOPK_IDX].buffer = window.buffer_id();
  const auto refused = other_client.wait(other_client.submit(slot));
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->reason, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_BUFFER));
  const auto allowed = client_.wait(client_.submit(slot));
  ASSERT_TRUE(allowed.has_value());
  EXPECT_EQ(allowed->reason, static_cast<uint32_t>(EXPERTD_REASON_NONE));
}

TEST_F(RawMemory, DescriptorsThatNobodyUsesAreLimited) {
  const int fd = make_memfd(kPage, true);
  uint32_t reason = 0;
  for (int i = 0; i < 64; ++i) {
    ASSERT_NE(client_.put_fd(fd, &reason), 0u) << i;
  }
  EXPECT_EQ(client_.put_fd(fd, &reason), 0u);
  EXPECT_EQ(reason, static_cast<uint32_t>(EXPERTD_REASON_BUFFER_LIMIT));
  ::close(fd);
}

TEST_F(RawMemory, EverythingOfASessionGoesWithIt) {
  const size_t before = daemon_.open_descriptors();
  {
    RawClient client;
    ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
    RawRpc rpc(&client);
    v1::CreateWindowResponse window;
    ASSERT_TRUE(rpc.create_window(1 << 20, &window).ok);
    ASSERT_NE(rpc.register_memfd(1 << 20), 0u);
    uint32_t reason = 0;
    const int fd = make_memfd(kPage, true);
    ASSERT_NE(client.put_fd(fd, &reason), 0u);
    ::close(fd);
    EXPECT_GT(daemon_.open_descriptors(), before);
  }
  EXPECT_TRUE(wait_until([&] { return daemon_.open_descriptors() <= before; }, seconds(5)));
  EXPECT_TRUE(daemon_.metric_becomes("expertd_pool_bytes{gpu=\"host\",", 0)) << "used, registered and quarantined";
}

TEST_F(RawMemory, ACudaHandleOfAClientWithTheDaemonsOwnPidIsRefused) {
  // As two containers are whose main processes both have number 1.
  RawClient twin;
  ASSERT_TRUE(twin.connect(daemon_.attach_socket()));
  expertd_attach_hello hello = make_hello("host:0");
  hello.local_pid = daemon_.pid();
  ASSERT_TRUE(twin.send(&hello, sizeof(hello)));
  const auto welcome = twin.welcome(seconds(5));
  ASSERT_TRUE(welcome.has_value() && welcome->type == EXPERTD_ATTACH_WELCOME);
  RawRpc rpc(&twin);
  ASSERT_TRUE(rpc.open("twin").ok);
  v1::RegisterBufferRequest request;
  request.set_cuda_ipc_handle(std::string(64, 'h'));
  request.set_size(kPage);
  uint32_t buffer = 0;
  const RpcEnd end = rpc.register_buffer(request, &buffer);
  EXPECT_EQ(end.info.reason_name(), "IPC_SAME_PID") << end.message;
  EXPECT_NE(end.message.find(std::to_string(daemon_.pid())), std::string::npos) << end.message;
}

}  // namespace
}  // namespace expertd::support
