// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/image.h"

// The assembler copies the file that nvcc has written. Aligned as the driver reads its header, by words of 8 bytes.
asm(R"(
  .pushsection .rodata.expertd_kernel_image,"a",@progbits
  .balign 16
  .globl expertd_kernel_image_bytes
  .hidden expertd_kernel_image_bytes
expertd_kernel_image_bytes:
  .incbin ")" EXPERTD_KERNEL_IMAGE R"("
  .popsection
)");

extern "C" const unsigned char expertd_kernel_image_bytes[] __attribute__((visibility("hidden")));

namespace expertd::client {

const void* kernel_image() {
  return expertd_kernel_image_bytes;
}

}  // namespace expertd::client
