// SPDX-License-Identifier: Apache-2.0
// From a file, an environment and flags to a Config, and what is said about mistakes.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "daemon/config/config.h"

namespace expertd::config {
namespace {

class ConfigLoader : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "config_XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
    path_ = directory_ + "/expertd.toml";
    request_.path = path_;
    request_.path_given = true;
    request_.environment = [this](const std::string& variable) {
      const auto found = environment_.find(variable);
      return found == environment_.end() ? std::nullopt : std::optional<std::string>(found->second);
    };
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  void write(const std::string& text) { std::ofstream(path_) << text; }

  LoadedConfig loaded() {
    base::Result<LoadedConfig> result = load(request_);
    EXPECT_TRUE(result.is_ok()) << result.status().message();
    return result.is_ok() ? std::move(result).value() : LoadedConfig{};
  }

  /// The message of a failure without the directory of the test.
  std::string mistake(base::Reason reason) {
    const base::Result<LoadedConfig> result = load(request_);
    EXPECT_FALSE(result.is_ok());
    EXPECT_EQ(result.status().reason(), reason);
    std::string message = result.status().message();
    for (size_t at; (at = message.find(directory_ + "/")) != std::string::npos;) {
      message.erase(at, directory_.size() + 1);
    }
    return message;
  }

  std::string origin(const LoadedConfig& config, std::string_view name) {
    for (const KeyReport& row : config.report) {
      if (row.name == name) {
        const size_t at = row.origin.find(directory_ + "/");
        return at == std::string::npos ? row.origin : std::string(row.origin).erase(at, directory_.size() + 1);
      }
    }
    return "no such row";
  }

  std::string directory_;
  std::string path_;
  LoadRequest request_;
  std::map<std::string, std::string> environment_;
};

TEST_F(ConfigLoader, TakesDefaultsFromAnEmptyFile) {
  write("");
  const Config config = loaded().config;
  EXPECT_EQ(config.runtime_directory, "/run/expertd");
  EXPECT_EQ(config.control.socket, "/run/expertd/control.sock");
  EXPECT_EQ(config.control.attach_socket, "/run/expertd/attach.sock");
  EXPECT_EQ(config.control.socket_mode, 0660U);
  EXPECT_EQ(config.control.max_sessions, 64U);
  EXPECT_EQ(config.control.call_deadline_max_ns, 3'600'000'000'000U);
  EXPECT_EQ(config.control.drain_timeout_ns, 30'000'000'000U);
  EXPECT_EQ(config.device.hosts, -1);
  EXPECT_EQ(config.device.gpus.kind, GpuSelection::Kind::kAuto);
  EXPECT_FALSE(config.device.pool_bytes.has_value());
  EXPECT_TRUE(config.device.peer_access);
  EXPECT_EQ(config.engine.spin_us, 50U);
  EXPECT_EQ(config.engine.op_deadline_ns, 100'000'000'000U);
  EXPECT_EQ(config.engine.first_op_deadline_ns, 1'800'000'000'000U);
  EXPECT_EQ(config.engine.ring_slots, 64U);
  EXPECT_EQ(config.session.max_groups, 8U);
  EXPECT_EQ(config.metrics.port, 9464);
  EXPECT_EQ(config.log.level, base::LogLevel::kInfo);
}

TEST_F(ConfigLoader, GivesTheSameDefaultsWithoutAFile) {
  request_.path_given = false;
  const LoadedConfig config = loaded();
  EXPECT_EQ(config.file, "");
  EXPECT_EQ(config.config.engine.handles_per_session, defaults().engine.handles_per_session);
  EXPECT_EQ(defaults().engine.handles_per_session, 512U);
}

TEST_F(ConfigLoader, RefusesAMissingFileThatWasNamed) {
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNREADABLE), "expertd.toml: no such file; it was named by --config");
}

TEST_F(ConfigLoader, RefusesAFileThatCannotBeRead) {
  std::filesystem::create_directory(path_);
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNREADABLE), "expertd.toml: cannot be read: Is a directory");
}

TEST_F(ConfigLoader, RefusesAFileBeyondItsBound) {
  write(std::string((1 << 20) + 1, '#'));
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNREADABLE), "expertd.toml: is larger than 1048576 bytes");
}

