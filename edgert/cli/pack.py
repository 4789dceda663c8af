"""`edgert pack`: write the packed copy of a model's weights, once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgert.cli.opening import find_model, user_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import PackOptions


def run(options: PackOptions, context: Context) -> int:
    """Write the file, print its path and return the exit code."""
    if options.path is None:
        raise ConfigError("no model named", hint="edgert pack --layout packed model.gguf")
    from edgert.weights.pack_model import write_packed

    out = None if options.out is None else user_path(options.out)
    with ProgressListener(context, quiet=options.output.json) as progress:
        model = find_model(options.path, context.env)
        written = write_packed(model, out, context.directories.cache / "packed", progress)
    print(json.dumps({"packed": str(written)}) if options.output.json else written)
    return 0
