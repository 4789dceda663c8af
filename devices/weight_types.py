"""Bits and families of ggml's weight types: which known rate stands in for a missing one."""

from __future__ import annotations

from collections.abc import Iterable

# Average bits of a weight, scales included, as in `quant.formats`, which devices may not import.
BITS: dict[str, float] = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0,
    "q1_0": 1.125, "q2_0": 2.25, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5,
    "mxfp4": 4.25, "nvfp4": 4.5,
    "q2_K": 2.625, "q3_K": 3.4375, "q4_K": 4.5, "q5_K": 5.5, "q6_K": 6.5625,
    "iq1_s": 1.5625, "iq1_m": 1.75, "iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625,
    "iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq4_nl": 4.5, "iq4_xs": 4.25,
    "tq1_0": 1.6875, "tq2_0": 2.0625,
}  # fmt: skip
# Types whose weights are looked up in tables of vectors: about half as fast as others.
CODEBOOKS = frozenset(
    ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
)  # fmt: skip
_FLOATS = frozenset(("f32", "f16", "bf16"))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the type that is most like another: of its family if there is one, then by bits.

    Args:
        name: A type, which need not be one of weights.
        known: What there is to choose from.

    Returns:
        None where nothing is like it: nothing is known, or no weights have this type.
    """
    if name not in BITS:
        return None
    chosen = [other for other in known if other in BITS]
    return min(chosen, key=lambda other: _distance(name, other), default=None)


def _distance(name: str, other: str) -> tuple[bool, bool, float, str]:
    return (
        (name in _FLOATS) != (other in _FLOATS),
        _family(name) != _family(other),
        abs(BITS[name] - BITS[other]),
        other,
    )


def _family(name: str) -> str:
    if name in _FLOATS:
        return "floats"
    if name in CODEBOOKS:
        return "codebooks"
    return "super-blocks" if name.endswith("_K") or name == "iq4_xs" else "blocks"
