"""`edgert sign`: put a signature into a manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import SignOptions


def run(options: SignOptions, context: Context) -> int:
    """Replace the manifest by a signed one, print the public key and return the exit code."""
    if options.manifest is None or options.key is None:
        raise ConfigError(
            "a manifest and a key are needed", hint="edgert sign manifest.json --key FILE"
        )
    from edgert.signing import is_exposed, sign
    from partition.manifest_file import read_manifest, write_manifest

    path, key_path = user_path(options.manifest), user_path(options.key)
    signed = sign(read_manifest(path), key_path)
    if is_exposed(key_path):
        context.say(f"note: others than you can read {key_path}; chmod 600 it")
    write_manifest(signed, path, replace=True)
    public_key = signed.signature.public_key if signed.signature else None
    facts = {"manifest": str(path), "public_key": public_key}
    print(json.dumps(facts) if options.output.json else public_key)
    return 0
