#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""dockerfile_test FILE: the structure of the image build. First shows on damaged copies that each rule can fail."""
import re
import sys
from pathlib import Path

STAGES = ["deps", "ucx-source", "ucx-distribution", "ucx-cuda", "ucx", "build", "runtime"]


def instructions(text):
    """(name, argument) of each instruction, continuation lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def split_stages(parsed):
    """Per stage: (name, base, its instructions)."""
    stages = []
    for name, argument in parsed:
        if name == "FROM":
            base, _, alias = argument.partition(" AS ")
            stages.append((alias.strip(), base.strip(), []))
        elif stages:
            stages[-1][2].append((name, argument))
    return stages


def check_bases(parsed, stages):
    defaults = dict(argument.split("=", 1) for name, argument in parsed if name == "ARG" and "=" in argument)
    breaches = []
    for alias, base, _ in stages:
        image = re.sub(r"\$\{(\w+)\}", lambda m: defaults.get(m.group(1), ""), base)
        if image in STAGES or image == "scratch":
            continue
        if ":" not in image or image.endswith(":latest"):
            breaches.append(f"stage {alias}: the base '{image}' has no fixed tag")
    return breaches


def check_runtime(body):
    names = [name for name, _ in body]
    last = dict(body)
    packages = " ".join(argument for name, argument in body if name == "RUN")
    rules = (
        (re.match(r"[1-9]\d*:[1-9]\d*$", last.get("USER", "")), "the user is not a number other than 0"),
        ("USER" in names and "RUN" not in names[names.index("USER") :], "something runs after the user was set"),
        (last.get("ENTRYPOINT", "").startswith('["/usr/bin/tini"'), "process 1 is not tini"),
        ("expertctl" in last.get("HEALTHCHECK", ""), "no health check by expertctl"),
        (last.get("STOPSIGNAL") == "SIGTERM", "the stop signal is not SIGTERM"),
        (any(name == "COPY" and "--from=build" in argument for name, argument in body), "takes nothing from build"),
        (not re.search(r"-dev\b|\bg\+\+(?!\d)\s|\bcmake\b", packages.replace("libgrpc++", "")), "has build packages"),
    )
    return [f"runtime: {message}" for good, message in rules if not good]


def check(text):
    parsed = instructions(text)
    stages = split_stages(parsed)
    breaches = []
    if [alias for alias, _, _ in stages] != STAGES:
        breaches.append(f"the stages are not {', '.join(STAGES)}")
    breaches += check_bases(parsed, stages)
    for name, argument in parsed:
        if name == "ADD":
            breaches.append("ADD fetches and unpacks; use COPY")
        if name == "RUN" and "apt-get install" in argument:
            if "--no-install-recommends" not in argument or "rm -rf /var/lib/apt/lists" not in argument:
                breaches.append("apt-get install with recommends, or lists left behind")
        if name in ("RUN", "ENV", "ARG") and re.search(r"(?i)(password|secret|token)=", argument):
            breaches.append(f"{name} carries a secret")
        if name == "RUN" and re.search(r"\b(curl|wget)\b", argument):
            breaches.append("a download at build time")
    return breaches + (check_runtime(stages[-1][2]) if stages else [])


# What to replace, by what, and part of the breach that must follow.
DAMAGE = (
    ("AS deps", "AS base", "stages are not"),
    ("BUILD_BASE=debian:12-slim", "BUILD_BASE=debian:latest", "no fixed tag"),
    ("RUNTIME_BASE=debian:12-slim", "RUNTIME_BASE=debian", "no fixed tag"),
    ("COPY . .", "ADD . .", "use COPY"),
    ("USER 64646:64646", "USER 0:0", "other than 0"),
    ("USER 64646:64646", "USER 64646:64646\nRUN true", "runs after"),
    ("USER 64646:64646\n", "", "other than 0"),
    ('["/usr/bin/tini", "--", ', "[", "not tini"),
    ("HEALTHCHECK", "LABEL a=", "no health check"),
    ("--no-install-recommends", "", "with recommends"),
    ("tini \\\n", "tini libucx-dev \\\n", "build packages"),
    ("COPY . .", "RUN curl x", "download"),
    ("COPY --from=build", "COPY --from=deps", "nothing from build"),
)


def main():
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    breaches = check(text)
    for what, by, wanted in DAMAGE:
        if what not in text or not any(wanted in breach for breach in check(text.replace(what, by))):
            breaches.append(f"rule without effect: {what!r} -> {by!r}")
    print("\n".join(breaches) if breaches else f"dockerfile: {len(DAMAGE)} rules shown to bite")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
