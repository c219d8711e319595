#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""manifests_test FILE...: every container of every manifest (raw or rendered) has few rights, and the daemon its probes.

First shows on damaged copies of a good manifest that each rule can fail.
"""
import copy
import sys
from pathlib import Path

import yaml

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
CAPABILITIES = {"runtime-directory": {"CHOWN", "FOWNER"}}  # by container; the others may add none
HOST_PATHS = ("/run/expertd", "/run/nvidia/mps", "/run/nvidia/mps/shm")


def pod_spec(document):
    kind = document.get("kind")
    if kind == "Pod":
        return document["spec"]
    if kind in ("DaemonSet", "Deployment"):
        return document["spec"]["template"]["spec"]
    return None


def check_container(container, pod_context):
    name = container["name"]
    context = {**pod_context, **container.get("securityContext", {})}
    capabilities = context.get("capabilities", {})
    added = set(capabilities.get("add", []))
    rules = (
        (context.get("privileged", False) is False, "privileged"),
        (context.get("allowPrivilegeEscalation") is False, "may escalate its privileges"),
        (context.get("readOnlyRootFilesystem") is True, "can write its root file system"),
        (capabilities.get("drop") == ["ALL"], "does not drop all capabilities"),
        (added <= CAPABILITIES.get(name, set()), f"adds the capabilities {sorted(added)}"),
        (context.get("seccompProfile", {}).get("type") == "RuntimeDefault", "has no seccomp profile"),
        (context.get("runAsNonRoot") is True or name in CAPABILITIES, "may run as root"),
        ("limits" in container.get("resources", {}), "has no resource limits"),
        (":latest" not in container["image"], "uses a moving image tag"),
    )
    return [f"container {name} {message}" for good, message in rules if not good]


def check_daemonset(document):
    spec = document["spec"]
    breaches = []
    rolling = spec.get("updateStrategy", {}).get("rollingUpdate", {})
    if rolling.get("maxUnavailable") != 1 or rolling.get("maxSurge", 0) != 0:
        breaches.append("does not replace one node at a time")
    pod = spec["template"]["spec"]
    if pod.get("terminationGracePeriodSeconds", 30) < 45:
        breaches.append("does not leave the time to drain")
    commands = {}
    for container in pod["containers"]:
        for probe in PROBES:
            commands[probe] = container.get(probe, {}).get("exec", {}).get("command")
            if not commands[probe]:
                breaches.append(f"container {container['name']} has no {probe}")
    if commands.get("readinessProbe") == commands.get("livenessProbe"):
        breaches.append("readiness and liveness are the same question")
    return breaches


def check_document(document):
    spec = pod_spec(document)
    if spec is None:
        return []
    breaches = [f"sets {key}" for key in ("hostPID", "hostIPC", "hostNetwork") if spec.get(key)]
    if spec.get("automountServiceAccountToken") is not False:
        breaches.append("mounts a service account token")
    for container in spec.get("initContainers", []) + spec["containers"]:
        breaches += check_container(container, spec.get("securityContext", {}))
    for volume in spec.get("volumes", []):
        path = volume.get("hostPath", {}).get("path")
        if path is not None and path not in HOST_PATHS:
            breaches.append(f"mounts {path} of the node")
    if document["kind"] == "DaemonSet":
        breaches += check_daemonset(document)
    return breaches


# What to set in a good DaemonSet, as a path and a value, and part of the breach that must follow.
DAMAGE = (
    (("spec", "template", "spec", "hostPID"), True, "hostPID"),
    (("spec", "template", "spec", "hostIPC"), True, "hostIPC"),
    (("spec", "template", "spec", "hostNetwork"), True, "hostNetwork"),
    (("spec", "template", "spec", "automountServiceAccountToken"), True, "token"),
    (("spec", "template", "spec", "securityContext"), {}, "seccomp"),
    (("spec", "template", "spec", "volumes", 0, "hostPath", "path"), "/dev/shm", "mounts /dev/shm"),
    (("spec", "template", "spec", "terminationGracePeriodSeconds"), 5, "time to drain"),
    (("spec", "updateStrategy", "rollingUpdate"), {"maxUnavailable": 3}, "one node at a time"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "privileged"), True, "privileged"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "runAsNonRoot"), False, "as root"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "readOnlyRootFilesystem"), False, "can write"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "escalate"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "capabilities", "drop"), [], "does not drop"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "capabilities", "add"), ["SYS_ADMIN"], "adds the"),
    (("spec", "template", "spec", "containers", 0, "resources"), {}, "no resource limits"),
    (("spec", "template", "spec", "containers", 0, "image"), "expertd:latest", "moving image"),
    (("spec", "template", "spec", "containers", 0, "livenessProbe"), {}, "no livenessProbe"),
)


def check_the_rules(good):
    failures = []
    for path, value, wanted in DAMAGE:
        document = copy.deepcopy(good)
        place = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        if not any(wanted in breach for breach in check_document(document)):
            failures.append(f"rule without effect: {'.'.join(map(str, path))} = {value}")
    return failures


def main():
    breaches = []
    daemonset = None
    count = 0
    for name in sys.argv[1:]:
        for document in yaml.safe_load_all(Path(name).read_text(encoding="utf-8")):
            count += 1
            breaches += [f"{name}: {document['kind']} {breach}" for breach in check_document(document)]
            if document["kind"] == "DaemonSet" and daemonset is None:
                daemonset = document
    breaches += check_the_rules(daemonset) if daemonset else ["no DaemonSet among the files"]
    print("\n".join(breaches) if breaches else f"manifests: {count} documents, {len(DAMAGE)} rules shown to bite")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
