// SPDX-License-Identifier: Apache-2.0
// Goal: the client's half of the ring protocol: what is accepted as a ring, publishing and waking, waiting and its
// ends. Method: a ring in a memfd of the test, whose other half the test plays.
#include "client/src/ring_client.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "client/src/clock.h"

namespace expertd::client {
namespace {

constexpr uint32_t kSlots = 8;
constexpr uint64_t kRingBytes = EXPERTD_RING_HEADER_BYTES + kSlots * (EXPERTD_SLOT_BYTES + EXPERTD_COMPLETION_BYTES);
constexpr uint64_t kPatienceNs = 20 * kNsPerS;

class ClientRing : public ::testing::Test {
 protected:
  ClientRing() : fd_(memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING)), wake_(eventfd(0, EFD_NONBLOCK)) {
    EXPECT_EQ(0, ftruncate(fd_.get(), static_cast<off_t>(kRingBytes)));
    memory_ = static_cast<char*>(mmap(nullptr, kRingBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0));
    header()->magic = EXPERTD_RING_MAGIC;
    header()->abi_major = EXPERTD_ABI_MAJOR;
    header()->slot_count = kSlots;
    header()->slot_bytes = EXPERTD_SLOT_BYTES;
    header()->completion_bytes = EXPERTD_COMPLETION_BYTES;
    header()->slots_offset = EXPERTD_RING_HEADER_BYTES;
    header()->completions_offset = EXPERTD_RING_HEADER_BYTES + kSlots * EXPERTD_SLOT_BYTES;
  }
  ~ClientRing() override { munmap(memory_, kRingBytes); }

  void seal() { EXPECT_EQ(0, fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK)); }
  Status open() { return RingClient::open(fd_, kRingBytes, wake_.get(), &ring_); }
  void open_sealed() {
    seal();
    const Status status = open();
    ASSERT_TRUE(status.ok()) << status.text;
  }
  expertd_ring_header* header() { return reinterpret_cast<expertd_ring_header*>(memory_); }
  expertd_completion* completion(uint64_t seq) {
    return reinterpret_cast<expertd_completion*>(memory_ + header()->completions_offset) + (seq - 1) % kSlots;
  }
  void complete(uint64_t seq) { std::atomic_ref<uint64_t>(completion(seq)->seq).store(seq, std::memory_order_release); }
  void submit() {
    expertd_slot slot{};
    slot.seq = ring_->next_seq();
    slot.op = EXPERTD_OP_BARRIER;
    ring_->submit(slot);
  }
  bool woken() {
    uint64_t count = 0;
    return read(wake_.get(), &count, sizeof(count)) == static_cast<ssize_t>(sizeof(count));
  }

  OwnedFd fd_;
  OwnedFd wake_;
  char* memory_ = nullptr;
  std::unique_ptr<RingClient> ring_;
};

TEST_F(ClientRing, RefusesARingThatCanShrink) {
  EXPECT_EQ(EXPERTD_REASON_UNSEALED_MEMORY, open().reason);
}

TEST_F(ClientRing, RefusesEveryBrokenGeometry) {
  seal();
  const expertd_ring_header good = *header();
  const std::function<void(expertd_ring_header*)> breaks[] = {
      [](auto* h) { h->magic = 1; },
      [](auto* h) { h->abi_major = 2; },
      [](auto* h) { h->slot_count = 0; },
      [](auto* h) { h->slot_count = 12; },
      [](auto* h) { h->slot_count = 128; },
      [](auto* h) { h->slot_count = 64; },
      [](auto* h) { h->slot_bytes = 256; },
      [](auto* h) { h->completion_bytes = 1; },
      [](auto* h) { h->slots_offset = 0; },
      [](auto* h) { h->slots_offset = UINT64_MAX - 127; },
      [](auto* h) { h->completions_offset = kRingBytes; },
      [](auto* h) { h->completions_offset += 8; },
  };
  for (const auto& break_it : breaks) {
    break_it(header());
    EXPECT_EQ(EXPERTD_REASON_PROTOCOL_VERSION, open().reason);
    *header() = good;
  }
  EXPECT_TRUE(open().ok());
}

TEST_F(ClientRing, PublishesASlotAndWakesOnlyASleepingDaemon) {
  open_sealed();
  submit();
  EXPECT_EQ(1u, header()->submit_tail);
  EXPECT_FALSE(woken());
  header()->daemon_sleeping = 1;
  submit();
  EXPECT_EQ(2u, header()->submit_tail);
  EXPECT_TRUE(woken());
  const auto* slots = reinterpret_cast<const expertd_slot*>(memory_ + header()->slots_offset);
  EXPECT_EQ(1u, slots[0].seq);
  EXPECT_EQ(2u, slots[1].seq);
}

