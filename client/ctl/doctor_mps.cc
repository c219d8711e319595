// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/doctor_mps.h"

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace expertd::ctl {

namespace {

constexpr const char* kControl = "nvidia-cuda-mps-control";
constexpr const char* kServer = "nvidia-cuda-mps-server";
constexpr const char* kDirectoryVariable = "CUDA_MPS_PIPE_DIRECTORY=";
constexpr const char* kDefaultDirectory = "/tmp/nvidia-mps";

/// Texts that end with a zero byte, as in cmdline and environ; nothing when the file cannot be read.
std::vector<std::string> words_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) {
    words.push_back(word);
  }
  return words;
}

std::string program_of(const std::vector<std::string>& command) {
  return command.empty() ? std::string() : std::filesystem::path(command.front()).filename().string();
}

/// False when it is known to serve another directory; the environment of others' processes cannot be read.
bool may_serve(const std::filesystem::path& process, const std::string& pipe_directory) {
  const std::vector<std::string> environment = words_of(process / "environ");
  if (environment.empty()) {
    return true;
  }
  const std::string name = kDirectoryVariable;
  const auto found = std::find_if(environment.begin(), environment.end(),
                                  [&](const std::string& word) { return word.rfind(name, 0) == 0; });
  const std::string directory = found == environment.end() ? kDefaultDirectory : found->substr(name.size());
  // With a slash at the end or without one.
  const auto normal = [](const std::string& path) { return (std::filesystem::path(path) / "").lexically_normal(); };
  return normal(directory) == normal(pipe_directory);
}

/// With one dash or two: the older and the newer interface.
bool asks_for_many_users(const std::vector<std::string>& command) {
  return std::any_of(std::next(command.begin()), command.end(), [](const std::string& word) {
    const std::string name = word.substr(std::min(word.find_first_not_of('-'), word.size()));
    return name == "multiuser-server" || name == "multiuser";
  });
}

}  // namespace

MpsView look_for_mps(const std::string& proc, const std::string& pipe_directory) {
  MpsView view;
  size_t controls = 0;
  std::vector<uid_t> servers;
  std::error_code error;
  for (auto entry = std::filesystem::directory_iterator(proc, error);
       !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::vector<std::string> command = words_of(entry->path() / "cmdline");
    const std::string program = program_of(command);
    struct stat info {};
    if (program == kControl && may_serve(entry->path(), pipe_directory)) {
      ++controls;
      view.multi_user = asks_for_many_users(command);
    } else if (program == kServer && ::stat(entry->path().c_str(), &info) == 0) {
      servers.push_back(info.st_uid);
    }
  }
  view.control = controls == 1;
  view.multi_user = view.control && view.multi_user;
  if (view.control && servers.size() == 1) {
    view.server_uid = servers.front();
  }
  return view;
}

Check check_mps_users(const MpsView& view) {
  Check check{"mps_users", Level::kOk, {}, {}, {}};
  if (!view.control) {
    check.finding = "the MPS control daemon cannot be seen from here, so whether it serves several users is not known";
  } else if (view.multi_user) {
    check.finding = "the MPS server serves all users";
  } else {
    check.level = Level::kWarn;
    const std::string whom =
        view.server_uid.has_value() ? "user " + std::to_string(*view.server_uid) + " alone" : "one user at a time";
    check.finding = "the MPS server serves " + whom +
                    ": processes of other users hang in their first CUDA call until its last client has ended";
    check.remedy = "start nvidia-cuda-mps-control with -multiuser-server, or run expertd and its clients as one user";
    check.without = "clients of the user of expertd";
  }
  return check;
}

}  // namespace expertd::ctl
