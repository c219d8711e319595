// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/format.h"

#include <gtest/gtest.h>

namespace expertd::ctl {
namespace {

TEST(CtlFormat, Sizes) {
  EXPECT_EQ(size_text(0), "0 B");
  EXPECT_EQ(size_text(1023), "1023 B");
  EXPECT_EQ(size_text(1024), "1.0 KiB");
  EXPECT_EQ(size_text(1536), "1.5 KiB");
  EXPECT_EQ(size_text((1ULL << 20) - 1), "1.0 MiB");  // never "1024.0 KiB"
  EXPECT_EQ(size_text(2ULL << 30), "2.0 GiB");
  EXPECT_EQ(size_text(UINT64_MAX), "16384.0 PiB");
}

TEST(CtlFormat, RatesAreDecimal) {
  EXPECT_EQ(rate_text(0), "0 B/s");
  EXPECT_EQ(rate_text(999), "999 B/s");
  EXPECT_EQ(rate_text(357.2e9), "357.2 GB/s");
  EXPECT_EQ(count_text(950), "950");
  EXPECT_EQ(count_text(12'340), "12.3 k");
}

TEST(CtlFormat, Durations) {
  EXPECT_EQ(duration_text(0), "0 ns");
  EXPECT_EQ(duration_text(999), "999 ns");
  EXPECT_EQ(duration_text(12'340), "12.3 µs");
  EXPECT_EQ(duration_text(999'990), "1.0 ms");
  EXPECT_EQ(duration_text(2'500'000'000), "2.5 s");
  EXPECT_EQ(duration_text(59'960'000'000), "1 min");
  EXPECT_EQ(duration_text(200'000'000'000), "3 min 20 s");
  EXPECT_EQ(duration_text(7'500'000'000'000), "2 h 5 min");
  EXPECT_EQ(duration_text(99ULL * 3600 * 1'000'000'000), "4 d 3 h");
}

TEST(CtlFormat, Masks) {
  EXPECT_EQ(mask_text(0), "-");
  EXPECT_EQ(mask_text(1), "0");
  EXPECT_EQ(mask_text(0b11), "0,1");
  EXPECT_EQ(mask_text(0b1001111), "0-3,6");
  EXPECT_EQ(mask_text(UINT64_MAX), "0-63");
  EXPECT_EQ(mask_text(1ULL << 63), "63");
}

TEST(CtlFormat, ParsesDurations) {
  EXPECT_EQ(parse_duration_ns("30s"), 30'000'000'000U);
  EXPECT_EQ(parse_duration_ns("500ms"), 500'000'000U);
  EXPECT_EQ(parse_duration_ns("5m"), 300'000'000'000U);
  EXPECT_EQ(parse_duration_ns("2"), 2'000'000'000U);
  EXPECT_EQ(parse_duration_ns("0"), 0U);
  for (const char* wrong : {"", "s", "-1s", "1.5s", "1 s", "10 days", "99999999999999999999", "9999999999h"}) {
    EXPECT_FALSE(parse_duration_ns(wrong).has_value()) << wrong;
  }
}

TEST(CtlFormat, TablesLineUp) {
  Table table({{"NAME"}, {"P50", Align::kRight}, {"X"}});
  table.add({"a", "12.3 µs", "1"});
  table.add({"longer", "1 ns"});
  EXPECT_EQ(table.text(),
            "NAME        P50  X\n"
            "a       12.3 µs  1\n"
            "longer     1 ns\n");
}

}  // namespace
}  // namespace expertd::ctl
