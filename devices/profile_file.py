"""Reads host profiles and topologies that nobody vouches for: strict, bounded, plausible."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from devices.plausible import check
from devices.profile import FileModel, HostProfile
from devices.topology import Topology
from edgert.errors import ConfigError, FormatError
from edgert.strict_json import explain, read_json

MOST_BYTES = 4 << 20

Model = TypeVar("Model", bound=FileModel)


def parse_topology(text: str | bytes, place: str) -> Topology:
    """Read a topology and check that it can be.

    Args:
        text: JSON, 4 MiB at most.
        place: Where it is from, for errors.

    Raises:
        FormatError: not JSON, or not a topology: names `$.path`, value and rule.
        ConfigError: a figure is not plausible, or a name is unknown: the same.
    """
    topology = parse(Topology, text, place)
    check(topology, place)
    return topology


def parse_host(text: str | bytes, place: str) -> HostProfile:
    """Read a host's profile and check that it can be; arguments and errors as above."""
    profile = parse(HostProfile, text, place)
    check(profile, place)
    return profile


def read_bounded(path: Path) -> bytes:
    """Read at most 4 MiB and one byte; ConfigError if it is no regular file or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return stream.read(MOST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path}: cannot read it: {reason}", hint="check the path") from error
    raise ConfigError(f"{path}: not a regular file", hint="name a JSON file")


def parse(model: type[Model], text: str | bytes, place: str) -> Model:
    """Read a document of a model's format; FormatError names `$.path`, value and rule."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(content) > MOST_BYTES:
        raise FormatError(f"{len(content):,} bytes, wanted {MOST_BYTES:,} at most", path=place)
    read_json(content, place)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise FormatError(explain(error.errors(include_url=False)), path=place) from None
