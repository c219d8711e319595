// SPDX-License-Identifier: Apache-2.0
// One rank: its session, its group and its tensors in memory that operations reach without a copy, on host devices and
// GPUs alike. Belongs to the rank's thread. Every failure is thrown as Failure with reason and message.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "client/ctl/bench_options.h"
#include "expertd.h"

namespace expertd::ctl {

/// What outputs hold before they are written.
inline constexpr uint8_t kPoison = 0xab;
/// What rows of an input hold that must not be read: a NaN as bf16.
inline constexpr uint8_t kForbidden = 0xff;

class BenchRank {
 public:
  /// Attaches.
  BenchRank(const BenchOptions& options, uint32_t index);
  ~BenchRank();
  BenchRank(const BenchRank&) = delete;
  BenchRank& operator=(const BenchRank&) = delete;

  uint32_t index() const { return index_; }
  expertd_session_t* session() const { return session_; }
  expertd_group_t* group() const { return group_; }
  uint64_t timeout_ns() const { return options_.timeout_ns; }
  /// "host:0" or the GPU's UUID.
  const std::string& device() const { return device_; }
  bool on_gpu() const { return on_gpu_; }
  /// Where operations are issued; null, the default, is the legacy default stream.
  expertd_stream_t stream() const { return stream_; }
  void set_stream(expertd_stream_t stream) { stream_ = stream; }
  /// Fills memory of the device and returns when it is done: (data, value, bytes). Without it the host writes the
  /// bytes, which takes seconds where outputs have gigabytes.
  using Filler = std::function<void(void*, uint8_t, uint64_t)>;
  void set_filler(Filler filler) { filler_ = std::move(filler); }
  const Filler& filler() const { return filler_; }
  /// Whether memory of the device holds nothing but a value: (data, value, bytes). False sends the question to the
  /// host, which reads the bytes and says where they differ.
  using Probe = std::function<bool(const void*, uint8_t, uint64_t)>;
  void set_probe(Probe probe) { probe_ = std::move(probe); }
  const Probe& probe() const { return probe_; }

  expertd_group_plan_t plan(const BenchShape& shape, bool low_latency);
  void join(const std::string& name, const BenchShape& shape, bool low_latency);
  void leave();

  /// Throws unless ok.
  void check(expertd_status_t status, const std::string& what) const;
  expertd_op_result_t wait(expertd_event_t event, const std::string& what) const;

  /// Blocking copies between the host and memory of the device.
  void write(void* destination, const void* source, uint64_t bytes);
  void read(const void* source, void* destination, uint64_t bytes);

 private:
  expertd_group_options_t group_options(const std::string& name, const BenchShape& shape, bool low_latency) const;

  const BenchOptions& options_;
  const uint32_t index_;
  expertd_session_t* session_ = nullptr;
  expertd_group_t* group_ = nullptr;
  expertd_stream_t stream_ = nullptr;
  Filler filler_;
  Probe probe_;
  std::string device_;
  bool on_gpu_ = false;
};

/// Memory of a rank, or a view of the group's window. Rows of `row_bytes`.
class BenchTensor {
 public:
  BenchTensor() = default;
  BenchTensor(BenchRank* rank, uint64_t rows, uint64_t row_bytes);
  ~BenchTensor();
  BenchTensor(BenchTensor&& other) noexcept { swap(&other); }
  BenchTensor& operator=(BenchTensor&& other) noexcept {
    swap(&other);
    return *this;
  }
  static BenchTensor view(BenchRank* rank, void* data, uint64_t rows, uint64_t row_bytes);

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  uint64_t rows() const { return rows_; }
  uint64_t row_bytes() const { return row_bytes_; }

  void fill(uint8_t value) { fill_rows(0, rows_, value); }
  void fill_rows(uint64_t first, uint64_t count, uint8_t value);
  /// The rank has a probe, and it says that these rows hold nothing but the value.
  bool known_to_hold(uint64_t first, uint64_t count, uint8_t value) const {
    return rank_->probe() && rank_->probe()(row(first), value, count * row_bytes_);
  }
  template <typename T>
  void write_all(const std::vector<T>& values) {
    rank_->write(data_, values.data(), values.size() * sizeof(T));
  }
  template <typename T>
  std::vector<T> read_all() const {
    std::vector<T> values(rows_ * row_bytes_ / sizeof(T));
    rank_->read(data_, values.data(), values.size() * sizeof(T));
    return values;
  }
  /// make(row, span of row_bytes) for rows [first, first + count).
  template <typename Make>
  void write_rows(uint64_t first, uint64_t count, Make make);
  /// check(row, pointer to row_bytes) for the same.
  template <typename Check>
  void read_rows(uint64_t first, uint64_t count, Check check) const;

 private:
  static constexpr uint64_t kChunkBytes = 4 << 20;
  uint64_t chunk_rows() const { return std::max<uint64_t>(1, kChunkBytes / std::max<uint64_t>(1, row_bytes_)); }
  uint8_t* row(uint64_t index) const { return static_cast<uint8_t*>(data_) + index * row_bytes_; }
  void swap(BenchTensor* other) noexcept;

  BenchRank* rank_ = nullptr;
  void* data_ = nullptr;
  uint64_t rows_ = 0;
  uint64_t row_bytes_ = 0;
  bool owned_ = false;
};

template <typename Make>
void BenchTensor::write_rows(uint64_t first, uint64_t count, Make make) {
  std::vector<uint8_t> chunk(std::min(chunk_rows(), count) * row_bytes_);
  for (uint64_t done = 0; done < count; done += chunk_rows()) {
    const uint64_t rows = std::min(chunk_rows(), count - done);
    for (uint64_t i = 0; i < rows; ++i) {
      make(first + done + i, std::span<uint8_t>(chunk.data() + i * row_bytes_, row_bytes_));
    }
    rank_->write(row(first + done), chunk.data(), rows * row_bytes_);
  }
}

template <typename Check>
void BenchTensor::read_rows(uint64_t first, uint64_t count, Check check) const {
  std::vector<uint8_t> chunk(std::min(chunk_rows(), count) * row_bytes_);
  for (uint64_t done = 0; done < count; done += chunk_rows()) {
    const uint64_t rows = std::min(chunk_rows(), count - done);
    rank_->read(row(first + done), chunk.data(), rows * row_bytes_);
    for (uint64_t i = 0; i < rows; ++i) {
      check(first + done + i, chunk.data() + i * row_bytes_);
    }
  }
}

/// A row of bytes seen as elements; rows are aligned for every element type.
template <typename T>
std::span<T> elements(std::span<uint8_t> bytes) {
  return {reinterpret_cast<T*>(bytes.data()), bytes.size() / sizeof(T)};
}

}  // namespace expertd::ctl
