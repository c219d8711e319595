// SPDX-License-Identifier: Apache-2.0
// The printed forms of the configuration, and the example file in the tree.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

#include "daemon/config/config.h"
#include "daemon/config/keys.h"
#include "daemon/config/print.h"

namespace expertd::config {
namespace {

std::filesystem::path source_directory() {
#ifdef EXPERTD_SOURCE_DIR
  return EXPERTD_SOURCE_DIR;
#else
  return EXPERTD_SOURCE_DIR;
#endif
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

base::Result<LoadedConfig> load_text(const std::string& text) {
  std::string path = testing::TempDir() + "print_XXXXXX";
  const int fd = ::mkstemp(path.data());
  EXPECT_GE(fd, 0);
  ::close(fd);
  std::ofstream(path) << text;
  LoadRequest request;
  request.path = path;
  request.path_given = true;
  base::Result<LoadedConfig> result = load(request);
  std::filesystem::remove(path);
  return result;
}

LoadedConfig sample() {
  const base::Result<LoadedConfig> loaded =
      load_text("[control]\nsocket_group = 'a\"b\\c'\nallowed_uids = [1, 2]\n[engine]\nspin_us = 7\n");
  EXPECT_TRUE(loaded.is_ok()) << loaded.status().message();
  return loaded.value();
}

TEST(ConfigExample, IsTheFileInTheTree) {
  EXPECT_EQ(read(source_directory() / "deploy/config/expertd.toml"), example_toml())
      << "regenerate it: expertd --print-config=example > deploy/config/expertd.toml";
}

TEST(ConfigExample, LoadsToTheDefaults) {
  const base::Result<LoadedConfig> loaded = load_text(example_toml());
  ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
  for (const KeyReport& row : loaded.value().report) {
    EXPECT_EQ(row.origin, "default") << row.name;
  }
}

TEST(ConfigExample, LoadsWithEveryLineUncommented) {
  std::istringstream lines(example_toml());
  std::string text;
  for (std::string line; std::getline(lines, line);) {
    const bool is_setting = line.size() > 1 && line[0] == '#' && line[1] != ' ';
    text += (is_setting ? line.substr(1) : line) + "\n";
  }
  const base::Result<LoadedConfig> loaded = load_text(text);
  ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
  for (const KeyReport& row : loaded.value().report) {
    EXPECT_TRUE(row.origin.starts_with("file ")) << row.name;
  }
}

TEST(ConfigExample, StaysWithinAHundredColumns) {
  std::istringstream lines(example_toml());
  for (std::string line; std::getline(lines, line);) {
    EXPECT_LE(line.size(), 100U) << line;
  }
}

TEST(ConfigPrint, PrintsTomlThatLoadsToTheSameValues) {
  const LoadedConfig before = sample();
  const base::Result<LoadedConfig> after = load_text(print_toml(before.report));
  ASSERT_TRUE(after.is_ok()) << after.status().message();
  ASSERT_EQ(after.value().report.size(), before.report.size());
  for (size_t i = 0; i < before.report.size(); ++i) {
    EXPECT_EQ(after.value().report[i].value, before.report[i].value) << before.report[i].name;
  }
}

TEST(ConfigPrint, PutsTheOriginBehindTheValue) {
  const std::string text = print_toml(sample().report);
  EXPECT_NE(text.find("spin_us = 7 "), std::string::npos);
  EXPECT_NE(text.find("# file "), std::string::npos);
  EXPECT_NE(text.find("# default"), std::string::npos);
}

TEST(ConfigPrint, KeepsAnOriginOnItsLine) {
  const std::string text = print_toml({{"engine.spin_us", "7", "file /a\nb = 1:2"}});
  EXPECT_NE(text.find("# file /a?b = 1:2\n"), std::string::npos);
}

TEST(ConfigPrint, PrintsJsonOfTheSameValues) {
  const nlohmann::json json = nlohmann::json::parse(print_json(sample().report));
  EXPECT_EQ(json.size(), keys().size());
  EXPECT_EQ(json["engine.spin_us"]["value"], 7);
  EXPECT_EQ(json["control.socket_group"]["value"], "a\"b\\c");
  EXPECT_EQ(json["control.allowed_uids"]["value"], (std::vector<int>{1, 2}));
  EXPECT_EQ(json["control.enable_reflection"]["value"], false);
  EXPECT_EQ(json["engine.schedule"]["origin"], "default");
}

}  // namespace
}  // namespace expertd::config
