"""The sizes of buffers that llama.cpp logs when it makes a context."""

from __future__ import annotations

import re

_NEW_CONTEXT = "constructing llama_context"
_BUFFER = re.compile(r"(\w+) buffer size = +([0-9.]+) MiB")


class BufferSizes:
    """Takes lines of the log; `bytes_of` is of the context that was made last.

    Source: `llama_context` and `llama_kv_cache`, src/llama-context.cpp and src/llama-kv-cache.cpp.
    """

    def __init__(self) -> None:
        self._sizes_bytes: dict[str, int] = {}

    def heard(self, line: str) -> None:
        """Take a line."""
        if _NEW_CONTEXT in line:
            self._sizes_bytes.clear()
        found = _BUFFER.search(line)
        if found is not None:
            size_bytes = int(float(found[2]) * (1 << 20))
            self._sizes_bytes[found[1]] = self._sizes_bytes.get(found[1], 0) + size_bytes

    def bytes_of(self, *kinds: str) -> int:
        """Return the bytes of all buffers of some kinds: `KV`, `RS`, `compute`, `output`."""
        return sum(self._sizes_bytes.get(kind, 0) for kind in kinds)
