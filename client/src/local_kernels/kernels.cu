// SPDX-License-Identifier: Apache-2.0
// All kernels of the library, one translation unit for one image.
#include "client/src/local_kernels/exchange_combine.cu"
#include "client/src/local_kernels/exchange_dispatch.cu"
#include "client/src/local_kernels/exchange_ht_move.cu"
#include "client/src/local_kernels/exchange_ht_reduce.cu"
#include "client/src/local_kernels/exchange_ht_route.cu"
#include "client/src/local_kernels/layout.cu"
