// SPDX-License-Identifier: Apache-2.0
// The kernels of the library as the driver loads them: a fatbin in the library's read-only data (image.cc), or none in
// a build without nvcc (no_image.cc).
#pragma once

namespace expertd::client {

/// Null where there is none.
const void* kernel_image();

}  // namespace expertd::client
