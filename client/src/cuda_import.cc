// SPDX-License-Identifier: Apache-2.0
#include "client/src/device_side.h"
namespace expertd::client {
Status create_cuda_side(const std::string&, std::unique_ptr<DeviceSide>*) {
  return error(EXPERTD_REASON_NO_GPU, "not built");
}
}  // namespace expertd::client
