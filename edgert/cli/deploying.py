"""`--manifest`: from the flags to a deployment, made anew where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import edgert
from edgert.cli.manifest_input import is_manifest, open_manifest
from edgert.cli.opening import find_model
from edgert.deployment import Deployment, deploy, embedded_model
from edgert.errors import CapacityError, ConfigError, FormatError, PlanError
from edgert.events import Listener, Notice
from edgert.host_deployment import HostsAsk, known_addresses
from edgert.model_files import FileHashes

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ManifestFlags, ModelFlags
    from partition.manifest import Manifest

# A manifest decides all of these; where its model lies may be said, and how loudly to speak.
_NOT_DECIDED = frozenset({"path", "model"})


def manifest_name(model: ModelFlags, flags: ManifestFlags) -> str | None:
    """Return the manifest that the flags name: --manifest, or MODEL where it is one."""
    if flags.manifest is not None:
        return flags.manifest
    return model.path if model.path is not None and is_manifest(model.path) else None


def open_deployment(
    model: ModelFlags, flags: ManifestFlags, context: Context, listener: Listener
) -> Deployment | None:
    """Return the deployment that the flags name, None when they name none.

    Raises:
        ConfigError: a flag contradicts the manifest, or a file is missing.
        FormatError: the manifest or the model is damaged or another one.
        PlanError: this runtime or host cannot execute it.
        CapacityError: the memory it takes is not there.
    """
    name = manifest_name(model, flags)
    if name is None:
        if flags.replan:
            raise ConfigError("--replan wants a manifest", hint="--manifest FILE")
        if flags.hosts:
            raise ConfigError("--host wants a manifest of several hosts", hint="--manifest FILE")
        return None
    _refuse_contradictions(model, context)
    path, manifest = open_manifest(name, flags.trust)
    _refuse_strangers(manifest, flags.hosts)
    override = _override(model, flags, context)
    hashes = FileHashes(context.directories.cache, listener)
    addresses = known_addresses(context.env, flags.hosts)
    hosts = HostsAsk(context.directories, addresses, listener, flags.host_deadline)
    try:
        return deploy(manifest, path, override, hashes, _packed(context), hosts)
    except (PlanError, CapacityError, FormatError) as error:
        if not flags.replan:
            raise
        if flags.trust.trusted_keys:
            raise ConfigError(
                f"--replan makes an unsigned manifest, and only signed ones are trusted; "
                f"needed because {error.message}",
                hint="plan and sign it: edgert plan MODEL -o FILE; edgert sign FILE --key KEY",
            ) from error
        listener(Notice(f"planning anew: {error.message}"))
    from partition.manifest_file import write_manifest

    made = _replanned(manifest, path, override, context)
    deployment = deploy(made, path, override, hashes, _packed(context), hosts)
    write_manifest(made, path, replace=True)
    return deployment


def _refuse_strangers(manifest: Manifest, named: Sequence[str]) -> None:
    """Refuse addresses of hosts that the manifest does not have, which are mistyped."""
    there = [host.host_id for host in manifest.hosts if host.host_id != manifest.policies.home]
    for name in known_addresses({}, named):
        if name not in there:
            others = f"names {', '.join(there)}" if there else "is for this host alone"
            raise ConfigError(
                f"--host {name[:80]}: the manifest {others}",
                hint="edgert plan MODEL --topology FILE plans for several hosts",
            )


def _packed(context: Context) -> Path:
    return context.directories.cache / "packed"


def _override(model: ModelFlags, flags: ManifestFlags, context: Context) -> Path | None:
    """Return where a person says the model lies."""
    named = model.model if flags.manifest is None else (model.path or model.model)
    return None if named is None else find_model(named, context.env)


def _refuse_contradictions(model: ModelFlags, context: Context) -> None:
    for field in fields(model):
        origin = context.origins.get(field.name, "default")
        if field.name in _NOT_DECIDED or origin not in ("flag", "environment"):
            continue
        raise ConfigError(
            f"{field.name} is set by {origin}, and the manifest decides it",
            hint="leave it out, or plan with it: edgert plan MODEL -o FILE",
        )


def _replanned(manifest: Manifest, path: Path, override: Path | None, context: Context) -> Manifest:
    """Plan the same goal for this host; the model's files stay where the manifest has them."""
    from edgert.cli.nested_planning import plan_of
    from edgert.cli.planning import identity, inputs_again
    from partition.bind import bind
    from partition.manifest_file import check_manifest

    first = manifest.model.files[0].path
    place = override or embedded_model(manifest, path) or path.parent
    inputs = inputs_again(place / first if place.is_dir() else place, manifest, context)
    plan = plan_of(inputs)
    model = identity(inputs, FileHashes(context.directories.cache))
    named = [file.path for file in manifest.model.files]
    if len(named) != len(model.files):  # another model, in the same folder
        named = [str(PurePosixPath(first).parent / file.path) for file in model.files]
    files = tuple(
        file.model_copy(update={"path": name})
        for file, name in zip(model.files, named, strict=True)
    )
    model = model.model_copy(update={"files": files})
    made = bind(plan, model, edgert.__version__, inputs.popularity)
    check_manifest(made, "the new plan")
    return made
