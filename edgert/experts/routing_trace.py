"""The file that `--routing-trace` writes: a line of JSON for every token and layer, streamed."""

from __future__ import annotations

from pathlib import Path

from edgert.atomic_file import FileDraft
from edgert.errors import ConfigError
from edgert.experts.ids import Ids
from edgert.experts.routed import Turn

MOST_BYTES = 1 << 30  # what a plan reads at most
_START = b'{"layer": '


class RoutingTrace:
    """Writes every choice beside `path`, and keeps it there in the end (`RoutingListener`).

    Args:
        path: Where the trace belongs.
        most_bytes: Later choices are only counted.

    Raises:
        ConfigError: nothing can be written there, or there is a file that is no such trace.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        _check(path)
        self._draft = FileDraft(path, replace=True)
        self._left_bytes = most_bytes
        self.path = path
        self.n_choices = 0
        self.n_cut = 0

    def routed(self, turn: Turn, experts: Ids) -> None:
        """Write a line for every token, with the number of the layer as the graph names it."""
        layer = turn.index if turn.layer is None else turn.layer
        lines = [f'{{"layer": {layer}, "experts": {row}}}\n' for row in experts.tolist()]
        text = "".join(lines).encode()
        if self.n_cut or len(text) > self._left_bytes:
            self.n_cut += len(lines)
            return
        self._left_bytes -= len(text)
        self.n_choices += len(lines)
        self._draft.write(text)

    def close(self) -> None:
        """Keep the file, unless nothing was written: then there is none, as before."""
        if self.n_choices:
            self._draft.keep()
        else:
            self._draft.drop()


def _check(path: Path) -> None:
    hint = "name a new file in a folder that can be written to"
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise ConfigError(f"routing trace {path}: is not a regular file", hint=hint)
        start = b""
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(_START))
    except OSError as error:
        raise ConfigError(f"routing trace {path}: {error.strerror}", hint=hint) from error
    if start not in (b"", _START):
        raise ConfigError(
            f"routing trace {path}: is a file already, and not such a trace", hint=hint
        )
