"""Constructors of flags, so that a declaration of a setting fits a line or two."""

from __future__ import annotations

from edgert.config import Flag

_LARGEST_N = 1 << 24


def count_flag(*spellings: str, text: str, least: int = 1, most: int = _LARGEST_N) -> Flag:
    """Declare a flag for a whole number."""
    return Flag(spellings, text, "N", minimum=least, maximum=most)


def real_flag(*spellings: str, text: str, least: float = 0.0, most: float = 1e6) -> Flag:
    """Declare a flag for a number."""
    return Flag(spellings, text, "X", minimum=least, maximum=most)


def text_flag(*spellings: str, text: str, metavar: str = "TEXT") -> Flag:
    """Declare a flag for text."""
    return Flag(spellings, text, metavar)


def choice_flag(*spellings: str, text: str, choices: tuple[str, ...]) -> Flag:
    """Declare a flag for one of a few words."""
    return Flag(spellings, text, "|".join(choices), choices=choices)


def switch_flag(*spellings: str, text: str) -> Flag:
    """Declare a flag without a value."""
    return Flag(spellings, text, "")
