#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the limits that the house sets itself: files of at most 500 lines, functions of at most 70, an SPDX line at the
top of every source, no TODO of the kind now, no path of somebody's machine, no wall clock outside of the places that
are named here: whoever sets it must move no deadline.

limits [ROOT]: exits 1 with one line per breach.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
C_LIKE = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh"}
WITH_SPDX = C_LIKE | {".py", ".proto", ".cmake", ".sh", ".yaml", ".yml", ".toml", ".service", ".conf"}
WITH_SPDX_NAMES = {"CMakeLists.txt", "Makefile", "Dockerfile"}
SPDX = "SPDX-License-Identifier: Apache-2.0"
NO_TEXT = {".desc", ".bin", ".png"}
# Spelt so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.$}~/-])/(?:%s)/\w" % "|".join(("home", "work", "root", "Users")))
TODO_NOW = "TODO" + "(now)"
# Readings of the wall clock and waits until a time of it.
WALL_CLOCK = re.compile(
    r"\b(?:system_clock|high_resolution_clock|CLOCK_REALTIME\w*|CLOCK_TAI|gettimeofday|timespec_get|ftime"
    r"|sem_timedwait|pthread_\w+_timed\w+|mq_timed\w+|GPR_CLOCK_REALTIME)\b|(?<![\w.>])time\(\s*(?:nullptr|NULL|0|&\w+)\s*\)"
)
WITHOUT_WALL_CLOCK = ("daemon/", "client/", "proto/")
# gRPC takes and gives deadlines as a time of the wall clock; each of these converts with the clock of that moment.
OF_GRPC = "deadlines of gRPC"
WALL_CLOCK_PLACES = {
    "client/ctl/bench_report.cc": "the date in a report",
    "client/ctl/daemon_client.cc": OF_GRPC,
    "daemon/base/log.cc": "the time of a line",
    "daemon/control/control_server.cc": OF_GRPC,
    "daemon/fabric/bootstrap/peer_call.h": OF_GRPC,
    "daemon/fabric/bootstrap/peer_server.cc": OF_GRPC,
    "daemon/fabric/bootstrap/peer_services.cc": OF_GRPC,
    "daemon/fabric/bootstrap/probe_calls.cc": OF_GRPC,
    "daemon/group/etcd/etcd_store.cc": OF_GRPC,
}

TOKENS = re.compile(
    r"//[^\n]*|/\*.*?\*/"
    r'|R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'",
    re.DOTALL,
)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
SCOPE = re.compile(r'(?:^|[\s;}>)])(?:namespace|class|struct|union|enum|extern)\b')

TEMPLATE_PARAMETER = re.compile(r"\b(?:class|struct)\s+\w*\s*(?=[,>=.])")


def blank(match):
    """The same number of lines without text."""
    return " " + "\n" * match.group(0).count("\n")


def is_function(head):
    """Whether a brace after `head`, the text since the last statement, opens the body of a function."""
    if "(" not in head:
        return False
    before = TEMPLATE_PARAMETER.sub("", head[: head.index("(")])
    before = re.sub(r"\bextern\b", "", before)
    return not SCOPE.search(before) or " operator" in before or re.search(r"\b(struct|enum)\s+\w+\s*[*&]?\s+\w+$", before)


def c_functions(text):
    """(first line, length) of the bodies of the functions of a C or C++ source that are not within another."""
    code = DIRECTIVE.sub(blank, TOKENS.sub(blank, text))
    found = []
    stack = []  # per open brace: what it is, its line, its head
    head = ""
    line = 1
    for position, char in enumerate(code):
        line += char == "\n"
        inside = any(kind != "scope" for kind, _, _ in stack)
        if char == "{":
            if inside:
                kind = "inner"
            elif is_function(head):
                kind = "function"
            else:
                kind = "scope" if SCOPE.search(head) else "value"
            stack.append((kind, line, head))
            head = ""
        elif char == "}" and stack:
            kind, begin, head_before = stack.pop()
            head = ""
            if kind == "function" and re.match(r"\s*[,{]", code[position + 1 : position + 200]):
                head = head_before  # it was the initialiser of a member, and the body is yet to come
            elif kind == "function":
                found.append((begin, line - begin))
        elif char == ";" and not inside:
            head = ""
        elif not inside:
            head += char
    return found


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno


def functions(path, text):
    if path.suffix in C_LIKE:
        return c_functions(text)
    return list(python_functions(text)) if path.suffix == ".py" else []


def wants_spdx(path, lines):
    return path.suffix in WITH_SPDX or path.name in WITH_SPDX_NAMES or (lines and lines[0].startswith("#!"))


def wall_clocks(path, text):
    """Lines of a source that look at the wall clock and are not in a place named for it."""
    name = path.as_posix()
    if path.suffix not in C_LIKE or not name.startswith(WITHOUT_WALL_CLOCK) or name in WALL_CLOCK_PLACES:
        return []
    code = TOKENS.sub(blank, text)
    return [code.count("\n", 0, match.start()) + 1 for match in WALL_CLOCK.finditer(code)]


def check_file(path, text):
    """Breaches of one file as (line, message)."""
    lines = text.splitlines()
    breaches = []
    counted = path.suffix in C_LIKE | {".py", ".proto", ".cmake"} or path.name == "CMakeLists.txt"
    if counted and len(lines) > FILE_LINES_MAX:
        breaches.append((len(lines), f"{len(lines)} lines; a file has at most {FILE_LINES_MAX}"))
    if wants_spdx(path, lines):
        first = 1 if lines and lines[0].startswith("#!") else 0
        if len(lines) <= first or SPDX not in lines[first]:
            breaches.append((first + 1, f"the first line is not '{SPDX}'"))
    for begin, length in functions(path, text):
        if length > FUNCTION_LINES_MAX:
            breaches.append((begin, f"a function of {length} lines; the limit is {FUNCTION_LINES_MAX}"))
    for line in wall_clocks(path, text):
        breaches.append((line, "the wall clock; times are base::now_ns(), CLOCK_MONOTONIC"))
    for number, line in enumerate(lines, 1):
        if TODO_NOW in line:
            breaches.append((number, f"{TODO_NOW} does not land"))
        if MACHINE_PATH.search(line):
            breaches.append((number, "a path of one machine"))
    return breaches


def tree_files(root):
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    ).stdout.decode()
    return sorted(Path(name) for name in set(listed.split("\0")) if name)


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    count = 0
    breaches = []
    for path in tree_files(root):
        file = root / path
        if not file.is_file() or path.suffix in NO_TEXT or path.name == "LICENSE":
            continue
        count += 1
        text = file.read_text(encoding="utf-8", errors="replace")
        breaches += [f"{path}:{line}: {message}" for line, message in check_file(path, text)]
    print("\n".join(breaches) if breaches else f"limits: {count} files")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
