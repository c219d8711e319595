// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>

#include <algorithm>
#include <utility>

#include "tests/bench/cuda_check.h"
#include "tests/bench/table/exchange.h"

namespace expertd::bench {

namespace {

constexpr uint32_t kThreads = 256;
constexpr int kPoison = 0xab;
// Of the sums' inputs: small whole numbers, whose sums bf16 holds exactly.
constexpr uint32_t kValues = 8;

__device__ uint32_t word_of(uint32_t rank, uint32_t row, uint32_t word) {
  return (rank * 0x9e3779b9u + row * 0x85ebca6bu + word) * 0xc2b2ae35u;
}

__device__ float value_of(uint32_t rank, uint32_t row) {
  return static_cast<float>((rank * 5 + row) % kValues + 1);
}

// A block per row, 16 bytes per thread and step.
__global__ void copy_rows(const uint4* from, uint4* to, const RowCopy* rows, uint32_t row_words) {
  const RowCopy row = rows[blockIdx.x];
  const uint4* const source = from + uint64_t{row.from} * row_words;
  uint4* const target = to + uint64_t{row.to} * row_words;
  for (uint32_t i = threadIdx.x; i < row_words; i += blockDim.x) {
    target[i] = source[i];
  }
}

// A block per token, 16 bytes per thread and step, sums in float32.
__global__ void add_rows(const uint4* from, uint4* to, const int32_t* terms, const float* weights, uint32_t lanes,
                         uint32_t row_words) {
  const int32_t* const rows = terms + uint64_t{blockIdx.x} * lanes;
  for (uint32_t i = threadIdx.x; i < row_words; i += blockDim.x) {
    float2 sum[4] = {};
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      if (rows[lane] < 0) {
        continue;
      }
      const float weight = weights[uint64_t{blockIdx.x} * lanes + lane];
      const uint4 words = from[static_cast<uint64_t>(rows[lane]) * row_words + i];
      const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&words);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const float2 pair = __bfloat1622float2(pairs[j]);
        sum[j].x += weight * pair.x;
        sum[j].y += weight * pair.y;
      }
    }
    uint4 result;
    auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&result);
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      pairs[j] = __float22bfloat162_rn(sum[j]);
    }
    to[uint64_t{blockIdx.x} * row_words + i] = result;
  }
}

__global__ void fill_words(uint32_t* rows, uint32_t rank, uint32_t row_words) {
  for (uint32_t i = threadIdx.x; i < row_words; i += blockDim.x) {
    rows[uint64_t{blockIdx.x} * row_words + i] = word_of(rank, blockIdx.x, i);
  }
}

__global__ void fill_values(__nv_bfloat16* rows, uint32_t rank, uint32_t columns) {
  for (uint32_t i = threadIdx.x; i < columns; i += blockDim.x) {
    rows[uint64_t{blockIdx.x} * columns + i] = __float2bfloat16(value_of(rank, blockIdx.x));
  }
}

// Origins are {rank, input row}.
__global__ void check_words(const uint32_t* rows, const RowCopy* origins, uint32_t row_words, uint32_t* wrong) {
  const RowCopy origin = origins[blockIdx.x];
  uint32_t differ = 0;
  for (uint32_t i = threadIdx.x; i < row_words; i += blockDim.x) {
    differ |= rows[uint64_t{blockIdx.x} * row_words + i] ^ word_of(origin.from, origin.to, i);
  }
  if (__syncthreads_or(static_cast<int>(differ != 0)) != 0 && threadIdx.x == 0) {
    atomicAdd(wrong, 1u);
  }
}

__global__ void check_sums(const __nv_bfloat16* rows, const RowCopy* origins, const int32_t* terms, uint32_t lanes,
                           uint32_t columns, uint32_t* wrong) {
  float expected = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    const uint64_t at = uint64_t{blockIdx.x} * lanes + lane;
    expected += terms[at] < 0 ? 0.0f : value_of(origins[at].from, origins[at].to);
  }
  bool differs = false;
  for (uint32_t i = threadIdx.x; i < columns; i += blockDim.x) {
    differs = differs || __bfloat162float(rows[uint64_t{blockIdx.x} * columns + i]) != expected;
  }
  if (__syncthreads_or(static_cast<int>(differs)) != 0 && threadIdx.x == 0) {
    atomicAdd(wrong, 1u);
  }
}

uint64_t bytes_of(uint32_t rows, uint32_t row_bytes) {
  return uint64_t{rows} * row_bytes;
}

}  // namespace

DeviceBuffer::DeviceBuffer(uint64_t bytes) {
  constexpr uint64_t kLeast = 16;
  check_cuda(cudaMalloc(&data_, std::max(bytes, kLeast)), "cudaMalloc for the comparison with NCCL");
}

