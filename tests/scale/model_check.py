#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Holds the model of `expertctl plan` to the small cases of results/loopback.json: prints time measured, time modelled and the
deviation. Rate and latency come from ucx_floor on this machine, or from --total-gb-per-s and --latency-us.

Daemons of one machine have no NICs: they share its processors, so that a daemon's rate is the rate of both directions of two
processes, all of them together, divided by the daemons. What an operation costs besides is the measured barrier."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NODES_MOST = 8
FLOOR_SECONDS = 120


def measured_link(bin_dir):
    """(GB/s of both directions together, one-way µs) of two bare UCX processes."""
    command = [bin_dir / "bench" / "ucx_floor", "--transports", "tcp", "--devices", "lo", "--both", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=FLOOR_SECONDS, check=True)
    figures = json.loads(ran.stdout)
    return figures["gb_per_s"], figures["one_way_p50_us"]


def modelled_us(arguments, row, total_gb_per_s, latency_us):
    """The model's time of one operation of a row of loopback.json."""
    dtype = "fp8" if "fp8" in row["flags"] else "bf16"
    rate = total_gb_per_s / row["nodes"]
    command = [
        arguments.bin_dir / "expertctl", "plan", "--json", "--gpus-per-node", "1", "--nic-gb-per-s", str(rate),
        "--nvlink-gb-per-s", "1000", "--latency-us", str(latency_us), "--message-us", "0",
        "--operation-us", str(row["barrier_us"]), "--hidden", str(row["hidden"]), "--top-k", str(row["top_k"]),
        "--experts", str(row["experts"]), "--tokens", str(row["tokens"]), "--ll-tokens", str(row["tokens"]), "--dtype", dtype,
    ]
    if row["routing"] == "group-limited":
        command += ["--expert-groups", "8", "--groups-per-token", "4"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    mode = "ht" if row["mode"] == "normal" else "ll"
    operation = "combine" if "combine" in row["operation"] else "dispatch"
    rows = json.loads(ran.stdout)["rows"]
    estimate = next(it for it in rows if it["nodes"] == row["nodes"])[f"{mode}_{operation}"]
    return estimate["time_us"], estimate["other_nodes_per_token"]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=HERE / "results" / "loopback.json")
    parser.add_argument("--bin-dir", type=Path, default=Path(os.environ.get("EXPERTD_BIN_DIR", HERE / "../../build/bin")).resolve())
    parser.add_argument("--total-gb-per-s", type=float, help="instead of ucx_floor, both directions of two processes together")
    parser.add_argument("--latency-us", type=float, help="instead of ucx_floor, one way")
    arguments = parser.parse_args(argv)
    if arguments.total_gb_per_s and arguments.latency_us is not None:
        total, latency = arguments.total_gb_per_s, arguments.latency_us
    else:
        total, latency = measured_link(arguments.bin_dir)
    print(f"link: {total:.2f} GB/s for both directions of two processes, {latency:.1f} µs one way\n")
    print("| nodes | operation | routing | other nodes per token, measured / modelled | barrier µs | measured µs | modelled µs | deviation |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [it for it in json.loads(arguments.file.read_text())["rows"] if it["nodes"] == it["ranks"] <= NODES_MOST]
    for row in rows:
        time_us, other = modelled_us(arguments, row, total, latency)
        print(f"| {row['nodes']} | {row['operation']} {row['flags']} | {row['routing']} | {row['other_nodes_per_token']:.2f} / "
              f"{other:.2f} | {row['barrier_us']:.0f} | {row['p50_us']:.0f} | {time_us:.0f} | {row['p50_us'] / time_us - 1:+.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
