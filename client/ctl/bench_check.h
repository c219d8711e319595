// SPDX-License-Identifier: Apache-2.0
// Comparison of outputs, bit for bit; a difference is thrown as Failure that names operation, rank, tensor, row,
// element, value and expectation. Belongs to a rank's thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "client/ctl/bench_rank.h"

namespace expertd::ctl {

class BenchCheck {
 public:
  BenchCheck(std::string operation, uint32_t rank) : operation_(std::move(operation)), rank_(rank) {}

  void set_iteration(uint32_t iteration) { iteration_ = iteration; }

  /// One row, in elements of element_bytes.
  void row(const char* tensor, uint64_t row, const void* got, const void* expected, uint64_t bytes,
           uint32_t element_bytes) const;
  /// A row that nobody was to write.
  void untouched_row(const char* tensor, uint64_t row, const uint8_t* got, uint64_t bytes) const;
  void untouched(const char* name, const BenchTensor& tensor, uint64_t first, uint64_t count) const;
  /// A whole small tensor of rows of `columns` elements.
  template <typename T>
  void all(const char* name, const BenchTensor& tensor, const std::vector<T>& expected, uint64_t columns) const {
    const std::vector<T> got = tensor.read_all<T>();
    same(name, std::span<const T>(got), std::span<const T>(expected), columns);
  }
  template <typename T>
  void same(const char* name, std::span<const T> got, std::span<const T> expected, uint64_t columns) const {
    number(name, got.size(), expected.size());
    for (uint64_t at = 0; at < expected.size(); at += columns) {
      row(name, at / columns, got.data() + at, expected.data() + at, columns * sizeof(T), sizeof(T));
    }
  }
  void number(const char* name, uint64_t got, uint64_t expected) const;
  /// Throws; `what` says the rest.
  [[noreturn]] void fail(const std::string& what) const;

 private:
  const std::string operation_;
  const uint32_t rank_;
  uint32_t iteration_ = 0;
};

}  // namespace expertd::ctl
