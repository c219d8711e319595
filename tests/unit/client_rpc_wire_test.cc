// SPDX-License-Identifier: Apache-2.0
// Goal: the formats of gRPC on the wire and the verdict on a response, without a connection.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "client/rpc/grpc_wire.h"
#include "client/rpc/status_details.h"
#include "client/rpc/unary_response.h"

namespace expertd::rpc {
namespace {

std::string field(int number, std::string_view value) {
  std::string bytes(1, static_cast<char>(number << 3 | 2));
  bytes.push_back(static_cast<char>(value.size()));
  return bytes.append(value);
}

std::string any(std::string_view type_url, std::string_view value) {
  return field(3, field(1, type_url) + field(2, value));
}

UnaryResponse answered() {
  UnaryResponse response;
  response.add_header(":status", "200");
  response.add_header("content-type", "application/grpc+proto");
  return response;
}

TEST(RpcWire, FramesWithBigEndianSize) {
  EXPECT_EQ(frame_message(""), std::string(5, '\0'));
  EXPECT_EQ(frame_message(std::string(0x10203, 'x')).substr(0, 6), std::string("\0\0\1\2\3x", 6));
}

TEST(RpcWire, FormatsTimeoutsInAtMostEightDigitsRoundedUp) {
  EXPECT_EQ(format_timeout(1), "1n");
  EXPECT_EQ(format_timeout(99'999'999), "99999999n");
  EXPECT_EQ(format_timeout(100'000'001), "100001u");
  EXPECT_EQ(format_timeout(5'000'000'000), "5000000u");
  EXPECT_EQ(format_timeout(100'000'000'001), "100001m");
  EXPECT_EQ(format_timeout(std::numeric_limits<std::uint64_t>::max()), "5124096H");
}

TEST(RpcWire, DecodesPercentAndKeepsWhatIsMalformed) {
  EXPECT_EQ(percent_decode("a%20b%e2%9C%97"), "a b\xE2\x9C\x97");
  EXPECT_EQ(percent_decode("100%"), "100%");
  EXPECT_EQ(percent_decode("%4"), "%4");
  EXPECT_EQ(percent_decode("%zz%41"), "%zzA");
  EXPECT_EQ(percent_decode("%00").size(), 1u);
}

TEST(RpcWire, DecodesBase64WithAndWithoutPadding) {
  EXPECT_EQ(base64_decode(""), "");
  EXPECT_EQ(base64_decode("TQ=="), "M");
  EXPECT_EQ(base64_decode("TQ"), "M");
  EXPECT_EQ(base64_decode("TWE="), "Ma");
  EXPECT_EQ(base64_decode("TWFu"), "Man");
  EXPECT_EQ(base64_decode("/+8"), "\xff\xef");
  EXPECT_FALSE(base64_decode("TWFuT").has_value());
  EXPECT_FALSE(base64_decode("T-==").has_value());
  EXPECT_FALSE(base64_decode("TQ==,TQ==").has_value());
}

TEST(RpcResponse, TakesAMessageInAnyPieces) {
  UnaryResponse response = answered();
  for (const char c : frame_message("hello")) {
    EXPECT_TRUE(response.add_data(std::string_view(&c, 1)));
  }
  response.add_header("grpc-status", "0");
  const CallResult result = std::move(response).finish(0);
  EXPECT_EQ(result.grpc_status, 0);
  EXPECT_EQ(result.response, "hello");
}

TEST(RpcResponse, OkWithoutAWholeMessageIsInternal) {
  for (const std::string& body : {std::string(), frame_message("hello").substr(0, 7)}) {
    UnaryResponse response = answered();
    EXPECT_TRUE(response.add_data(body));
    response.add_header("grpc-status", "0");
    EXPECT_EQ(std::move(response).finish(0).grpc_status, 13);
  }
}

TEST(RpcResponse, RefusesTwoMessages) {
  UnaryResponse response = answered();
  EXPECT_FALSE(response.add_data(frame_message("a") + frame_message("b")));
  response.add_header("grpc-status", "0");
  EXPECT_EQ(std::move(response).finish(0).grpc_status, 13);
}

TEST(RpcResponse, RefusesCompressionAndOversize) {
  UnaryResponse compressed = answered();
  EXPECT_FALSE(compressed.add_data(std::string("\1\0\0\0\1x", 6)));
  EXPECT_EQ(std::move(compressed).finish(0).grpc_status, 13);
  UnaryResponse large = answered();
  EXPECT_FALSE(large.add_data(std::string("\0\xff\xff\xff\xff", 5)));
  EXPECT_FALSE(large.add_data("more"));
  EXPECT_EQ(std::move(large).finish(0).grpc_status, 8);
}

TEST(RpcResponse, StatusDropsTheMessageThatCameBefore) {
  UnaryResponse response = answered();
  EXPECT_TRUE(response.add_data(frame_message("half")));
  response.add_header("grpc-status", "10");
  response.add_header("grpc-message", "gone%21");
  response.add_header("grpc-status-details-bin", "!");
  const CallResult result = std::move(response).finish(0);
  EXPECT_EQ(result.grpc_status, 10);
  EXPECT_EQ(result.message, "gone!");
  EXPECT_EQ(result.details, "");
  EXPECT_EQ(result.response, "");
}

TEST(RpcResponse, HttpErrorPagesAreMappedAndTheirBodyIgnored) {
  UnaryResponse response;
  response.add_header(":status", "503");
  response.add_header("content-type", "text/html");
  EXPECT_TRUE(response.add_data("<html>a page longer than a prefix</html>"));
  EXPECT_EQ(std::move(response).finish(0).grpc_status, 14);
}

TEST(RpcResponse, MapsResetsAndMissingOrStrangeStatuses) {
  EXPECT_EQ(UnaryResponse().finish(0x7).grpc_status, 14);
  EXPECT_EQ(UnaryResponse().finish(0x8).grpc_status, 1);
  EXPECT_EQ(UnaryResponse().finish(0xb).grpc_status, 8);
  EXPECT_EQ(UnaryResponse().finish(0x2).grpc_status, 13);
  EXPECT_EQ(answered().finish(0).grpc_status, 2);
  for (const char* text : {"", "x", "-1", "0x", "99999999999"}) {
    UnaryResponse response = answered();
    response.add_header("grpc-status", text);
    EXPECT_EQ(std::move(response).finish(0).grpc_status, 2) << text;
  }
}

TEST(RpcResponse, AnotherContentTypeIsNotGrpc) {
  for (const char* type : {"text/plain", "application/grpc-web", "application/grp"}) {
    UnaryResponse response;
    response.add_header(":status", "200");
    response.add_header("content-type", type);
    EXPECT_TRUE(response.add_data(frame_message("x")));
    EXPECT_EQ(std::move(response).finish(0).message, "the response is not a gRPC response");
  }
}

TEST(StatusDetails, TakesTheFirstErrorInfoAmongOtherDetails) {
  const std::string bytes = std::string("\x08\x09", 2) + field(2, "why") + any("type.googleapis.com/other", "no") +
                            any(kErrorInfoType, "one") + any(kErrorInfoType, "two") + field(9, "unknown");
  const auto details = decode_status_details(bytes);
  ASSERT_TRUE(details.has_value());
  EXPECT_EQ(details->code, 9);
  EXPECT_EQ(details->message, "why");
  EXPECT_EQ(details->error_info, "one");
}

TEST(StatusDetails, TellsAnEmptyErrorInfoFromNone) {
  EXPECT_EQ(decode_status_details(any(kErrorInfoType, ""))->error_info, "");
  EXPECT_FALSE(decode_status_details("")->error_info.has_value());
}

TEST(StatusDetails, DecodesANegativeCode) {
  const std::string minus_one("\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11);
  EXPECT_EQ(decode_status_details(minus_one)->code, -1);
}

TEST(StatusDetails, RefusesEveryTruncationWithinAField) {
  const std::string bytes = field(2, "why") + any(kErrorInfoType, "value");
  for (std::size_t size = 1; size < bytes.size(); ++size) {
    const bool whole_first_field = size == field(2, "why").size();
    EXPECT_EQ(decode_status_details(std::string_view(bytes).substr(0, size)).has_value(), whole_first_field) << size;
  }
}

TEST(StatusDetails, SurvivesEverySingleByteChange) {
  const std::string bytes = std::string("\x08\x09", 2) + field(2, "why") + any(kErrorInfoType, "v");
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::string changed = bytes;
      changed[at] = static_cast<char>(value);
      const auto details = decode_status_details(changed);
      EXPECT_TRUE(!details.has_value() || details->message.size() <= bytes.size());
    }
  }
}

}  // namespace
}  // namespace expertd::rpc
