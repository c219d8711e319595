// SPDX-License-Identifier: Apache-2.0
// What a client computes between the halves of operations. Of the client program, one thread, whose device is current.
#pragma once

#include <cstdint>
#include <string>

namespace expertd::device_test {

/// All return what failed, empty for success. Streams are cudaStream_t.
std::string make_stream(void** stream);
/// target[i] = factor * source[i] for bf16 elements.
std::string enqueue_scale(const uint16_t* source, uint16_t* target, uint64_t elements, float factor, void* stream);
/// Holds the stream up for some time, by one thread.
std::string enqueue_delay(uint64_t ns, void* stream);
/// Loads both kernels, which must not happen beside a stream that waits.
std::string load_work(void* stream);

}  // namespace expertd::device_test
