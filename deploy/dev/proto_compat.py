#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares the .proto files with the golden descriptor set: nothing that was published may be removed, renumbered,
renamed or retyped.

proto_compat [--update]: with --update writes the golden file anew (a change that clients of the last version notice
belongs in CHANGELOG.md). Additions have to be recorded too, else nothing would protect them.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/abi/golden/proto.desc"
UPDATE_COMMAND = "deploy/dev/proto_compat.py --update"


def compile_tree(proto_directory):
    """The descriptor set of every .proto file below a directory."""
    files = sorted(p.relative_to(proto_directory).as_posix() for p in proto_directory.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        subprocess.run(["protoc", "-I", str(proto_directory), f"--descriptor_set_out={out}", *files], check=True)
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


def describe_field(message, field):
    oneof = ""
    if field.HasField("oneof_index"):
        oneof = message.oneof_decl[field.oneof_index].name
    return {
        "name": field.name,
        "type": descriptor_pb2.FieldDescriptorProto.Type.Name(field.type) + field.type_name,
        "label": descriptor_pb2.FieldDescriptorProto.Label.Name(field.label),
        "oneof": oneof,
    }


def add_message(facts, prefix, message):
    name = f"{prefix}.{message.name}"
    facts[("message", name, "")] = {}
    for field in message.field:
        facts[("field", name, field.number)] = describe_field(message, field)
    for nested in message.nested_type:
        add_message(facts, name, nested)
    for enum in message.enum_type:
        add_enum(facts, name, enum)


def add_enum(facts, prefix, enum):
    name = f"{prefix}.{enum.name}"
    facts[("enum", name, "")] = {}
    for value in enum.value:
        facts[("enum value", name, value.number)] = {"name": value.name}


def add_service(facts, package, service):
    name = f"{package}.{service.name}"
    facts[("service", name, "")] = {}
    for method in service.method:
        facts[("method", name, method.name)] = {
            "request": method.input_type,
            "response": method.output_type,
            "streams": f"{method.client_streaming}/{method.server_streaming}",
        }


def facts_of(descriptor_set):
    """Everything a peer relies on: (kind, owner, number or name) -> properties."""
    facts = {}
    for file in descriptor_set.file:
        for message in file.message_type:
            add_message(facts, file.package, message)
        for enum in file.enum_type:
            add_enum(facts, file.package, enum)
        for service in file.service:
            add_service(facts, file.package, service)
    return facts


def compare(old, new):
    """(breaches, additions) between two descriptor sets, as sentences."""
    before, after = facts_of(old), facts_of(new)
    breaches = []
    for key, properties in before.items():
        title = " ".join(str(part) for part in key if part != "")
        if properties.get("name"):
            title += f" ({properties['name']})"
        if key not in after:
            breaches.append(f"{title}: removed")
            continue
        for name, value in properties.items():
            if after[key][name] != value:
                breaches.append(f"{title}: {name} was {value or 'none'}, is {after[key][name] or 'none'}")
    additions = [" ".join(str(part) for part in key if part != "") for key in after if key not in before]
    return breaches, additions


def main():
    current = compile_tree(ROOT / "proto")
    if sys.argv[1:] == ["--update"]:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_bytes(current.SerializeToString(deterministic=True))
        print(f"proto: wrote {GOLDEN.relative_to(ROOT)}")
        return 0
    if not GOLDEN.is_file():
        print(f"proto: {GOLDEN.relative_to(ROOT)} is missing; write it with {UPDATE_COMMAND}")
        return 1
    breaches, additions = compare(descriptor_pb2.FileDescriptorSet.FromString(GOLDEN.read_bytes()), current)
    for breach in breaches:
        print(f"proto: {breach}")
    for addition in additions:
        print(f"proto: {addition} is new; record it with {UPDATE_COMMAND}")
    if not breaches and not additions:
        print(f"proto: compatible, {len(facts_of(current))} facts")
    return 1 if breaches or additions else 0


if __name__ == "__main__":
    sys.exit(main())
