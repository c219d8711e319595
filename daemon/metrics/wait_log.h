// SPDX-License-Identifier: Apache-2.0
// WaitLog: for whom the last operations of one device's ranks waited. The device's loop writes, without a lock and
// without taking memory; any thread reads what is whole. Owned by Blocks.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace expertd::metrics {

/// One operation as one of its ranks saw it.
struct WaitRecord {
  uint64_t group = 0;   // this daemon's id of it
  uint64_t number = 0;  // of the operation in its group
  uint32_t op = 0;      // expertd_op
  uint32_t rank = 0;    // who saw it
  uint32_t last_rank = 0;
  uint64_t waited_ns = 0;  // for last_rank, by `rank`
  bool counts = false;     // arrivals of counts were seen, and not submissions alone
};

class WaitLog {
 public:
  static constexpr size_t kRecords = 1024;

  /// Loop thread.
  void add(const WaitRecord& record) {
    Place& place = places_[next_ % kRecords];
    // Acquire keeps the stores below behind it: a reader that finds one of them finds the place unfinished too.
    place.turn.exchange(0, std::memory_order_acq_rel);
    place.group.store(record.group, std::memory_order_release);
    place.number.store(record.number, std::memory_order_release);
    place.who.store(uint64_t{record.counts} << 32 | record.op << 16 | record.rank << 8 | record.last_rank,
                    std::memory_order_release);
    place.waited_ns.store(record.waited_ns, std::memory_order_release);
    place.turn.store(++next_, std::memory_order_release);
    newest_.store(next_, std::memory_order_release);  // pairs with last()
  }

  /// The last `most` records, oldest first; those that are being overwritten are left out. Any thread.
  std::vector<WaitRecord> last(size_t most) const {
    const uint64_t end = newest_.load(std::memory_order_acquire);
    const uint64_t count = std::min<uint64_t>({end, most, kRecords});
    std::vector<WaitRecord> records;
    for (uint64_t turn = end - count + 1; turn <= end; ++turn) {
      if (const std::optional<WaitRecord> record = read(turn); record.has_value()) {
        records.push_back(*record);
      }
    }
    return records;
  }

 private:
  /// Numbers on their own; `turn` says whose they are, from 1, and is 0 while they are written.
  struct Place {
    std::atomic<uint64_t> turn{0};
    std::atomic<uint64_t> group{0};
    std::atomic<uint64_t> number{0};
    std::atomic<uint64_t> who{0};  // counts, op, rank, last rank
    std::atomic<uint64_t> waited_ns{0};
  };

  std::optional<WaitRecord> read(uint64_t turn) const {
    const Place& place = places_[(turn - 1) % kRecords];
    if (place.turn.load(std::memory_order_acquire) != turn) {
      return std::nullopt;
    }
    WaitRecord record;
    // Acquire keeps the second look at the turn behind these.
    record.group = place.group.load(std::memory_order_acquire);
    record.number = place.number.load(std::memory_order_acquire);
    const uint64_t who = place.who.load(std::memory_order_acquire);
    record.waited_ns = place.waited_ns.load(std::memory_order_acquire);
    record.counts = (who >> 32 & 1) != 0;
    record.op = who >> 16 & 0xff;
    record.rank = who >> 8 & 0xff;
    record.last_rank = who & 0xff;
    return place.turn.load(std::memory_order_acquire) == turn ? std::optional(record) : std::nullopt;
  }

  std::array<Place, kRecords> places_{};
  uint64_t next_ = 0;  // the loop's
  std::atomic<uint64_t> newest_{0};
};

}  // namespace expertd::metrics
