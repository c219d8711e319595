// SPDX-License-Identifier: Apache-2.0
// OpRequest: one operation between the caller's arguments and its ring descriptor: the descriptor's fields and, for
// each tensor, pointer and size. The functions fill it from the public structs; pure, on the caller's thread.
#pragma once

#include <array>
#include <cstdint>

#include "client/src/group.h"
#include "client/src/local_kernels/exchange_ht_params.h"
#include "client/src/local_kernels/exchange_params.h"
#include "client/src/op_table.h"
#include "client/src/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::client {

enum class Direction { kIn, kOut, kInOut };

struct TensorArg {
  const void* pointer = nullptr;
  /// Bytes from the lowest to the highest one; the lowest lies `lead` bytes in front of pointer (negative strides).
  uint64_t bytes = 0;
  uint64_t lead = 0;
  Direction direction = Direction::kIn;
  CopyBack rows = CopyBack::kAll;
  uint64_t row_bytes = 0;
};

/// A high throughput operation by copy engines.
struct HtRequest {
  HtParams params;
  HtUse* last = nullptr;  // of the buffer
};

struct OpRequest {
  expertd_slot slot{};
  std::array<TensorArg, EXPERTD_TENSOR_COUNT> tensors{};
  uint32_t flags = 0;  // the caller's
  uint32_t rows_per_expert = 0;
  uint64_t timeout_ns = 0;             // effective
  bool captured = false;               // into the graph of a stream that is being captured
  ExchangeParams* exchange = nullptr;  // of an operation by copy engines, by the caller of submit()
  HtRequest* ht = nullptr;             // the same of high throughput
  bool submitted = false;              // the daemon has the descriptor, whatever failed after that
};

/// Null where the caller gave none.
template <typename T>
T* tensor_of(const OpRequest& request, uint32_t index) {
  return static_cast<T*>(const_cast<void*>(request.tensors[index].pointer));
}
/// As the library's kernels access tensors, 16 bytes at a time.
bool are_aligned(const OpRequest& request);

Status build_barrier(const Group& group, uint32_t flags, uint64_t timeout_ns, OpRequest* request);
Status build_layout(const expertd_layout_args_t& args, uint64_t default_timeout_ns, OpRequest* request);
/// slot.handle_* are left to the caller unless args.cached is given.
Status build_dispatch(const Group& group, const expertd_dispatch_args_t& args, OpRequest* request);
Status build_combine(const Group& group, const expertd_combine_args_t& args, OpRequest* request);
/// Null outputs go to the given set of the group's window.
Status build_ll_dispatch(const Group& group, const expertd_ll_dispatch_args_t& args, uint32_t set, OpRequest* request);
Status build_ll_combine(const Group& group, const expertd_ll_combine_args_t& args, OpRequest* request);

/// The descriptor that tells the daemon of an operation refused here.
void build_refusal(const Group& group, uint32_t op, uint64_t timeout_ns, const Status& why, OpRequest* request);

/// Addresses of a set in the group's window; MODE_MISMATCH when the group has none.
Status ll_outputs(const Group& group, uint32_t set, expertd_ll_outputs_t* outputs);

}  // namespace expertd::client
