// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>

#include <algorithm>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/experts.h"

namespace expertd::bench {

namespace {

constexpr uint64_t kElementBytes = sizeof(__nv_bfloat16);
constexpr uint32_t kThreads = 256;

// A block per row of a matrix: one where row and column are the same channel, else nothing.
__global__ void fill_selection(__nv_bfloat16* matrices, uint32_t rows, uint32_t columns) {
  const uint32_t row = blockIdx.x % rows;
  for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
    matrices[uint64_t{blockIdx.x} * columns + column] = __float2bfloat16(row == column ? 1.0f : 0.0f);
  }
}

bool uniform(const std::vector<ExpertRows>& rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].count != rows[0].count || rows[i].first != rows[0].first + i * (rows[1].first - rows[0].first)) {
      return false;
    }
  }
  return true;
}

}  // namespace

Experts::Experts(const Cublas& cublas, uint32_t experts, uint32_t hidden, uint64_t rows)
    : cublas_(cublas),
      hidden_(hidden),
      up_(uint64_t{experts} * kInner * hidden * kElementBytes),
      down_(uint64_t{experts} * hidden * kInner * kElementBytes),
      between_(rows * kInner * kElementBytes) {
  fill_selection<<<experts * kInner, kThreads>>>(up_.as<__nv_bfloat16>(), kInner, hidden);
  fill_selection<<<experts * hidden, kThreads>>>(down_.as<__nv_bfloat16>(), hidden, kInner);
  check_cuda(cudaGetLastError(), "filling the experts");
  check_cuda(cudaStreamSynchronize(nullptr), "filling the experts");
}

void Experts::enqueue(const void* x, void* y, const std::vector<ExpertRows>& rows, cudaStream_t stream) const {
  const auto* const in = static_cast<const __nv_bfloat16*>(x);
  auto* const out = static_cast<__nv_bfloat16*>(y);
  auto* const between = between_.as<__nv_bfloat16>();
  const uint64_t matrix = uint64_t{kInner} * hidden_;
  const auto up = [&](size_t expert) {
    const ExpertRows& at = rows[expert];
    return Product{.rows = at.count,
                   .columns = kInner,
                   .inner = hidden_,
                   .left = in + at.first * hidden_,
                   .right = up_.as<__nv_bfloat16>() + expert * matrix,
                   .product = between + at.first * kInner};
  };
  const auto down = [&](size_t expert) {
    const ExpertRows& at = rows[expert];
    return Product{.rows = at.count,
                   .columns = hidden_,
                   .inner = kInner,
                   .left = between + at.first * kInner,
                   .right = down_.as<__nv_bfloat16>() + expert * matrix,
                   .product = out + at.first * hidden_};
  };
  if (rows.size() > 1 && rows[0].count != 0 && uniform(rows)) {
    const uint64_t step = rows[1].first - rows[0].first;
    const auto count = static_cast<uint32_t>(rows.size());
    cublas_.multiply_batch(up(0), {step * hidden_, matrix, step * kInner}, count, stream);
    cublas_.multiply_batch(down(0), {step * kInner, matrix, step * hidden_}, count, stream);
    return;
  }
  for (size_t expert = 0; expert < rows.size(); ++expert) {
    if (rows[expert].count != 0) {
      cublas_.multiply(up(expert), stream);
      cublas_.multiply(down(expert), stream);
    }
  }
}

}  // namespace expertd::bench