TEST_F(ConfigLoader, ReadsEverySection) {
  write(
      "runtime_directory = \"/tmp/x\"\n"
      "[control]\nsocket_mode = \"0600\"\nallowed_uids = [0, 1000]\nenable_reflection = true\n"
      "[device]\ngpus = \"1,GPU-ab\"\nhosts = 0\npool_max_bytes = \"64MiB\"\nkernels = \"generic\"\n"
      "[engine]\nop_deadline = 7\nring_slots = 8\n"
      "[session]\nmax_window_bytes = 4096\nmax_registered_bytes = \"2GiB\"\n"
      "[metrics]\nenabled = false\nport = 0\n"
      "[log]\nlevel = \"debug\"\nformat = \"json\"\n");
  const Config config = loaded().config;
  EXPECT_EQ(config.control.socket, "/tmp/x/control.sock");
  EXPECT_EQ(config.control.socket_mode, 0600U);
  EXPECT_EQ(config.control.allowed_uids, (std::vector<uint32_t>{0, 1000}));
  EXPECT_TRUE(config.control.enable_reflection);
  EXPECT_EQ(config.device.gpus.names, (std::vector<std::string>{"1", "GPU-ab"}));
  EXPECT_EQ(config.device.hosts, 0);
  EXPECT_EQ(config.device.pool_max_bytes, uint64_t{64} << 20U);
  EXPECT_EQ(config.device.kernels, Kernels::kGeneric);
  EXPECT_EQ(config.engine.op_deadline_ns, 7'000'000'000U);
  EXPECT_EQ(config.engine.ring_slots, 8U);
  EXPECT_EQ(config.session.max_window_bytes, 4096U);
  EXPECT_EQ(config.session.max_registered_bytes, 2ULL << 30);
  EXPECT_FALSE(config.metrics.enabled);
  EXPECT_EQ(config.metrics.port, 0);
  EXPECT_EQ(config.log.level, base::LogLevel::kDebug);
  EXPECT_EQ(config.log.format, base::LogFormat::kJson);
}

TEST_F(ConfigLoader, NamesTheNearestKeyWithLineAndColumn) {
  write("# first line\nruntime_directry = \"/run/expertd\"\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY),
            "expertd.toml:2:1: unknown key \"runtime_directry\", nearest \"runtime_directory\"");
}

TEST_F(ConfigLoader, NamesTheNearestKeyOfASection) {
  write("[engine]\n  spin_u = 3\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY),
            "expertd.toml:2:3: unknown key \"engine.spin_u\", nearest \"engine.spin_us\"");
}

TEST_F(ConfigLoader, NamesTheNearestSection) {
  write("[contrl]\nsocket = \"\"\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY),
            "expertd.toml:1:2: unknown section \"contrl\", nearest \"control\"");
}

TEST_F(ConfigLoader, PointsToTheListWhenNothingIsNear) {
  write("zzzzzzzzzz = 1\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY),
            "expertd.toml:1:1: unknown key \"zzzzzzzzzz\"; --print-config=example lists every key");
}

TEST_F(ConfigLoader, RefusesANestedTable) {
  write("[control.socket]\nmode = 1\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("control.socket: found a table"), std::string::npos);
}

TEST_F(ConfigLoader, RefusesAValueWhereASectionBelongs) {
  write("control = 5\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE), "expertd.toml:1:1: \"control\" is a section: write [control]");
}

TEST_F(ConfigLoader, RefusesAnArrayOfSections) {
  write("[[control]]\nmax_sessions = 1\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("is a section"), std::string::npos);
}

TEST_F(ConfigLoader, SaysWhatWasFoundAndWhatWasWanted) {
  write("[engine]\nspin_us = \"20\"\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
            "expertd.toml:2:11: engine.spin_us: found a string, wanted an integer from 0 to "
            "1000000");
}

TEST_F(ConfigLoader, RefusesEveryWrongType) {
  for (const char* text : {"[engine]\nspin_us = 1.5", "[engine]\nspin_us = true", "[control]\nallowed_uids = 5",
                           "[control]\nallowed_uids = [\"a\"]", "[control]\nsocket_mode = 660", "[log]\nlevel = 1",
                           "[metrics]\nenabled = 1", "[engine]\nop_deadline = 1.5", "[device]\ngpus = 0",
                           "[log]\nlevel = 1979-05-27", "runtime_directory = []"}) {
    write(text);
    EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("found "), std::string::npos) << text;
  }
}

TEST_F(ConfigLoader, NamesTheRangeWithThePlaceOfTheValue) {
  write("[engine]\nspin_us = 2000000\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
            "expertd.toml:2:11: engine.spin_us: 2000000 is out of range, allowed 0 to 1000000");
}

TEST_F(ConfigLoader, GivesThePlaceOfASyntaxError) {
  write("[engine]\nspin_us = = 3\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNREADABLE).substr(0, 18), "expertd.toml:2:11:");
}

TEST_F(ConfigLoader, ReportsAllMistakesInTheOrderOfTheFile) {
  write("[log]\nlevel = 3\n[control]\nsokket = \"\"\n");
  environment_["EXPERTD_ENGINE_SPIN_US"] = "many";
  request_.flags = {{"metrics.prt", "1"}};
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
            "expertd.toml:2:9: log.level: found an integer, wanted one of trace, debug, info, "
            "warn, error\n"
            "expertd.toml:4:1: unknown key \"control.sokket\", nearest \"control.socket\"\n"
            "environment EXPERTD_ENGINE_SPIN_US: engine.spin_us: \"many\" is not an integer from "
            "0 to 1000000\n"
            "flag --set metrics.prt: unknown key \"metrics.prt\", nearest \"metrics.port\"");
}

TEST_F(ConfigLoader, BoundsTheListOfMistakes) {
  std::string text;
  for (int i = 0; i < 30; ++i) {
    text += "unknown_" + std::to_string(i) + " = 1\n";
  }
  write(text);
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY).find("\nand 10 more"), std::string::npos);
}

