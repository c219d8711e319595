// SPDX-License-Identifier: Apache-2.0
// Doctor: whom an MPS serves. What is looked at is a directory like /proc, so that tests can bring their own. Main
// thread; nothing is changed.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "client/ctl/doctor.h"

namespace expertd::ctl {

/// The MPS control daemon of a pipe directory, as far as its processes can be seen.
struct MpsView {
  bool control = false;             // it is seen, and there is one alone that it can be
  bool multi_user = false;          // it was started with -multiuser-server
  std::optional<uid_t> server_uid;  // of a server that runs already
};

/// `proc` is /proc, `pipe_directory` the one that clients here use.
MpsView look_for_mps(const std::string& proc, const std::string& pipe_directory);
/// Whether processes of several users can be served at once.
Check check_mps_users(const MpsView& view);

}  // namespace expertd::ctl