TEST_F(ClientRing, FreesASlotOnlyWithItsCompletion) {
  open_sealed();
  for (uint32_t i = 0; i < kSlots; ++i) {
    EXPECT_TRUE(ring_->next_slot_free());
    submit();
  }
  EXPECT_FALSE(ring_->next_slot_free());
  complete(2);
  EXPECT_FALSE(ring_->next_slot_free()) << "the next operation takes the place of the first";
  complete(1);
  EXPECT_TRUE(ring_->next_slot_free());
}

TEST_F(ClientRing, TakesACompletionOnlyWithItsOwnSequence) {
  open_sealed();
  submit();
  expertd_completion seen;
  EXPECT_FALSE(ring_->try_read(1, &seen));
  completion(1)->seq = 1 + kSlots;
  EXPECT_FALSE(ring_->try_read(1, &seen));
  completion(1)->expert_count_entries = 1000;
  complete(1);
  ASSERT_TRUE(ring_->try_read(1, &seen));
  EXPECT_EQ(EXPERTD_COMPLETION_EXPERTS, seen.expert_count_entries) << "no number of the daemon leads out of the table";
}

TEST_F(ClientRing, EndsAWaitWhenALaterOperationHasCompletedInTheSlot) {
  open_sealed();
  for (uint32_t i = 0; i < kSlots; ++i) {
    submit();
  }
  complete(1);
  submit();
  complete(1 + kSlots);
  EXPECT_EQ(WaitEnd::kComplete, ring_->wait(1, deadline_after(kNsPerS))) << "the words of a slot never go back";
  expertd_completion seen;
  EXPECT_FALSE(ring_->try_read(1, &seen)) << "but what is there belongs to the later one";
  EXPECT_FALSE(ring_->has_ended(2));
}

TEST_F(ClientRing, TakesNoCompletionOfAnOperationThatWasNotIssued) {
  open_sealed();
  submit();
  submit();
  for (const uint64_t seq : {uint64_t{2}, uint64_t{1 + kSlots}, UINT64_MAX}) {
    completion(1)->seq = seq;
    EXPECT_EQ(WaitEnd::kDeadline, ring_->wait(1, deadline_after(kNsPerMs))) << seq;
  }
}

TEST_F(ClientRing, EndsAWaitAtItsDeadline) {
  open_sealed();
  submit();
  EXPECT_EQ(WaitEnd::kDeadline, ring_->wait(1, deadline_after(kNsPerMs)));
  EXPECT_EQ(0u, header()->client_waiters);
}

TEST_F(ClientRing, CountsACompletionThatCameWithTheEnd) {
  open_sealed();
  submit();
  WaitEnd end = WaitEnd::kDeadline;
  std::thread waiter([&] { end = ring_->wait(1, deadline_after(kPatienceNs)); });
  // The waiter announces itself before it sleeps.
  while (std::atomic_ref<uint32_t>(header()->client_waiters).load() == 0) {
    std::this_thread::yield();
  }
  complete(1);
  ring_->close();
  waiter.join();
  EXPECT_EQ(WaitEnd::kComplete, end) << "a completion that is there counts, also when the lease is over";
}

TEST_F(ClientRing, EndsEveryWaitWhenTheLeaseIsOver) {
  open_sealed();
  submit();
  submit();
  WaitEnd ends[2] = {WaitEnd::kDeadline, WaitEnd::kDeadline};
  std::thread first([&] { ends[0] = ring_->wait(1, deadline_after(kPatienceNs)); });
  std::thread second([&] { ends[1] = ring_->wait(2, deadline_after(kPatienceNs)); });
  while (std::atomic_ref<uint32_t>(header()->client_waiters).load() < 2) {
    std::this_thread::yield();
  }
  ring_->close();
  first.join();
  second.join();
  EXPECT_EQ(WaitEnd::kClosed, ends[0]);
  EXPECT_EQ(WaitEnd::kClosed, ends[1]);
  EXPECT_EQ(WaitEnd::kClosed, ring_->wait(2, deadline_after(kPatienceNs)));
}

TEST_F(ClientRing, EndsWaitsWhenTheDaemonClosesTheSession) {
  open_sealed();
  submit();
  header()->session_flags = EXPERTD_SESSION_CLOSED;
  EXPECT_EQ(WaitEnd::kClosed, ring_->wait(1, deadline_after(kPatienceNs)));
  EXPECT_EQ(EXPERTD_REASON_NONE, ring_->end_reason());
}

TEST_F(ClientRing, TellsWhyTheDaemonEndsAndTakesNoOtherNumberForAReason) {
  open_sealed();
  header()->end_reason = EXPERTD_REASON_GPU_LOST;
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, ring_->end_reason());
  for (const uint32_t nonsense : {9999U, 0x80000000U, UINT32_MAX}) {
    header()->end_reason = nonsense;
    EXPECT_EQ(EXPERTD_REASON_NONE, ring_->end_reason()) << nonsense;
  }
}

}  // namespace
}  // namespace expertd::client
