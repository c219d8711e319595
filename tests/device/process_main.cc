// SPDX-License-Identifier: Apache-2.0
// The process tests, or with --client one of the clients that they start: the same file, so that an install tree needs
// no other program beside the daemon.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/device/process_client.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], expertd::device_test::kClientMode) == 0) {
    return expertd::device_test::run_process_client();
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
