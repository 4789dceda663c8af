"""`edgert pack`: what each host of a manifest needs, or the packed copy of a model's weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgert.cli.manifest_input import is_manifest, open_manifest
from edgert.cli.opening import find_model, user_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import PackOptions

_FORMS = "edgert pack manifest.json OUT, or edgert pack --layout packed model.gguf"


def run(options: PackOptions, context: Context) -> int:
    """Write the files, print where they are and return the exit code."""
    if options.path is None:
        raise ConfigError("no manifest and no model named", hint=_FORMS)
    if is_manifest(options.path):
        return _pack_manifest(options.path, options, context)
    if options.out_folder is not None:
        raise ConfigError(
            f"{options.path} is no manifest (.json), so {options.out_folder} means nothing",
            hint=_FORMS,
        )
    return _pack_layout(options.path, options, context)


def _pack_layout(model_name: str, options: PackOptions, context: Context) -> int:
    from edgert.weights.pack_model import write_packed

    out = None if options.out is None else user_path(options.out)
    with ProgressListener(context, quiet=options.output.json) as progress:
        model = find_model(model_name, context.env)
        written = write_packed(model, out, context.directories.cache / "packed", progress)
    print(json.dumps({"packed": str(written)}) if options.output.json else written)
    return 0


def _pack_manifest(name: str, options: PackOptions, context: Context) -> int:
    if options.out_folder is None or options.out is not None:
        raise ConfigError("where to pack the manifest to is not named", hint=_FORMS)
    from edgert.model_files import FileHashes, find
    from edgert.packing.pack import pack

    path, manifest = open_manifest(name, options.trust)
    model = None if options.source is None else user_path(options.source)
    with ProgressListener(context, quiet=options.output.json) as progress:
        packed = pack(
            manifest,
            find(manifest, path, model),
            user_path(options.out_folder),
            FileHashes(context.directories.cache),
            listener=progress,
        )
    folders = {host_id: str(folder) for host_id, folder in packed.host_folders.items()}
    if options.output.json:
        counts = {"written": packed.n_written, "kept": packed.n_kept}
        print(json.dumps({"hosts": folders, "blobs": counts}))
    else:
        for folder in folders.values():
            print(folder)
    return 0
