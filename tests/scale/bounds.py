# SPDX-License-Identifier: Apache-2.0
"""What has to cross between nodes, at least: bytes of a row, of a row in its message, and of the operations measured."""

ROW_NUMBER_BYTES = 4
SCALE_CHANNELS = 128


def align16(size):
    return (size + 15) // 16 * 16


class Operation:
    """One row of `expertctl bench`."""

    def __init__(self, mode, row, route_row=None):
        self.mode = mode
        self.row = row
        self.route_row = route_row  # the dispatch whose handle a combine uses; it runs twice beside it

    def row_bytes(self, hidden):
        """Of one row that crosses, without tables."""
        if "fp8" in self.row:
            return hidden + hidden // SCALE_CHANNELS * 4
        return hidden * 2

    def entry_bytes(self, hidden, top_k, ranks_per_node):
        """The same with the tables that travel in the messages (daemon/kernels/host/node_ops.h): for a combine what asks for
        the row and the row itself."""
        numbers = top_k if self.mode == "inference" else ranks_per_node
        tables = 8 + (numbers + top_k) * ROW_NUMBER_BYTES
        weights = top_k * 4 if self.mode == "inference" else 0
        if self.route_row is not None:
            return align16(tables + weights) + align16(align16(8) + hidden * 2)
        return align16(align16(tables) + self.row_bytes(hidden))


OPERATIONS = (
    Operation("normal", "dispatch bf16 exact"),
    Operation("normal", "combine bf16", "dispatch bf16 exact"),
    Operation("inference", "ll_dispatch fp8 float32 scales"),
    Operation("inference", "ll_combine bf16", "ll_dispatch bf16"),
)
