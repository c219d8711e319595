// SPDX-License-Identifier: Apache-2.0
// Bytes of grpc-status-details-bin: a google.rpc.Status with one detail, expertd.v1.ErrorInfo. Pure functions, any
// thread. Texts are cut to what fits into HTTP/2 metadata; nothing here fails.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "daemon/session/api.h"

namespace expertd::control {

/// Bounds of texts in an error; both the status and its details must fit into a client's 8 KiB of metadata.
inline constexpr size_t kMessageBytesMax = 1024;
inline constexpr size_t kFieldBytesMax = 256;

inline constexpr std::string_view kErrorInfoType = "type.googleapis.com/expertd.v1.ErrorInfo";

/// At most `bytes_max` bytes of a text, cut between UTF-8 characters.
std::string cut_text(std::string_view text, size_t bytes_max);

/// The serialized google.rpc.Status of an error that is not ok.
std::string encode_error_details(const session::ErrorDetail& error);

}  // namespace expertd::control
