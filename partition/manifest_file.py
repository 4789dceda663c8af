"""Manifests as text: reading that refuses, the canonical form, the published schema."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ValidationError

from edgert.atomic_file import write_file
from edgert.errors import ConfigError, FormatError
from edgert.strict_json import LARGEST_BYTES, explain, read_json, show_value
from partition.manifest import SCHEMA_ID, SCHEMA_VERSION, Manifest
from partition.manifest_link_rules import ability_rules, policy_rules, transport_rules
from partition.manifest_routing import routing_rules
from partition.manifest_rules import (
    Rule,
    Violation,
    file_rules,
    host_rules,
    memory_rules,
    prediction_rules,
    run_rules,
)
from partition.manifest_stage_rules import (
    end_rules,
    format_rules,
    layer_rules,
    place_rules,
    share_rules,
    tensor_rules,
    tier_rules,
    width_rules,
)
from partition.manifest_variant_rules import variant_rules

DIALECT = "https://json-schema.org/draft/2020-12/schema"
RULES: tuple[Rule, ...] = (
    file_rules, host_rules, place_rules, layer_rules, share_rules, end_rules, format_rules,
    tier_rules, width_rules, tensor_rules, memory_rules, run_rules, transport_rules, policy_rules,
    ability_rules, prediction_rules, routing_rules, variant_rules,
)  # fmt: skip

_MOST_COUNTED = 100
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_HINT = "undo the edit, or make a new manifest with edgert plan"
_MISSING = "edgert plan MODEL makes one"


def violations(manifest: Manifest) -> tuple[Violation, ...]:
    """Return every rule that a manifest breaks."""
    return tuple(_broken(manifest))


def check_manifest(manifest: Manifest, place: str) -> None:
    """Check all rules.

    Raises:
        FormatError: the first that is broken: path, value and rule, and how many others are.
    """
    found = tuple(islice(_broken(manifest), _MOST_COUNTED))
    if found:
        raise FormatError(f"{found[0]}{_more(len(found))}", path=place, hint=_HINT)


def parse_manifest(text: str | bytes, place: str) -> Manifest:
    """Read a manifest and check every rule that needs no other file.

    Args:
        text: JSON, 64 MiB at most.
        place: Where it is from, for errors.

    Raises:
        FormatError: not JSON, of a version this edgert does not know, or against a rule; names
            line and offset, or `$.path`, value and rule.
    """
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    newer = _check_version(read_json(content, place), place)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise FormatError(explain(problems), path=place, hint=newer or _HINT) from None
    check_manifest(manifest, place)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest file.

    Raises:
        ConfigError: it is not there, is no regular file or cannot be read.
        FormatError: see `parse_manifest`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = stream.read(LARGEST_BYTES + 1) if is_regular else None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path}: cannot read the manifest: {reason}", hint=_MISSING) from error
    if content is None:
        raise ConfigError(f"{path}: not a regular file, wanted a manifest", hint=_MISSING)
    return parse_manifest(content, str(path))


def canonical_json(manifest: Manifest) -> bytes:
    """Return the one text of a manifest: sorted keys, every field, shortest floats, UTF-8."""
    return _canonical(manifest.model_dump(mode="json"))


def signed_bytes(manifest: Manifest) -> bytes:
    """Return what a signature is over: the canonical form without `signature`."""
    return _canonical(manifest.model_dump(mode="json", exclude={"signature"}))


def write_manifest(manifest: Manifest, path: Path, *, replace: bool) -> None:
    """Write the canonical form, whole or not at all, after checking every rule.

    Raises:
        FormatError: the manifest breaks a rule.
        ConfigError: the file exists and `replace` is off, or cannot be written.
        CapacityError: the disk is full.
    """
    check_manifest(manifest, str(path))
    write_file(path, canonical_json(manifest), replace=replace)


def json_schema() -> dict[str, object]:
    """Return the published JSON Schema; the rules between fields are not in it."""
    return published_schema(Manifest, SCHEMA_ID, "edgert deployment manifest")


def published_schema(model: type[BaseModel], identity: str, title: str) -> dict[str, object]:
    """Return the JSON Schema (draft 2020-12) of a file format."""
    schema = model.model_json_schema(mode="validation")
    return {"$schema": DIALECT, "$id": identity, **schema, "title": title}


def schema_text(schema: dict[str, object]) -> str:
    """Write a schema as it is published."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _check_version(document: object, place: str) -> str | None:
    """Refuse an unknown major version; return a hint if the minor one is newer than ours."""
    if not isinstance(document, dict):
        raise FormatError(f"$: {show_value(document)}, wanted an object", path=place, hint=_HINT)
    if "schema_version" not in document:
        raise FormatError("$.schema_version: missing", path=place, hint=_HINT)
    stated = document["schema_version"]
    match = _VERSION.fullmatch(stated) if isinstance(stated, str) else None
    ours = SCHEMA_VERSION.split(".")
    if match and int(match[1]) != int(ours[0]):
        raise FormatError(
            f"$.schema_version: {show_value(stated)}, wanted {ours[0]}.x",
            path=place,
            hint="install the edgert that made it, or make a new manifest with edgert plan",
        )
    if match and int(match[2]) > int(ours[1]):
        return f"it is of version {stated}, this edgert knows {SCHEMA_VERSION}; is there a newer?"
    return None


def _canonical(document: dict[str, object]) -> bytes:
    # As in manifests that were signed before there were any.
    for name in ("routing", "variants"):
        if not document.get(name):
            document.pop(name, None)
    stages = document["stages"]
    for stage in stages if isinstance(stages, list) else ():
        if stage["variant"] is None:
            del stage["variant"]
    text = json.dumps(
        _one_zero(document), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False
    )
    return f"{text}\n".encode()


def _one_zero(value: object) -> object:
    """Replace -0.0, which equals 0.0 but is another text."""
    if isinstance(value, dict):
        return {key: _one_zero(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_zero(item) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value


def _broken(manifest: Manifest) -> Iterator[Violation]:
    for rule in RULES:
        yield from rule(manifest)


def _more(n_problems: int) -> str:
    if n_problems == _MOST_COUNTED:
        return f" (and {n_problems - 1} or more others)"
    return f" (and {n_problems - 1} more)" if n_problems > 1 else ""
