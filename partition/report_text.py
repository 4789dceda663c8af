"""Figures and settings of a manifest as the report words them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from edgert.units import format_bytes
from partition.manifest import Goal, Manifest, Prediction

_MINIMISE = {
    "tpot": "lowest time per token", "ttft": "lowest time to the first token",
    "memory": "least memory", "energy": "least energy per token",
    "bytes_sent": "fewest bytes sent",
}  # fmt: skip
_CEILINGS = {
    "tpot": "time per token", "ttft": "time to the first token", "memory": "memory",
    "energy": "energy per token", "bytes_sent": "bytes sent per token",
}  # fmt: skip
_PREDICTED = {
    "decode_tok_s": "Decode", "tpot_ms": "Time per token", "ttft_ms": "Time to the first token",
    "load_ms": "Loading", "peak_memory_bytes": "Peak memory",
    "bytes_read_per_token": "Read from flash per token",
    "bytes_sent_per_token": "Sent per token", "energy_mj_per_token": "Energy per token",
}  # fmt: skip
_UNSHOWN = frozenset({"Cc", "Cs", "Cn", "Zl", "Zp"})
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Figure:
    """A predicted figure.

    Attributes:
        label: What it is.
        value: For people.
        span: Its range, for people.
    """

    label: str
    value: str
    span: str


def duration(seconds: float) -> str:
    """Format seconds with three significant digits, such as `20.5 ms`."""
    if seconds <= 0:
        return "0"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def printable(text: str) -> str:
    """Return text with a mark in place of what cannot be seen or changes how the rest is shown."""
    return "".join("\ufffd" if _is_unshown(c) else c for c in text)


def figures(manifest: Manifest) -> list[Figure]:
    """Return the predictions in the order in which people ask for them."""
    found = []
    for name, label in _PREDICTED.items():
        prediction = getattr(manifest.predicted, name)
        if isinstance(prediction, Prediction):
            span = _between(figure(name, prediction.low), figure(name, prediction.high))
            found.append(Figure(label, figure(name, prediction.value), span))
    return found


def figure(name: str, value: float) -> str:
    """Format a figure by the unit at the end of its name."""
    if name.endswith("_ms"):
        return duration(value / 1e3)
    if name.endswith("_tok_s"):
        return f"{_digits(value)} tok/s"
    if name.startswith("energy"):
        return f"{_digits(value)} mJ" if value < 1000 else f"{_digits(value / 1000)} J"
    return format_bytes(value)


def asked(goal: Goal) -> str:
    """Return a goal as a sentence without its full stop."""
    text = f"{_MINIMISE[goal.minimise]}, for a prompt of {goal.n_prompt} tokens"
    ceilings = [f"{_CEILINGS[k]} at most {_ceiling(k, v)}" for k, v in goal.ceilings.items()]
    return ", with ".join([text, " and ".join(ceilings)]) if ceilings else text


def settings(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the settings that hold for all stages."""
    run = manifest.run
    draft = "off" if run.draft == "none" else f"{run.draft}, up to {run.draft_max} tokens"
    leaving = ", ".join(manifest.policies.may_leave).replace("_", " ") or "nothing"
    return [
        ("Context", f"{run.n_ctx} tokens"),
        ("Batch", f"{run.n_batch} tokens, computed {run.n_ubatch} at once"),
        ("KV cache", f"{run.cache_type_k} keys, {run.cache_type_v} values"),
        ("Speculation", draft),
        ("Needs", ", ".join(manifest.requires).replace("_", " ") or "nothing"),
        ("May leave " + manifest.policies.home, leaving),
    ]


def ratio(seconds: float | None, plan_s: float) -> str:
    """Say how many times as long as the plan something takes."""
    if seconds is None or plan_s <= 0:
        return ""
    return f"{seconds / plan_s:.2f}x"


def _is_unshown(character: str) -> bool:
    if character in "\n\t":
        return False
    return character in _TURNING or unicodedata.category(character) in _UNSHOWN


def _between(low: str, high: str) -> str:
    """Return a range, its unit once where both ends have the same."""
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number if unit and high.endswith(f' {unit}') else low} to {high}"


def _ceiling(name: str, value: float) -> str:
    if name in ("tpot", "ttft"):
        return duration(value)
    return f"{_digits(value)} J" if name == "energy" else format_bytes(value)


def _digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
