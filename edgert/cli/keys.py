"""`edgert keys new FILE`: make a key that signs manifests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import KeysOptions


def run(options: KeysOptions, context: Context) -> int:
    """Write the private key, print the public one and return the exit code."""
    del context
    if options.action != "new" or options.key_file is None:
        saw = "nothing" if options.action is None else repr(options.action)
        raise ConfigError(
            f"edgert keys: {saw}, wanted new and a file", hint="edgert keys new signing-key.pem"
        )
    from edgert.signing import new_key

    path = user_path(options.key_file)
    public_key = new_key(path)
    facts = {"public_key": public_key, "private_key_file": str(path)}
    print(json.dumps(facts) if options.output.json else public_key)
    return 0
