#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Starts N daemons on the loopback address, forms one group over all of them, runs and verifies operations of both modes,
and writes what a daemon needs per node, and what crosses per token against the least that has to, to results/loopback.json.

Rows of other node counts stay in the file, so that a run with --only adds to it. README.md says what the columns mean."""
import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from bounds import OPERATIONS
from daemons import Cluster, Failed, connections
from table import print_table

HERE = Path(__file__).resolve().parent
NODE_COUNTS = (2, 4, 8, 16, 32, 64)
FEW_ITERATIONS = 2  # the least that bench takes
BARRIERS = 20
TOP_K = 8
IDLE_SECONDS = 2.0
SAMPLE_SECONDS = 0.5
HEARTBEAT_MS = 100
HEARTBEAT_MANY_MS = 1000  # above 8 daemons, so that processes that wait for a processor are not taken for lost ones
# nodes: (hidden, tokens of normal mode, tokens of inference mode, iterations).
# With 8 ranks per node a half of the tokens and fewer channels: what checks the outputs shares the processors.
SHAPES = {
    2: (7168, 256, 128, 12),
    4: (7168, 128, 128, 8),
    8: (7168, 64, 64, 6),
    16: (1024, 64, 64, 6),
    32: (256, 64, 32, 8),
    64: (256, 32, 16, 6),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


class Case:
    """A cluster's shape and how long anything of it may take."""

    def __init__(self, arguments, nodes, ranks_per_node):
        hidden, tokens, ll_tokens, iterations = SHAPES.get(nodes, SHAPES[64])
        if ranks_per_node > 1:
            hidden, tokens, ll_tokens = min(hidden, 1024), max(8, tokens // 2), max(8, ll_tokens // 2)
            iterations = 4
        if nodes * ranks_per_node > 64:
            # 512 ranks have a count matrix of 2 MiB for every operation and handle, and windows for rows of all of them.
            hidden, tokens, ll_tokens, iterations = 128, 8, 8, 2
        self.nodes = nodes
        self.ranks_per_node = ranks_per_node
        self.ranks = nodes * ranks_per_node
        self.hidden = arguments.hidden or hidden
        self.tokens = arguments.tokens or tokens
        self.ll_tokens = arguments.ll_tokens or ll_tokens
        self.iterations = iterations
        self.experts = -(-max(256, self.ranks) // self.ranks) * self.ranks  # a multiple of the ranks
        self.heartbeat_ms = arguments.heartbeat_ms or (HEARTBEAT_MS if nodes <= 8 else HEARTBEAT_MANY_MS)
        self.max_nodes = 64
        # Hundreds of loops share a few processors: none polls when it has nothing to do.
        self.spin_us = 50 if self.ranks <= 64 else 0
        self.seconds = arguments.seconds
        self.expertd = arguments.bin_dir / "expertd"
        self.expertctl = arguments.bin_dir / "expertctl"

    def tokens_of(self, mode):
        return self.tokens if mode == "normal" else self.ll_tokens


class Sampler(threading.Thread):
    """The most memory, threads and connections that each daemon had while it ran."""

    def __init__(self, daemons):
        super().__init__(daemon=True)
        self.daemons = daemons
        self.most = {}
        self.ended = threading.Event()

    def take(self):
        for daemon in self.daemons:
            seen = self.most.setdefault(daemon.index, {})
            for name, value in daemon.memory().items():
                seen[name] = max(seen.get(name, 0), value)

    def run(self):
        while not self.ended.wait(SAMPLE_SECONDS):
            self.take()

    def __exit__(self, *_):
        self.ended.set()
        self.join(10)
        self.take()

    def __enter__(self):
        self.start()
        return self


def bench(case, cluster, mode, rows, iterations, routing):
    """expertctl bench over all ranks; its document."""
    command = [str(case.expertctl), "bench", "--json", "--devices", cluster.devices(), "--mode", mode]
    command += ["--hidden", str(case.hidden), "--experts", str(case.experts), "--top-k", str(TOP_K)]
    command += ["--tokens", str(case.tokens), "--ll-tokens", str(case.ll_tokens)]
    command += ["--iterations", str(iterations), "--warmup", "0", "--timeout", f"{case.seconds}s"]
    if routing == "group-limited":
        command += ["--expert-groups", "8", "--groups-per-token", "4"]
    for row in rows:
        command += ["--only", row]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=case.seconds + 10)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{mode} {rows} not done in {case.seconds} s: {late.stderr}") from late
    if ran.returncode != 0:
        raise Failed(f"{mode} {rows}: exit {ran.returncode}: {ran.stdout[-600:]} {ran.stderr[-600:]}")
    return json.loads(ran.stdout)


class Sent:
    """What the fabric had sent at one moment: bytes of TCP, and messages and bytes of the daemons' metrics, each None where it
    cannot be had."""

    def __init__(self, daemons):
        sockets = connections(daemons)
        self.tcp = None if sockets is None else sum(entry["sent"] for entry in sockets.values())
        counters = [daemon.fabric_counters() for daemon in daemons]
        whole = all(it is not None for it in counters)
        self.messages = sum(it["messages"] for it in counters) if whole else None
        self.metric_bytes = sum(it["bytes"] for it in counters) if whole else None
        self.at = time.monotonic()

    def since(self, before):
        """Differences, and the seconds between."""
        found = {"seconds": self.at - before.at}
        for name in ("tcp", "messages", "metric_bytes"):
            mine, earlier = getattr(self, name), getattr(before, name)
            found[name] = None if mine is None or earlier is None else mine - earlier
        return found


def idle_rates(daemons):
    before = Sent(daemons)
    time.sleep(IDLE_SECONDS)
    moved = Sent(daemons).since(before)
    return {name: None if moved[name] is None else moved[name] / moved["seconds"] for name in moved}


def per_operation(case, cluster, operation, routing, idle):
    """Runs the operation a few times and more times: what the runs differ by is what operations cost, without what joining,
    routing and connecting send. Less what heartbeats send meanwhile."""
    moved = []
    for iterations in (FEW_ITERATIONS, FEW_ITERATIONS + case.iterations):
        before = Sent(cluster.daemons)
        document = bench(case, cluster, operation.mode, [operation.row], iterations, routing)
        moved.append(Sent(cluster.daemons).since(before))
    few, many = moved
    spread = {}
    for name in ("tcp", "messages", "metric_bytes"):
        if few[name] is None or many[name] is None or idle[name] is None:
            spread[name] = None
            continue
        heartbeats = idle[name] * (many["seconds"] - few["seconds"])
        spread[name] = (many[name] - few[name] - heartbeats) / case.iterations
    return document, spread


def operation_row(case, cluster, operation, routing, idle):
    document, moved = per_operation(case, cluster, operation, routing, idle)
    tokens = case.ranks * case.tokens_of(operation.mode)
    crossings = document["groups"][0]["crossings_per_token"]
    row_bytes = operation.row_bytes(case.hidden)
    bound = crossings["nodes"] * row_bytes
    entries = crossings["nodes"] * operation.entry_bytes(case.hidden, TOP_K, case.ranks_per_node)
    sent = None if moved["tcp"] is None else moved["tcp"] / tokens
    timed = document["rows"][0]
    return {
        "mode": operation.mode,
        "operation": timed["operation"],
        "flags": timed["flags"],
        "routing": routing,
        "tokens": timed["tokens"],
        "verified": timed["verified"],
        "p50_us": timed["p50_us"],
        "p99_us": timed["p99_us"],
        "join_again_s": document["groups"][0]["join_s"],
        "row_bytes": row_bytes,
        "other_nodes_per_token": crossings["nodes"],
        "bytes_per_token": sent,
        "bound_bytes_per_token": bound,
        "ratio": None if sent is None else sent / bound,
        "ratio_with_tables": None if sent is None else sent / entries,
        "ratio_to_one_per_rank": None if sent is None else sent / (crossings["ranks"] * row_bytes),
        "ratio_to_one_per_expert": None if sent is None else sent / (crossings["lanes"] * row_bytes),
        "metric_bytes_per_token": None if moved["metric_bytes"] is None else moved["metric_bytes"] / tokens,
        "messages_per_token": None if moved["messages"] is None else moved["messages"] / tokens,
        "messages_per_operation_and_daemon": None if moved["messages"] is None else moved["messages"] / case.nodes,
    }


def mean(values):
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def daemon_facts(case, cluster, before, most, idle):
    """Of a daemon: means over all, and the most of any where that is what counts."""
    sockets = connections(cluster.daemons)
    peers = case.nodes - 1

    def grown(name):
        return mean([(most[i][name] - before[i][name]) / 1024 / peers for i in most if name in most[i]])

    return {
        "start_s": max(daemon.start_s for daemon in cluster.daemons),
        "connections_per_daemon": None if sockets is None else mean([entry["fabric"] for entry in sockets.values()]),
        "connections_most": None if sockets is None else max(entry["fabric"] for entry in sockets.values()),
        "bootstrap_connections_most": None if sockets is None else max(it["bootstrap"] for it in sockets.values()),
        "rss_before_mib": mean([before[i]["VmRSS"] / 1024 for i in before]),
        "rss_mib": mean([most[i]["VmRSS"] / 1024 for i in most]),
        "rss_per_peer_mib": grown("VmRSS"),
        "private_per_peer_mib": grown("RssAnon"),
        "shared_per_peer_mib": grown("RssShmem"),
        "threads": max(most[i]["Threads"] for i in most),
        "idle_bytes_per_s_and_peer": None if idle["tcp"] is None else idle["tcp"] / case.nodes / peers,
    }


def settled_memory(daemons):
    return {daemon.index: daemon.memory() for daemon in daemons}


def routings_of(case, operation):
    """Group-limited too where deduplication is looked at: few nodes, and what a dispatch sends."""
    limited = case.nodes <= 8 and operation.route_row is None
    return ("uniform", "group-limited") if limited else ("uniform",)


def measure(case):
    """Rows of one cluster, one per operation and routing."""
    say(f"{case.nodes} nodes x {case.ranks_per_node} ranks, hidden {case.hidden}: starting")
    load_before = os.getloadavg()[0]  # others' work: on a quiet machine below 1 for the first case
    with Cluster(case.nodes, case, max(60, case.seconds)) as cluster:
        before = settled_memory(cluster.daemons)
        say(f"  ready in {max(daemon.start_s for daemon in cluster.daemons):.2f} s")
        joins = {}
        with Sampler(cluster.daemons) as sampler:
            for mode in ("normal", "inference"):
                rows = [it.row for it in OPERATIONS if it.mode == mode]
                document = bench(case, cluster, mode, rows, FEW_ITERATIONS, "uniform")
                joins[mode] = document["groups"][0]["join_s"]
                say(f"  {mode}: group in {joins[mode]:.3f} s, {document['verified']} outputs verified")
        kept = settled_memory(cluster.daemons)
        idle = idle_rates(cluster.daemons)
        barrier = bench(case, cluster, "normal", ["barrier -", "dispatch bf16 exact"], BARRIERS, "uniform")["rows"][0]
        facts = daemon_facts(case, cluster, before, sampler.most, idle)
        peers = case.nodes - 1
        facts["barrier_us"] = barrier["p50_us"]
        facts["kept_per_peer_mib"] = mean([(kept[i]["VmRSS"] - before[i]["VmRSS"]) / 1024 / peers for i in kept])
        rows = []
        for operation in OPERATIONS:
            for routing in routings_of(case, operation):
                row = operation_row(case, cluster, operation, routing, idle)
                say(f"  {operation.row}, {routing}: {row['bytes_per_token'] or 0:.0f} bytes per token, "
                    f"bound {row['bound_bytes_per_token']:.0f}, p50 {row['p50_us']:.0f} us")
                rows.append({
                    "nodes": case.nodes, "ranks": case.ranks, "hidden": case.hidden, "top_k": TOP_K,
                    "experts": case.experts, "heartbeat_ms": case.heartbeat_ms, "load_before": load_before, "join_s": joins[operation.mode],
                    **row, **facts,
                })
        return rows


def refuse_one_more(arguments):
    """A host that takes two nodes, and a third: its rank is refused by name."""
    case = Case(arguments, 3, 1)
    case.hidden, case.max_nodes, case.experts = 128, 2, 3 * 86
    case.seconds = 5  # what the two that were taken wait for the third
    with Cluster(3, case) as cluster:
        try:
            bench(case, cluster, "normal", ["dispatch bf16 exact"], FEW_ITERATIONS, "uniform")
        except Failed as failed:
            text = str(failed)
            if "NODE_LIMIT" not in text:
                raise Failed(f"a third node of two was not refused by NODE_LIMIT but: {text}") from failed
            return {"max_nodes": 2, "nodes": 3, "refused": "NODE_LIMIT", "text": refusal_text(text)}
    raise Failed("a third node joined a rendezvous with fabric.max_nodes = 2")


def refusal_text(text):
    begin = text.find('"error": "')
    return text if begin < 0 else text[begin + 10 : text.find('",', begin)]


def hold_ratios(arguments, rows):
    for row in rows if arguments.ratio_max else ():
        if row["ratio"] is not None and row["ratio"] > arguments.ratio_max:
            raise Failed(f"{row['operation']} {row['flags']}: {row['ratio']:.3f} times the bound, more than {arguments.ratio_max}")


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def store(path, document):
    """Whole or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    os.replace(fresh, path)


def take_rows(document, case, rows):
    document["rows"] = [it for it in document["rows"] if (it["nodes"], it["ranks"]) != (case.nodes, case.ranks)] + rows
    document["rows"].sort(key=lambda it: (it["nodes"], it["ranks"]))
    document["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    document["machine"] = {"cpus": os.cpu_count(), "kernel": platform.release(), "transport": "tcp over lo"}


def cases_of(arguments):
    for nodes in arguments.only or NODE_COUNTS:
        if arguments.ranks_per_node:
            yield Case(arguments, nodes, arguments.ranks_per_node)
            continue
        yield Case(arguments, nodes, 1)
        if nodes <= 8:
            yield Case(arguments, nodes, 8)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, action="append", metavar="N", help="this many nodes alone; may be repeated")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="default 1, and 8 as well up to 8 nodes")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has already")
    parser.add_argument("--hidden", type=int, help="channels; default by the number of nodes")
    parser.add_argument("--tokens", type=int, help="tokens per rank in normal mode")
    parser.add_argument("--ll-tokens", type=int, help="tokens per rank in inference mode")
    parser.add_argument("--heartbeat-ms", type=int, help="default 100 up to 8 nodes, else 1000; more where much else runs")
    parser.add_argument("--ratio-max", type=float, help="fail where an operation sends more than so many times the bound")
    parser.add_argument("--seconds", type=int, default=120, help="longest time of one run of expertctl bench")
    parser.add_argument("--file", type=Path, default=HERE / "results" / "loopback.json", help="where rows are kept")
    parser.add_argument("--table", action="store_true", help="print the table of the file and end")
    parser.add_argument("--bin-dir", type=Path, default=Path(os.environ.get("EXPERTD_BIN_DIR", "build/bin")).resolve(),
                        help="folder of expertd and expertctl; default $EXPERTD_BIN_DIR")
    return parser.parse_args(argv)


def main(argv):
    arguments = parse(argv)
    document = load(arguments.file)
    if arguments.table:
        print_table(document)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    failures = 0
    done = {(it["nodes"], it["ranks"]) for it in document["rows"]}
    for case in cases_of(arguments):
        if arguments.resume and (case.nodes, case.ranks) in done:
            continue
        try:
            rows = measure(case)
            take_rows(document, case, rows)
            store(arguments.file, document)
            hold_ratios(arguments, rows)
        except Failed as failed:
            failures += 1
            say(f"scale: {case.nodes} nodes x {case.ranks_per_node} ranks: {failed}")
    try:
        document["limit"] = refuse_one_more(arguments)
        store(arguments.file, document)
    except Failed as failed:
        failures += 1
        say(f"scale: {failed}")
    print_table(document)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
