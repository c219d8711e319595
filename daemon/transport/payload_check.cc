// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/payload_check.h"

#include "daemon/base/limits.h"

namespace expertd::transport {

namespace {

using kernels::Payload;

constexpr uint32_t kMaxRowBytes = 2 * base::kMaxHidden;

}  // namespace

bool take_payload(const expertd_slot& slot, bool fp8_allowed, TensorCheck* check, engine::Request* request) {
  kernels::OpShape& shape = request->shape;
  const uint32_t hidden = shape.hidden;
  const bool fp8 = (slot.flags & EXPERTD_SLOT_QUANTISE_FP8) != 0;
  const bool rounded = (slot.flags & EXPERTD_SLOT_ROUND_SCALE) != 0;
  const bool ue8m0 = (slot.flags & EXPERTD_SLOT_UE8M0) != 0;
  if (slot.dtype == EXPERTD_DTYPE_BF16) {
    shape.payload = fp8 ? Payload::kFp8 : Payload::kBf16;
    shape.row_bytes = 2 * hidden;
    shape.out_row_bytes = fp8 ? hidden : 2 * hidden;
  } else if (slot.dtype == EXPERTD_DTYPE_BYTES) {
    if (slot.row_bytes == 0 || slot.row_bytes > kMaxRowBytes) {
      return check->refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_ROW_BYTES, slot.row_bytes, 16, kMaxRowBytes);
    }
    if (slot.row_bytes % 16 != 0) {
      return check->refuse(EXPERTD_REASON_UNALIGNED, EXPERTD_ARGUMENT_ROW_BYTES, slot.row_bytes, 16, kMaxRowBytes);
    }
    shape.payload = Payload::kBytes;
    shape.row_bytes = slot.row_bytes;
    shape.out_row_bytes = slot.row_bytes;
  } else {
    return check->refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_DTYPE, slot.dtype, EXPERTD_DTYPE_BF16,
                         EXPERTD_DTYPE_BYTES);
  }
  const bool flags_fit =
      (!fp8 || (fp8_allowed && slot.dtype == EXPERTD_DTYPE_BF16)) && (!rounded || fp8) && (!ue8m0 || rounded);
  if (!flags_fit) {
    return check->refuse(EXPERTD_REASON_WRONG_DTYPE, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  if (ue8m0 && hidden % 512 != 0) {
    return check->refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_HIDDEN, hidden, 512, base::kMaxHidden);
  }
  shape.scale = ue8m0     ? kernels::ScaleForm::kUe8m0
                : rounded ? kernels::ScaleForm::kRounded
                          : kernels::ScaleForm::kFloat32;
  return true;
}

}  // namespace expertd::transport