DeviceBuffer::~DeviceBuffer() {
  (void)cudaFree(data_);  // a failure means that the context is lost, and the memory with it
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

void DeviceBuffer::write(const void* data, uint64_t bytes) {
  if (bytes == 0) {
    return;
  }
  check_cuda(cudaMemcpy(data_, data, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

Exchange::Exchange(const Nccl& nccl, uint32_t rank, ExchangePlan plan)
    : nccl_(nccl), rank_(rank), plan_(std::move(plan)) {
  input_ = DeviceBuffer(bytes_of(plan_.input_rows, plan_.row_bytes));
  exchange_ = DeviceBuffer(bytes_of(plan_.exchange_rows, plan_.row_bytes));
  const bool in_place = plan_.unpack.empty() && !plan_.sums();
  output_ = DeviceBuffer(in_place ? 0 : bytes_of(plan_.output_rows, plan_.row_bytes));
  pack_ = DeviceBuffer::of(plan_.pack);
  unpack_ = DeviceBuffer::of(plan_.unpack);
  terms_ = DeviceBuffer::of(plan_.terms);
  weights_ = DeviceBuffer::of(std::vector<float>(plan_.terms.size(), 1.0f));
  origins_ = DeviceBuffer::of(plan_.origins);
  wrong_ = DeviceBuffer(sizeof(uint32_t));
}

void Exchange::enqueue(cudaStream_t stream) const {
  const uint32_t row_words = plan_.row_bytes / 16;
  if (!plan_.pack.empty()) {
    copy_rows<<<static_cast<uint32_t>(plan_.pack.size()), kThreads, 0, stream>>>(
        input_.as<uint4>(), exchange_.as<uint4>(), pack_.as<RowCopy>(), row_words);
  }
  nccl_.group_begin();
  for (uint32_t peer = 0; peer < plan_.send.size(); ++peer) {
    const RowRange& send = plan_.send[peer];
    const RowRange& receive = plan_.receive[peer];
    if (send.count != 0) {
      nccl_.send({rank_, peer}, exchange_.at(bytes_of(send.first, plan_.row_bytes)),
                 bytes_of(send.count, plan_.row_bytes), stream);
    }
    if (receive.count != 0) {
      nccl_.receive({rank_, peer}, exchange_.at(bytes_of(receive.first, plan_.row_bytes)),
                    bytes_of(receive.count, plan_.row_bytes), stream);
    }
  }
  nccl_.group_end();
  if (!plan_.unpack.empty()) {
    copy_rows<<<static_cast<uint32_t>(plan_.unpack.size()), kThreads, 0, stream>>>(
        exchange_.as<uint4>(), output_.as<uint4>(), unpack_.as<RowCopy>(), row_words);
  }
  if (plan_.sums() && plan_.output_rows != 0) {
    add_rows<<<plan_.output_rows, kThreads, 0, stream>>>(
        exchange_.as<uint4>(), output_.as<uint4>(), terms_.as<int32_t>(), weights_.as<float>(), plan_.lanes, row_words);
  }
  check_cuda(cudaGetLastError(), "launch of the kernels around NCCL");
}

void Exchange::prepare() const {
  check_cuda(cudaMemset(exchange_.at(0), kPoison, bytes_of(plan_.exchange_rows, plan_.row_bytes)), "cudaMemset");
  if (plan_.sums() || !plan_.unpack.empty()) {
    check_cuda(cudaMemset(output_.at(0), kPoison, bytes_of(plan_.output_rows, plan_.row_bytes)), "cudaMemset");
  }
  if (plan_.input_rows != 0 && plan_.sums()) {
    fill_values<<<plan_.input_rows, kThreads>>>(input_.as<__nv_bfloat16>(), rank_, plan_.row_bytes / 2);
  } else if (plan_.input_rows != 0) {
    fill_words<<<plan_.input_rows, kThreads>>>(input_.as<uint32_t>(), rank_, plan_.row_bytes / 4);
  }
  check_cuda(cudaGetLastError(), "filling the input of the comparison with NCCL");
  check_cuda(cudaStreamSynchronize(nullptr), "filling the input of the comparison with NCCL");
}

uint64_t Exchange::wrong_rows() const {
  check_cuda(cudaMemset(wrong_.at(0), 0, sizeof(uint32_t)), "cudaMemset");
  const bool in_place = plan_.unpack.empty() && !plan_.sums();
  const uint8_t* const rows =
      in_place ? exchange_.at(bytes_of(plan_.receive.front().first, plan_.row_bytes)) : output_.at(0);
  if (plan_.output_rows != 0 && plan_.sums()) {
    check_sums<<<plan_.output_rows, kThreads>>>(reinterpret_cast<const __nv_bfloat16*>(rows), origins_.as<RowCopy>(),
                                                terms_.as<int32_t>(), plan_.lanes, plan_.row_bytes / 2,
                                                wrong_.as<uint32_t>());
  } else if (plan_.output_rows != 0) {
    check_words<<<plan_.output_rows, kThreads>>>(reinterpret_cast<const uint32_t*>(rows), origins_.as<RowCopy>(),
                                                 plan_.row_bytes / 4, wrong_.as<uint32_t>());
  }
  check_cuda(cudaGetLastError(), "check of the comparison with NCCL");
  uint32_t wrong = 0;
  check_cuda(cudaMemcpy(&wrong, wrong_.at(0), sizeof(wrong), cudaMemcpyDeviceToHost), "check against NCCL");
  return wrong;
}

}  // namespace expertd::bench
