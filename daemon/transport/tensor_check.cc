// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/tensor_check.h"

namespace expertd::transport {

namespace {

constexpr uint64_t kAlignment = 16;

}  // namespace

bool TensorCheck::resolve(uint32_t index, uint64_t bytes, bool required) {
  const expertd_tensor_ref& ref = slot_.tensors[index];
  const uint32_t argument = EXPERTD_ARGUMENT_OF_TENSOR(index);
  if (ref.buffer == 0) {
    if (required && bytes != 0) {
      return refuse(EXPERTD_REASON_MISSING_ARGUMENT, argument, 0, 0, 0);
    }
    return true;
  }
  if (ref.buffer >= tables_.buffers.size() || tables_.buffers[ref.buffer] == nullptr) {
    return refuse(EXPERTD_REASON_NO_SUCH_BUFFER, argument, ref.buffer, 1, tables_.buffers.size() - 1);
  }
  const engine::Mapping* mapping = tables_.buffers[ref.buffer];
  if (ref.offset % kAlignment != 0) {
    return refuse(EXPERTD_REASON_UNALIGNED, argument, ref.offset, 0, mapping->bytes);
  }
  if (ref.offset > mapping->bytes || bytes > mapping->bytes - ref.offset) {
    return refuse(EXPERTD_REASON_OUT_OF_BOUNDS, argument, ref.offset + bytes, 0, mapping->bytes);
  }
  request_->tensors[index] = {mapping, ref.offset};
  return true;
}

}  // namespace expertd::transport