TEST_F(ConfigLoader, LetsFlagsWinOverEnvironmentOverFile) {
  write("[engine]\nspin_us = 1\nring_slots = 8\nhandles_per_session = 1\n");
  environment_["EXPERTD_ENGINE_SPIN_US"] = "2";
  environment_["EXPERTD_ENGINE_RING_SLOTS"] = "16";
  request_.flags = {{"engine.spin_us", "3"}};
  const LoadedConfig config = loaded();
  EXPECT_EQ(config.config.engine.spin_us, 3U);
  EXPECT_EQ(config.config.engine.ring_slots, 16U);
  EXPECT_EQ(config.config.engine.handles_per_session, 1U);
}

TEST_F(ConfigLoader, NamesTheOriginOfEachValue) {
  write("\n[engine]\nhandles_per_session = 1\n");
  environment_["EXPERTD_ENGINE_RING_SLOTS"] = "16";
  request_.flags = {{"engine.spin_us", "3"}};
  const LoadedConfig config = loaded();
  EXPECT_EQ(origin(config, "engine.spin_us"), "flag --engine-spin-us");
  EXPECT_EQ(origin(config, "engine.ring_slots"), "environment EXPERTD_ENGINE_RING_SLOTS");
  EXPECT_EQ(origin(config, "engine.handles_per_session"), "file expertd.toml:3");
  EXPECT_EQ(origin(config, "engine.schedule"), "default");
}

TEST_F(ConfigLoader, TakesTheLaterOfTwoFlags) {
  write("");
  request_.flags = {{"engine.spin_us", "3"}, {"engine.spin_us", "4"}};
  EXPECT_EQ(loaded().config.engine.spin_us, 4U);
}

TEST_F(ConfigLoader, NamesTheNearestSectionOfAFlag) {
  write("");
  request_.flags = {{"engin.spin_us", "3"}};
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_UNKNOWN_KEY),
            "flag --set engin.spin_us: unknown section \"engin\", nearest \"engine\"");
}

