// SPDX-License-Identifier: Apache-2.0
// expertd with the devices of this machine.
#include "daemon/app/serve.h"

int main(int argc, char** argv) {
  return expertd::app::serve(argc, argv, expertd::app::make_host_device);
}
