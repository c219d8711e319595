// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_check.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "client/ctl/exit_codes.h"

namespace expertd::ctl {

namespace {

/// "0x" and the element as one little-endian number.
std::string hex(const uint8_t* element, uint32_t bytes) {
  std::string text = "0x";
  for (uint32_t i = bytes; i > 0; --i) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", element[i - 1]);
    text += digits;
  }
  return text;
}

}  // namespace

void BenchCheck::fail(const std::string& what) const {
  throw Failure(kExitCheckFailed, "wrong output: " + operation_ + ", iteration " + std::to_string(iteration_) +
                                      ", rank " + std::to_string(rank_) + ": " + what);
}

void BenchCheck::row(const char* tensor, uint64_t row, const void* got, const void* expected, uint64_t bytes,
                     uint32_t element_bytes) const {
  if (std::memcmp(got, expected, bytes) == 0) {
    return;
  }
  const auto* const left = static_cast<const uint8_t*>(got);
  const auto* const right = static_cast<const uint8_t*>(expected);
  const auto at = static_cast<uint64_t>(std::mismatch(left, left + bytes, right).first - left) / element_bytes;
  fail(std::string(tensor) + " row " + std::to_string(row) + " element " + std::to_string(at) + ": got " +
       hex(left + at * element_bytes, element_bytes) + ", expected " + hex(right + at * element_bytes, element_bytes));
}

void BenchCheck::untouched_row(const char* tensor, uint64_t row, const uint8_t* got, uint64_t bytes) const {
  // Equal to its own shift by one: every byte is the first.
  if (bytes == 0 || (got[0] == kPoison && std::memcmp(got, got + 1, bytes - 1) == 0)) {
    return;
  }
  const uint8_t* const found = std::find_if(got, got + bytes, [](uint8_t value) { return value != kPoison; });
  fail(std::string(tensor) + " row " + std::to_string(row) + " byte " + std::to_string(found - got) +
       ": was written (" + hex(found, 1) + "), expected to be left alone");
}

void BenchCheck::untouched(const char* name, const BenchTensor& tensor, uint64_t first, uint64_t count) const {
  if (tensor.known_to_hold(first, count, kPoison)) {
    return;
  }
  tensor.read_rows(first, count,
                   [&](uint64_t at, const uint8_t* got) { untouched_row(name, at, got, tensor.row_bytes()); });
}

void BenchCheck::number(const char* name, uint64_t got, uint64_t expected) const {
  if (got != expected) {
    fail(std::string(name) + ": got " + std::to_string(got) + ", expected " + std::to_string(expected));
  }
}

}  // namespace expertd::ctl