TEST_F(ConfigLoader, DerivesSocketsFromTheRuntimeDirectory) {
  write("runtime_directory = \"/srv/e/\"\n[control]\nattach_socket = \"/srv/a.sock\"\n");
  const Config config = loaded().config;
  EXPECT_EQ(config.control.socket, "/srv/e/control.sock");
  EXPECT_EQ(config.control.attach_socket, "/srv/a.sock");
}

TEST_F(ConfigLoader, RefusesASocketPathThatTheKernelCannotHold) {
  write("runtime_directory = \"/" + std::string(100, 'd') + "\"\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("has at most 107"), std::string::npos);
}

TEST_F(ConfigLoader, RefusesOnePathForBothSockets) {
  write("[control]\nsocket = \"/a\"\nattach_socket = \"/a\"\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
            "expertd.toml:3:17: control.attach_socket: is the same path as control.socket");
}

TEST_F(ConfigLoader, RefusesAPoolOfAFixedSizeBeforeTheDaemonStarts) {
  write("[device]\npool_bytes = \"2GiB\"\n");
  const std::string text = mistake(EXPERTD_REASON_CONFIG_BAD_VALUE);
  EXPECT_EQ(text.find("expertd.toml:2:14: device.pool_bytes: only \"auto\""), 0U) << text;
  EXPECT_NE(text.find("device.pool_max_bytes"), std::string::npos) << text;
}

TEST_F(ConfigLoader, TakesTheKernelsFromTheirShortVariableToo) {
  write("");
  environment_["EXPERTD_KERNELS"] = "generic";
  LoadedConfig config = loaded();
  EXPECT_EQ(config.config.device.kernels, Kernels::kGeneric);
  EXPECT_EQ(origin(config, "device.kernels"), "environment EXPERTD_KERNELS");
  environment_["EXPERTD_DEVICE_KERNELS"] = "auto";
  EXPECT_EQ(loaded().config.device.kernels, Kernels::kAuto) << "the full name wins";
  environment_.clear();
  environment_["EXPERTD_KERNELS"] = "fast";
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("environment EXPERTD_KERNELS"), std::string::npos);
}

