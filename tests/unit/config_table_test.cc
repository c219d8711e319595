// SPDX-License-Identifier: Apache-2.0
// The table of keys and the values it allows.
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "daemon/config/keys.h"
#include "daemon/config/value.h"

namespace expertd::config {
namespace {

const Key& key_of(std::string_view name) {
  const Key* key = find_key(name);
  EXPECT_NE(key, nullptr) << name;
  return *key;
}

std::string literal(std::string_view name, std::string_view text) {
  const base::Result<Value> value = parse_value(key_of(name), text);
  return value.is_ok() ? format_value(key_of(name), value.value()) : value.status().message();
}

bool refused(std::string_view name, std::string_view text) {
  const base::Result<Value> value = parse_value(key_of(name), text);
  return !value.is_ok() && value.status().reason() == EXPERTD_REASON_CONFIG_BAD_VALUE;
}

TEST(ConfigTable, HasAValidDefaultForEveryKey) {
  for (const Key& key : keys()) {
    EXPECT_TRUE(parse_value(key, key.default_text).is_ok()) << full_name(key);
  }
}

TEST(ConfigTable, ReadsBackEveryDefaultThatItPrints) {
  for (const Key& key : keys()) {
    std::string text = format_value(key, default_value(key));
    std::erase_if(text, [](char c) { return c == '"' || c == '[' || c == ']'; });
    const base::Result<Value> again = parse_value(key, text);
    ASSERT_TRUE(again.is_ok()) << full_name(key);
    EXPECT_EQ(format_value(key, again.value()), format_value(key, default_value(key)));
  }
}

TEST(ConfigTable, GivesEveryKeyASentenceAndASetter) {
  for (const Key& key : keys()) {
    EXPECT_FALSE(key.sentence.empty()) << full_name(key);
    EXPECT_TRUE(key.sentence.ends_with('.')) << full_name(key);
    EXPECT_NE(key.set, nullptr) << full_name(key);
  }
}

TEST(ConfigTable, NamesEveryKeyFlagAndVariableOnce) {
  std::set<std::string> names;
  for (const Key& key : keys()) {
    EXPECT_TRUE(names.insert(full_name(key)).second) << full_name(key);
    EXPECT_TRUE(names.insert(flag_name(key)).second) << flag_name(key);
    EXPECT_TRUE(names.insert(environment_name(key)).second) << environment_name(key);
  }
}

TEST(ConfigTable, DerivesFlagAndVariableFromTheName) {
  EXPECT_EQ(flag_name(key_of("engine.spin_us")), "--engine-spin-us");
  EXPECT_EQ(environment_name(key_of("engine.spin_us")), "EXPERTD_ENGINE_SPIN_US");
  EXPECT_EQ(flag_name(key_of("runtime_directory")), "--runtime-directory");
  EXPECT_EQ(environment_name(key_of("runtime_directory")), "EXPERTD_RUNTIME_DIRECTORY");
}

TEST(ConfigTable, FindsTheNearestKeyInAnotherSection) {
  EXPECT_EQ(nearest_key("control", "spin_us"), "engine.spin_us");
  EXPECT_EQ(nearest_key("", "portt"), "metrics.port");
}

TEST(ConfigTable, FindsNothingNearAnUnrelatedWord) {
  EXPECT_EQ(nearest_key("control", "zzzzzzzzzz"), "");
  EXPECT_EQ(nearest_section("zzzzzzzzzz"), "");
}

TEST(ConfigValue, TakesDurationsWithUnits) {
  EXPECT_EQ(literal("engine.op_deadline", "100s"), "\"100s\"");
  EXPECT_EQ(literal("engine.op_deadline", "500ms"), "\"500ms\"");
  EXPECT_EQ(literal("engine.op_deadline", "60 min"), "\"1h\"");
  EXPECT_EQ(literal("engine.op_deadline", "1500000us"), "\"1500ms\"");
  EXPECT_EQ(literal("engine.op_deadline", "1000000ns"), "\"1ms\"");
}

TEST(ConfigValue, CountsAPlainDurationInTheKeysUnit) {
  EXPECT_EQ(literal("control.drain_timeout", "45"), "\"45s\"");
}

TEST(ConfigValue, TakesSizesWithUnits) {
  EXPECT_EQ(literal("device.pool_max_bytes", "64MiB"), "\"64MiB\"");
  EXPECT_EQ(literal("device.pool_max_bytes", "2048KiB"), "\"2MiB\"");
  EXPECT_EQ(literal("device.pool_max_bytes", "1073741824"), "\"1GiB\"");
  EXPECT_EQ(literal("device.pool_max_bytes", "1TiB"), "\"1TiB\"");
  EXPECT_EQ(literal("device.pool_max_bytes", "17"), "\"17B\"");
}

TEST(ConfigValue, RefusesUnitsThatItDoesNotKnow) {
  EXPECT_TRUE(refused("device.pool_max_bytes", "64MB"));
  EXPECT_TRUE(refused("device.pool_max_bytes", "MiB"));
  EXPECT_TRUE(refused("engine.op_deadline", "3 fortnights"));
  EXPECT_TRUE(refused("engine.op_deadline", "1.5s"));
  EXPECT_TRUE(refused("engine.op_deadline", "-1s"));
  EXPECT_TRUE(refused("engine.op_deadline", ""));
}

TEST(ConfigValue, RefusesNumbersThatOverflow) {
  EXPECT_TRUE(refused("device.pool_max_bytes", "99999999999TiB"));
  EXPECT_TRUE(refused("device.pool_max_bytes", "99999999999999999999999"));
  EXPECT_TRUE(refused("engine.spin_us", "99999999999999999999999"));
}

TEST(ConfigValue, TakesAutoOnlyWhereTheKeyHasIt) {
  EXPECT_EQ(literal("device.pool_bytes", "auto"), "\"auto\"");
  EXPECT_TRUE(refused("device.pool_max_bytes", "auto"));
}

TEST(ConfigValue, NamesTheAllowedRange) {
  EXPECT_EQ(literal("engine.spin_us", "2000000"), "2000000 is out of range, allowed 0 to 1000000");
  EXPECT_EQ(literal("engine.op_deadline", "25h"), "25h is out of range, allowed 1ms to 24h");
}

TEST(ConfigValue, TakesBothEndsOfARange) {
  for (const char* text : {"0", "1000000"}) {
    EXPECT_EQ(literal("engine.spin_us", text), text);
  }
  for (const char* text : {"-1", "64"}) {
    EXPECT_EQ(literal("device.hosts", text), text);
  }
  EXPECT_TRUE(refused("device.hosts", "-2"));
  EXPECT_TRUE(refused("device.hosts", "65"));
}

TEST(ConfigValue, WantsAPowerOfTwoForRingSlots) {
  EXPECT_EQ(literal("engine.ring_slots", "16"), "16");
  EXPECT_TRUE(refused("engine.ring_slots", "48"));
  EXPECT_TRUE(refused("engine.ring_slots", "128"));
}

TEST(ConfigValue, ReadsModesInOctal) {
  const base::Result<Value> value = parse_value(key_of("control.socket_mode"), "0640");
  ASSERT_TRUE(value.is_ok());
  EXPECT_EQ(value.value().integer, 0640);
  EXPECT_EQ(format_value(key_of("control.socket_mode"), value.value()), "\"0640\"");
  EXPECT_TRUE(refused("control.socket_mode", "0980"));
  EXPECT_TRUE(refused("control.socket_mode", "1777"));
}

TEST(ConfigValue, ListsTheChoicesWhenNoneFits) {
  EXPECT_EQ(literal("log.level", "verbose"), "\"verbose\" is not one of trace, debug, info, warn, error");
  EXPECT_EQ(literal("engine.schedule", "lifo"), "\"lifo\" is not one of latency, fair, fifo");
  EXPECT_TRUE(refused("log.level", ""));
  EXPECT_TRUE(refused("log.level", "trace|debug"));
}

TEST(ConfigValue, TakesGpuIndicesAndUuids) {
  EXPECT_EQ(literal("device.gpus", "0, 3"), "\"0,3\"");
  EXPECT_EQ(literal("device.gpus", "GPU-0a1b-2c"), "\"GPU-0a1b-2c\"");
  EXPECT_EQ(literal("device.gpus", "none"), "\"none\"");
}

TEST(ConfigValue, RefusesGpuListsThatMakeNoSense) {
  for (const char* text : {"", "0,", "0,0", "all", "-1", "64", "00", "GPU-", "GPU-xyz", "auto,0"}) {
    EXPECT_TRUE(refused("device.gpus", text)) << text;
  }
}

TEST(ConfigValue, SaysThatMigInstancesCannotBeUsed) {
  EXPECT_NE(literal("device.gpus", "MIG-0a1b").find("MIG instance"), std::string::npos);
}

TEST(ConfigValue, WantsAbsolutePaths) {
  EXPECT_TRUE(refused("runtime_directory", "run/expertd"));
  EXPECT_TRUE(refused("runtime_directory", ""));
  EXPECT_TRUE(refused("control.socket", "@abstract"));
  EXPECT_EQ(literal("control.socket", ""), "\"\"");
  EXPECT_EQ(literal("runtime_directory", "/run/expertd//"), "\"/run/expertd\"");
}

TEST(ConfigValue, RefusesTextThatIsNotPrintable) {
  EXPECT_TRUE(refused("control.socket_group", "a\nb"));
  EXPECT_TRUE(refused("control.socket_group", "\xC3"));
  EXPECT_TRUE(refused("control.socket_group", std::string(5000, 'a')));
  EXPECT_EQ(literal("control.socket_group", "gr\xC3\xBCn"), "\"gr\xC3\xBCn\"");
}

TEST(ConfigValue, WantsAnAddressLiteral) {
  EXPECT_EQ(literal("metrics.address", "::1"), "\"::1\"");
  EXPECT_TRUE(refused("metrics.address", "localhost"));
  EXPECT_TRUE(refused("metrics.address", ""));
}

TEST(ConfigValue, TakesListsOfUserIds) {
  EXPECT_EQ(literal("control.allowed_uids", "0, 1000"), "[0, 1000]");
  EXPECT_EQ(literal("control.allowed_uids", "[0, 1000]"), "[0, 1000]");
  EXPECT_EQ(literal("control.allowed_uids", "[]"), "[]");
  EXPECT_TRUE(refused("control.allowed_uids", "1000,root"));
  EXPECT_TRUE(refused("control.allowed_uids", "[1000"));
  EXPECT_TRUE(refused("control.allowed_uids", "4294967295"));
  EXPECT_TRUE(refused("control.allowed_uids", "-1"));
}

TEST(ConfigTable, SaysOfEveryListWhatItsEntriesAre) {
  for (const Key& key : keys()) {
    if (key.type == Type::kTextList) {
      EXPECT_NE(key.accepts, nullptr) << full_name(key);
    }
    EXPECT_EQ(key.accepts == nullptr, key.form.empty()) << full_name(key);
  }
}

TEST(ConfigValue, TakesListsOfPeers) {
  EXPECT_EQ(literal("fabric.rendezvous", "a-1.svc:9465, [fd00::1]:1"), "[\"a-1.svc:9465\", \"[fd00::1]:1\"]");
  EXPECT_EQ(literal("fabric.rendezvous", "dns:expertd.ml.svc:9465"), "[\"dns:expertd.ml.svc:9465\"]");
  EXPECT_EQ(literal("fabric.rendezvous", ""), "[]");
  EXPECT_EQ(literal("fabric.rendezvous", "[]"), "[]");
  for (const char* text : {"a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "a:1,", "a:1,,b:1", "a:1,a:1", "a b:1",
                           "fd00::1:9465", "[fd00::1]", "[a]:1", "dns::1", "dns:a", "dns:[fd00::1]:1", "http://a:1"}) {
    EXPECT_TRUE(refused("fabric.rendezvous", text)) << text;
  }
  std::string many;
  for (int i = 0; i < 65; ++i) {
    many += (i == 0 ? "n" : ",n") + std::to_string(i) + ":1";
  }
  EXPECT_TRUE(refused("fabric.rendezvous", many));
  EXPECT_FALSE(refused("fabric.rendezvous", many.substr(0, many.rfind(','))));
}

TEST(ConfigValue, TakesListsOfEtcds) {
  EXPECT_EQ(literal("fabric.etcd", "http://a-1:2379, http://[fd00::1]:1"),
            "[\"http://a-1:2379\", \"http://[fd00::1]:1\"]");
  EXPECT_EQ(literal("fabric.etcd", ""), "[]");
  for (const char* text : {"a:2379", "https://a:2379", "http://", "http://a", "http://a:0", "http://a:2379/v3",
                           "http://dns:a:2379", "http://u@a:1", "http://a:1,http://a:1", "unix:a"}) {
    EXPECT_TRUE(refused("fabric.etcd", text)) << text;
  }
  for (const char* text : {"/expertd", "/a/b-c_d.e", "/1"}) {
    EXPECT_FALSE(refused("fabric.etcd_prefix", text)) << text;
  }
  for (const std::string& text : {std::string(), std::string("/"), std::string("expertd"), std::string("/expertd/"),
                                  std::string("/a b"), std::string("/a\n"), "/" + std::string(200, 'a')}) {
    EXPECT_TRUE(refused("fabric.etcd_prefix", text)) << text;
  }
  EXPECT_FALSE(refused("fabric.etcd_lease", "2s"));
  EXPECT_TRUE(refused("fabric.etcd_lease", "1s"));
  EXPECT_TRUE(refused("fabric.etcd_lease", "61s"));
}

TEST(ConfigValue, WantsAnAddressWithAPortToListenOn) {
  EXPECT_EQ(literal("fabric.listen", "[::]:0"), "\"[::]:0\"");
  EXPECT_EQ(literal("fabric.listen", "10.0.0.1:65535"), "\"10.0.0.1:65535\"");
  for (const char* text : {"", "10.0.0.1", "host:1", "::1:1", "10.0.0.1:70000", "[10.0.0.1]:1", " 10.0.0.1:1"}) {
    EXPECT_TRUE(refused("fabric.listen", text)) << text;
  }
}

TEST(ConfigValue, TakesNamesOfNodesHostsTransportsAndDevices) {
  EXPECT_EQ(literal("fabric.node_name", "rack 1"), "\"rack 1\"");
  EXPECT_TRUE(refused("fabric.node_name", std::string(65, 'x')));
  EXPECT_TRUE(refused("fabric.node_name", "n\xC3\xBC"));
  EXPECT_EQ(literal("fabric.advertise", "fd00::1"), "\"fd00::1\"");
  EXPECT_EQ(literal("fabric.advertise", ""), "\"\"");
  EXPECT_TRUE(refused("fabric.advertise", "host:1"));
  EXPECT_EQ(literal("fabric.devices", "mlx5_0:1,eth0"), "[\"mlx5_0:1\", \"eth0\"]");
  EXPECT_TRUE(refused("fabric.devices", "eth0;rm"));
  EXPECT_EQ(literal("fabric.transports", "tcp;shm"),
            "\"tcp;shm\" is not a list of at most 64 different names such as \"tcp\", \"shm\" or \"rc\"");
}

TEST(ConfigValue, QuotesWhatTomlAndJsonWantQuoted) {
  EXPECT_EQ(quote("a\"b\\c\n\x7F"), "\"a\\\"b\\\\c\\u000A\\u007F\"");
}

}  // namespace
}  // namespace expertd::config
