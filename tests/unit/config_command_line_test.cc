// SPDX-License-Identifier: Apache-2.0
// From arguments to an action, a text and an exit code.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "daemon/config/command_line.h"
#include "daemon/config/keys.h"
#include "daemon/config/print.h"
#include "proto/abi/ring_v1.h"

namespace expertd::config {
namespace {

using Flags = std::vector<std::pair<std::string, std::string>>;

CommandLine parse(std::vector<const char*> arguments) {
  arguments.insert(arguments.begin(), "expertd");
  return parse_command_line(static_cast<int>(arguments.size()), arguments.data(), {});
}

/// Without a file on this machine having a say.
Startup start(std::vector<const char*> arguments) {
  CommandLine line = parse(std::move(arguments));
  if (!line.request.path_given) {
    line.request.path = "/nonexistent/expertd.toml";
  }
  return carry_out(line);
}

TEST(CommandLine, RunsWithoutArguments) {
  const CommandLine line = parse({});
  EXPECT_EQ(line.action, Action::kRun);
  EXPECT_EQ(line.request.path, "/etc/expertd/expertd.toml");
  EXPECT_FALSE(line.request.path_given);
}

TEST(CommandLine, RunsWithoutEvenAProgramName) {
  const char* const nothing = nullptr;
  EXPECT_EQ(parse_command_line(0, &nothing, {}).action, Action::kRun);
}

TEST(CommandLine, NamesAFile) {
  for (const CommandLine& line : {parse({"--config", "/a.toml"}), parse({"--config=/a.toml"})}) {
    EXPECT_EQ(line.request.path, "/a.toml");
    EXPECT_TRUE(line.request.path_given);
  }
}

TEST(CommandLine, HasAFlagForEveryKey) {
  for (const Key& key : keys()) {
    const std::string argument = flag_name(key) + "=" + std::string(key.default_text);
    const CommandLine line = parse({argument.c_str()});
    EXPECT_EQ(line.action, Action::kRun) << argument << line.error;
    EXPECT_EQ(line.request.flags, (Flags{{full_name(key), std::string(key.default_text)}}));
  }
}

TEST(CommandLine, TakesABareFlagOfABooleanKeyAsTrue) {
  const Startup bare = start({"--control-enable-reflection"});
  ASSERT_TRUE(bare.loaded.has_value()) << bare.error;
  EXPECT_TRUE(bare.loaded->config.control.enable_reflection);
  const Startup off = start({"--metrics-enabled=false"});
  ASSERT_TRUE(off.loaded.has_value()) << off.error;
  EXPECT_FALSE(off.loaded->config.metrics.enabled);
}

TEST(CommandLine, TakesTheLastOfARepeatedFlag) {
  EXPECT_EQ(parse({"--engine-spin-us=1", "--engine-spin-us=2"}).request.flags, (Flags{{"engine.spin_us", "2"}}));
}

TEST(CommandLine, PutsAKeysOwnFlagAfterSet) {
  EXPECT_EQ(parse({"--engine-spin-us=1", "--set", "engine.spin_us=2"}).request.flags,
            (Flags{{"engine.spin_us", "2"}, {"engine.spin_us", "1"}}));
}

TEST(CommandLine, TakesSeveralSets) {
  EXPECT_EQ(parse({"--set", "log.level=debug", "--set=metrics.port=0"}).request.flags,
            (Flags{{"log.level", "debug"}, {"metrics.port", "0"}}));
}

TEST(CommandLine, TakesANegativeValue) {
  EXPECT_EQ(parse({"--device-hosts=-1"}).request.flags, (Flags{{"device.hosts", "-1"}}));
  EXPECT_EQ(parse({"--device-hosts", "-1"}).request.flags, (Flags{{"device.hosts", "-1"}}));
}

TEST(CommandLine, TakesABracketedListWhole) {
  const Flags flags = {{"control.allowed_uids", "[1,2]"}};
  EXPECT_EQ(parse({"--control-allowed-uids=[1,2]"}).request.flags, flags);
  EXPECT_EQ(parse({"--control-allowed-uids", "[1,2]"}).request.flags, flags);
  EXPECT_EQ(parse({"--set", "control.allowed_uids=[1,2]"}).request.flags, flags);
}

TEST(CommandLine, DoesNotTakeTheNextArgumentForAnEmptyValue) {
  const CommandLine line = parse({"--control-socket=", "--check-config"});
  EXPECT_EQ(line.action, Action::kCheckConfig);
  EXPECT_EQ(line.request.flags, (Flags{{"control.socket", ""}}));
}

TEST(CommandLine, RefusesABooleanKeyWithAnotherValue) {
  EXPECT_EQ(start({"--control-enable-reflection="}).exit_code, 78);
  EXPECT_EQ(start({"--control-enable-reflection=maybe"}).exit_code, 78);
  EXPECT_EQ(start({"--control-enable-reflection", "maybe"}).exit_code, 78);
}

TEST(CommandLine, TakesEveryWritingOfABooleanKey) {
  const auto reflection = [](std::vector<const char*> arguments) {
    const Startup startup = start(std::move(arguments));
    EXPECT_TRUE(startup.loaded.has_value()) << startup.error;
    return startup.loaded.has_value() && startup.loaded->config.control.enable_reflection;
  };
  EXPECT_TRUE(reflection({"--control-enable-reflection"}));
  EXPECT_TRUE(reflection({"--control-enable-reflection=true"}));
  EXPECT_FALSE(reflection({"--control-enable-reflection=false"}));
  EXPECT_FALSE(reflection({"--control-enable-reflection", "false"}));
  EXPECT_TRUE(reflection({"--control-enable-reflection", "--metrics-enabled"}));
}

TEST(CommandLine, TakesAnEmptyText) {
  EXPECT_EQ(parse({"--set", "control.socket="}).request.flags, (Flags{{"control.socket", ""}}));
}

TEST(CommandLine, EndsAUsageErrorWith64OnStderr) {
  for (const std::vector<const char*>& arguments : {std::vector<const char*>{"--no-such-flag"},
                                                    {"--set"},
                                                    {"--set", "engine.spin_us"},
                                                    {"--set", "=3"},
                                                    {"--print-config=yaml"},
                                                    {"stray"},
                                                    {"--config"},
                                                    {"--check-config=maybe"}}) {
    const Startup startup = start(arguments);
    EXPECT_EQ(startup.exit_code, 64) << arguments[0];
    EXPECT_FALSE(startup.error.empty()) << arguments[0];
    EXPECT_TRUE(startup.output.empty()) << arguments[0];
    EXPECT_FALSE(startup.loaded.has_value()) << arguments[0];
  }
}

TEST(CommandLine, PrintsHelpToStdout) {
  const Startup startup = start({"--help"});
  EXPECT_EQ(startup.exit_code, 0);
  EXPECT_TRUE(startup.error.empty());
  for (const Key& key : keys()) {
    EXPECT_NE(startup.output.find(flag_name(key)), std::string::npos) << flag_name(key);
  }
}

TEST(CommandLine, PrintsTheVersionOnOneLine) {
  const Startup startup = start({"--version"});
  EXPECT_EQ(startup.exit_code, 0);
  EXPECT_EQ(startup.output, version_line() + "\n");
  EXPECT_TRUE(startup.output.starts_with("expertd ")) << startup.output;
  // A build with CUDA names it: "expertd 0.1.0 (abi 1.4, cuda 13.0)".
  const std::string abi = std::to_string(EXPERTD_ABI_MAJOR) + "." + std::to_string(EXPERTD_ABI_MINOR);
  EXPECT_NE(startup.output.find(" (abi " + abi), std::string::npos) << startup.output;
  EXPECT_TRUE(startup.output.ends_with(")\n")) << startup.output;
  EXPECT_EQ(std::count(startup.output.begin(), startup.output.end(), '\n'), 1) << startup.output;
}

TEST(CommandLine, PrintsTheExampleWithoutLoadingAnything) {
  const Startup startup = start({"--print-config=example", "--config=/nonexistent/x.toml"});
  EXPECT_EQ(startup.exit_code, 0);
  EXPECT_EQ(startup.output, example_toml());
}

TEST(CommandLine, PrintsTheEffectiveConfiguration) {
  const Startup toml = start({"--print-config", "--engine-spin-us=7"});
  EXPECT_EQ(toml.exit_code, 0);
  EXPECT_NE(toml.output.find("# flag --engine-spin-us"), std::string::npos);
  EXPECT_FALSE(toml.loaded.has_value());
  EXPECT_EQ(start({"--print-config=toml", "--engine-spin-us=7"}).output, toml.output);
  EXPECT_EQ(start({"--print-config=json"}).output.front(), '{');
}

TEST(CommandLine, ChecksAGoodConfigurationInSilence) {
  const Startup startup = start({"--check-config"});
  EXPECT_EQ(startup.exit_code, 0);
  EXPECT_TRUE(startup.output.empty());
  EXPECT_TRUE(startup.error.empty());
  EXPECT_FALSE(startup.loaded.has_value());
}

TEST(CommandLine, EndsAConfigurationErrorWith78) {
  for (const char* argument : {"--engine-spin-us=many", "--config=/nonexistent/x.toml", "--set=engine.spin=1"}) {
    EXPECT_EQ(start({argument}).exit_code, 78) << argument;
    const Startup checked = start({"--check-config", argument});
    EXPECT_EQ(checked.exit_code, 78) << argument;
    EXPECT_TRUE(checked.error.ends_with('\n')) << argument;
    EXPECT_FALSE(checked.loaded.has_value()) << argument;
  }
}

TEST(CommandLine, LoadsWhatItIsToldToRunWith) {
  const Startup startup = start({"--control-max-sessions=3"});
  ASSERT_TRUE(startup.loaded.has_value()) << startup.error;
  EXPECT_EQ(startup.loaded->config.control.max_sessions, 3U);
}

}  // namespace
}  // namespace expertd::config