TEST_F(ConfigLoader, RefusesToServeNothing) {
  write("[device]\nhosts = 0\ngpus = \"none\"\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("nothing to serve"), std::string::npos);
}

TEST_F(ConfigLoader, ReadsTheFabric) {
  write(
      "[fabric]\nenabled = true\nlisten = \"[::]:9465\"\nrendezvous = [\"a:9465\", \"b:9465\"]\nrequire = \"direct\"\n"
      "heartbeat_ms = 1000\nmessage_bytes = \"64KiB\"\ntransports = []\ndevices = [\"mlx5_0:1\"]\n");
  const FabricConfig fabric = loaded().config.fabric;
  EXPECT_TRUE(fabric.enabled);
  EXPECT_EQ(fabric.listen, "[::]:9465");
  EXPECT_EQ(fabric.rendezvous, (std::vector<std::string>{"a:9465", "b:9465"}));
  EXPECT_TRUE(fabric.require_direct);
  EXPECT_EQ(fabric.heartbeat_ms, 1000U);
  EXPECT_EQ(fabric.heartbeat_misses, 5U);
  EXPECT_EQ(fabric.message_bytes, 65536U);
  EXPECT_EQ(fabric.messages_per_peer, 4U);
  EXPECT_EQ(fabric.max_nodes, 64U);
  EXPECT_TRUE(fabric.transports.empty());
  EXPECT_EQ(fabric.devices, (std::vector<std::string>{"mlx5_0:1"}));
  EXPECT_EQ(fabric.route, FabricRoute::kAuto);
  for (const FabricLaneConfig& lane : fabric.lanes) {
    EXPECT_TRUE(lane.devices.empty());
    EXPECT_EQ(lane.service_level, -1);
    EXPECT_EQ(lane.traffic_class, -1);
    EXPECT_EQ(lane.adaptive_routing, AdaptiveRouting::kDefault);
  }
}

TEST_F(ConfigLoader, ReadsWhatEachLaneHasOfItsOwn) {
  write(
      "[fabric]\nenabled = true\nrendezvous = [\"a:9465\"]\nroute = \"spread\"\ncontrol_service_level = 1\n"
      "latency_traffic_class = 106\nthroughput_devices = [\"mlx5_0:1\", \"mlx5_1:1\"]\n"
      "throughput_adaptive_routing = \"try\"\n");
  const FabricConfig fabric = loaded().config.fabric;
  EXPECT_EQ(fabric.route, FabricRoute::kSpread);
  EXPECT_EQ(fabric.lanes[0].service_level, 1);
  EXPECT_EQ(fabric.lanes[1].traffic_class, 106);
  EXPECT_EQ(fabric.lanes[2].devices, (std::vector<std::string>{"mlx5_0:1", "mlx5_1:1"}));
  EXPECT_EQ(fabric.lanes[2].adaptive_routing, AdaptiveRouting::kTry);
  write("[fabric]\nlatency_traffic_class = 256\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("latency_traffic_class"), std::string::npos);
}

TEST_F(ConfigLoader, TakesTheRendezvousFromTheEnvironmentToo) {
  write("[fabric]\nenabled = true\n");
  environment_["EXPERTD_FABRIC_RENDEZVOUS"] = "a:1,b:2";
  EXPECT_EQ(loaded().config.fabric.rendezvous, (std::vector<std::string>{"a:1", "b:2"}));
}

TEST_F(ConfigLoader, WantsARendezvousWhereTheFabricIsEnabled) {
  write("[fabric]\nenabled = true\n");
  EXPECT_EQ(
      mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
      "expertd.toml:2:11: fabric.enabled: needs fabric.rendezvous, the daemons at which the ranks of a group find "
      "each other, or fabric.etcd, where they elect one");
}

TEST_F(ConfigLoader, TakesAnEtcdInPlaceOfARendezvousAndNotBoth) {
  write("[fabric]\nenabled = true\netcd = [\"http://a:2379\"]\n");
  const config::FabricConfig fabric = loaded().config.fabric;
  EXPECT_EQ(fabric.etcd, (std::vector<std::string>{"http://a:2379"}));
  EXPECT_EQ(fabric.etcd_prefix, "/expertd");
  EXPECT_EQ(fabric.etcd_lease_ns, 5'000'000'000U);
  write("[fabric]\nenabled = true\nrendezvous = [\"a:1\"]\netcd = [\"http://a:2379\"]\n");
  EXPECT_EQ(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE),
            "expertd.toml:4:8: fabric.etcd: is given together with fabric.rendezvous; remove one of the two");
  write("[fabric]\netcd = [\"https://a:2379\"]\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("\"http://HOST:PORT\""), std::string::npos);
}

TEST_F(ConfigLoader, WantsANameOfAllDaemonsAlone) {
  write("[fabric]\nrendezvous = [\"dns:a:1\", \"b:1\"]\n");
  EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("must be the only one"), std::string::npos);
}

TEST_F(ConfigLoader, RefusesListsOfTextsThatHoldOtherThings) {
  for (const char* text : {"[1, 2]", "[\"a:1\", 2]", "\"a:1\"", "[\"a:1,b:1\"]", "[\"\"]", "[[\"a:1\"]]"}) {
    write(std::string("[fabric]\nrendezvous = ") + text);
    EXPECT_NE(mistake(EXPERTD_REASON_CONFIG_BAD_VALUE).find("found "), std::string::npos) << text;
  }
}

TEST_F(ConfigLoader, SortsAChangeIntoReloadableAndRestart) {
  write("");
  const LoadedConfig before = loaded();
  write("[log]\nlevel = \"debug\"\n[engine]\nspin_us = 3\n");
  const Difference difference = compare(before.report, loaded().report);
  EXPECT_EQ(difference.reloadable, (std::vector<std::string>{"log.level"}));
  EXPECT_EQ(difference.restart_required, (std::vector<std::string>{"engine.spin_us"}));
}

TEST_F(ConfigLoader, SeesNoChangeWhenOnlyTheOriginDiffers) {
  write("");
  const LoadedConfig before = loaded();
  write("[engine]\nspin_us = 50\n");
  const Difference difference = compare(before.report, loaded().report);
  EXPECT_TRUE(difference.reloadable.empty());
  EXPECT_TRUE(difference.restart_required.empty());
}

}  // namespace
}  // namespace expertd::config
