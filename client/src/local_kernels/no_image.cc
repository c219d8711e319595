// SPDX-License-Identifier: Apache-2.0
// Built without nvcc: the daemon executes what the kernels would.
#include "client/src/local_kernels/image.h"

namespace expertd::client {

const void* kernel_image() {
  return nullptr;
}

}  // namespace expertd::client
