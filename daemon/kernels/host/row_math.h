// SPDX-License-Identifier: Apache-2.0
// RowMath: the loops over the channels of rows, which are where host devices spend their time, compiled once for the
// vectors that every processor of the architecture has and once for each wider kind. All give the same bits: each
// channel is computed by itself in the order of its rows, and nothing is contracted or reassociated. Pure functions,
// any thread.
#pragma once

#include <cstdint>
#include <span>

#include "daemon/kernels/host/token_sum.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

struct RowMath {
  const char* name;
  /// Quantises one row of bf16 to `payload` [hidden] and one scale per 128 channels.
  void (*quantise_row)(const uint16_t* row, uint32_t hidden, ScaleForm form, uint8_t* payload, float* scales);
  /// As sum_rows and sum_lanes of token_sum.h.
  void (*sum_rows)(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out);
  void (*sum_lanes)(const OpShape& shape, const TokenRows& rows, const SumTerms& terms, uint16_t* out);
};

/// All that this processor can run, the plain one first and the fastest last.
std::span<const RowMath> row_maths();
/// The fastest.
const RowMath& row_math();

}  // namespace expertd::kernels::host
