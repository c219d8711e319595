// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_input.h"

#include <algorithm>
#include <cstring>

namespace expertd::ctl {

namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
// Any sign, exponents 120 to 127, any mantissa: sizes from 2^-7 to 2.
constexpr uint64_t kBf16Kept = 0x83ff83ff83ff83ff;
constexpr uint64_t kBf16Set = 0x3c003c003c003c00;

/// The finaliser of SplitMix64.
uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

void fill(uint64_t key, uint64_t kept, uint64_t set, std::span<uint8_t> out) {
  size_t at = 0;
  for (uint64_t word = 1; at < out.size(); ++word, at += sizeof(uint64_t)) {
    const uint64_t value = (mix(key + word * kGolden) & kept) | set;
    std::memcpy(out.data() + at, &value, std::min(sizeof(value), out.size() - at));
  }
}

}  // namespace

BenchInput::BenchInput(uint64_t seed, uint32_t iteration, const BenchExpertGroups& groups)
    : base_(mix(mix(seed + kGolden) + iteration)), groups_(groups) {}

uint64_t BenchInput::key(BenchStream stream, uint64_t owner, uint64_t row) const {
  return mix(mix(mix(base_ + static_cast<uint64_t>(stream)) + owner * kGolden) + row * kGolden);
}

void BenchInput::bf16_row(BenchStream stream, uint64_t owner, uint64_t row, std::span<uint16_t> out) const {
  const auto bytes = std::as_writable_bytes(out);
  fill(key(stream, owner, row), kBf16Kept, kBf16Set, {reinterpret_cast<uint8_t*>(bytes.data()), bytes.size()});
}

void BenchInput::byte_row(BenchStream stream, uint64_t owner, uint64_t row, std::span<uint8_t> out) const {
  fill(key(stream, owner, row), ~uint64_t{0}, 0, out);
}

float BenchInput::weight(BenchStream stream, uint64_t owner, uint64_t row, uint64_t lane) const {
  const uint64_t bits = mix(key(stream, owner, row) + (lane + 1) * kGolden) >> 40;
  return static_cast<float>(bits + 1) * 0x1p-24f;
}

uint64_t BenchInput::groups_of(uint64_t start) const {
  if (!groups_.limited()) {
    return ~uint64_t{0};
  }
  uint64_t chosen = 0;
  uint64_t draw = 0;
  for (uint32_t picked = 0; picked < groups_.per_token;) {
    const uint64_t high = mix(mix(start) + ++draw * kGolden) >> 32;
    const uint64_t bit = uint64_t{1} << ((high * groups_.count) >> 32);
    picked += (chosen & bit) == 0 ? 1 : 0;
    chosen |= bit;
  }
  return chosen;
}

void BenchInput::experts_of(uint64_t owner, uint64_t token, uint64_t tokens, uint32_t experts,
                            std::span<int32_t> out) const {
  const uint64_t start = key(BenchStream::kRouting, owner, token);
  const uint64_t groups = groups_of(start);
  const uint32_t per_group = experts / groups_.count;
  uint64_t draw = 0;
  for (size_t lane = 0; lane < out.size(); ++lane) {
    int32_t expert = -1;
    do {
      const uint64_t high = mix(start + ++draw * kGolden) >> 32;
      expert = static_cast<int32_t>((high * experts) >> 32);
    } while ((groups >> (static_cast<uint32_t>(expert) / per_group) & 1) == 0 ||
             std::find(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(lane), expert) !=
                 out.begin() + static_cast<std::ptrdiff_t>(lane));
    out[lane] = expert;
  }
  if (tokens > 1 && token + 1 == tokens) {
    std::fill(out.begin(), out.end(), -1);
  }
  if (tokens > 2 && token + 2 == tokens) {
    out[0] = -1;
  }
}

}  // namespace expertd::ctl
