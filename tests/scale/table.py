# SPDX-License-Identifier: Apache-2.0
"""The rows of loopback.json as the tables of README.md."""
DAEMON_COLUMNS = (
    ("nodes", "nodes", "{}"),
    ("ranks", "ranks", "{}"),
    ("hidden", "hidden", "{}"),
    ("heartbeat_ms", "heartbeat ms", "{}"),
    ("start_s", "start s", "{:.2f}"),
    ("join_normal_s", "group HT s", "{:.3f}"),
    ("join_inference_s", "group LL s", "{:.3f}"),
    ("connections_per_daemon", "connections", "{:.0f}"),
    ("threads", "threads", "{}"),
    ("rss_before_mib", "MiB alone", "{:.1f}"),
    ("rss_mib", "MiB at most", "{:.1f}"),
    ("private_per_peer_mib", "private MiB per peer", "{:.2f}"),
    ("shared_per_peer_mib", "shared MiB per peer", "{:.2f}"),
    ("kept_per_peer_mib", "kept MiB per peer", "{:.2f}"),
)
OPERATION_COLUMNS = (
    ("nodes", "nodes", "{}"),
    ("ranks", "ranks", "{}"),
    ("hidden", "hidden", "{}"),
    ("name", "operation", "{}"),
    ("routing", "routing", "{}"),
    ("tokens", "tokens", "{}"),
    ("verified", "verified", "{}"),
    ("other_nodes_per_token", "other nodes per token", "{:.2f}"),
    ("bytes_per_token", "bytes per token", "{:.0f}"),
    ("bound_bytes_per_token", "bound", "{:.0f}"),
    ("ratio", "÷ bound", "{:.3f}"),
    ("ratio_with_tables", "÷ bound with tables", "{:.3f}"),
    ("ratio_to_one_per_rank", "÷ one per rank", "{:.3f}"),
    ("ratio_to_one_per_expert", "÷ one per expert", "{:.3f}"),
    ("messages_per_operation_and_daemon", "messages per daemon", "{:.1f}"),
    ("p50_us", "p50 µs", "{:.0f}"),
)


def markdown(rows, columns):
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["-" if row.get(key) is None else text.format(row[key]) for key, _, text in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def daemon_rows(rows):
    """One per cluster: what its rows have in common, and how long the group of each mode took."""
    clusters = {}
    for row in rows:
        cluster = clusters.setdefault((row["nodes"], row["ranks"]), dict(row))
        cluster[f"join_{row['mode']}_s"] = row["join_s"]
    return list(clusters.values())


def print_table(document):
    rows = [dict(row, name=row["operation"] + " " + row["flags"]) for row in document["rows"]]
    print(markdown(daemon_rows(rows), DAEMON_COLUMNS))
    print()
    print(markdown(rows, OPERATION_COLUMNS))
    if "limit" in document:
        print(f"\nOne node more than fabric.max_nodes: {document['limit']['text']}")
