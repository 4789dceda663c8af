"""What may be written to a terminal: no control characters of models, files or sessions."""

from __future__ import annotations

from typing import TextIO


def printable(text: str, stream: TextIO) -> str:
    """Return `text` as it is for a file or pipe, without control characters for a terminal."""
    if not stream.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
