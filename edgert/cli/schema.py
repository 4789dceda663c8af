"""`edgert schema`: print the JSON Schema of a file format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import SchemaOptions

FORMATS = ("manifest", "profile", "topology")


def run(options: SchemaOptions, context: Context) -> int:
    """Print the schema and return the exit code."""
    del context
    if options.format_name not in FORMATS:
        saw = "none" if options.format_name is None else repr(options.format_name)
        raise ConfigError(
            f"format {saw}, wanted one of {', '.join(FORMATS)}", hint="edgert schema manifest"
        )
    from partition.manifest_file import schema_text

    print(schema_text(schema_of(options.format_name)), end="")
    return 0


def schema_of(format_name: str) -> dict[str, object]:
    """Return the schema of a format by its name in `FORMATS`."""
    from devices.profile import HostProfile
    from devices.topology import Topology
    from partition.manifest_file import json_schema, published_schema

    if format_name == "profile":
        return published_schema(HostProfile, "urn:edgert:profile:1", "edgert host profile")
    if format_name == "topology":
        return published_schema(Topology, "urn:edgert:topology:1", "edgert topology")
    return json_schema()
