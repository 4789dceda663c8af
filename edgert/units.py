"""Bytes, seconds and rates: parsing what people type, formatting what people read."""

from __future__ import annotations

import re

from edgert.errors import ConfigError

_FACTORS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_LARGEST_BYTES = 2**60
_LONGEST_SHOWN = 60


def parse_bytes(text: str | int) -> int:
    """Parse a size such as `2000M`, `1.5GiB` or `4096`.

    Args:
        text: A number with an optional unit: k M G T are powers of 1000, Ki Mi Gi Ti of 1024.

    Returns:
        Bytes, at least 1.

    Raises:
        ConfigError: not a size, zero, or beyond 1 EiB.
    """
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ConfigError(f"size is {text!r}, wanted bytes as an integer, or a text like 2000M")
    if isinstance(text, int):
        size_bytes = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{_shown(text)} is not a size",
                hint="write a number with a unit, such as 2000M or 1.5GiB",
            )
        # Digits without end are infinite as a float, and out of range like anything beyond.
        stated = float(match[1]) * _FACTORS[(match[2] or "").lower()]
        size_bytes = int(min(stated, 2.0 * _LARGEST_BYTES))
    if not 0 < size_bytes <= _LARGEST_BYTES:
        raise ConfigError(f"size {_shown(text)} is out of range, wanted 1 byte to 1 EiB")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Format bytes with three significant digits in powers of 1000, such as `1.46 GB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1000
    return f"{_three_digits(value)} TB"


def format_rate(bytes_per_s: float) -> str:
    """Format a throughput, such as `802 MB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_seconds(duration_s: float) -> str:
    """Format a duration, such as `180 ms` or `2.81 s`."""
    if duration_s < 0.9995:
        return f"{duration_s * 1e3:.0f} ms"
    return f"{_three_digits(duration_s)} s"


def _shown(text: str | int) -> str:
    """Show what was given, cut where it is too long for a line."""
    if isinstance(text, int):
        return str(text) if abs(text) <= 1 << 128 else f"an integer of {text.bit_length()} bits"
    return repr(text) if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]!r}..."


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
