"""Rules of single architectures that llama.cpp asserts while it builds a model or its graph.

Only what metadata alone can violate; shapes of tensors are compared by llama.cpp itself.
"""

from __future__ import annotations

import math

from quant.architectures import (
    EQUAL_HEAD_LENGTHS,
    FULL_ROTATION,
    ONLY_WITH_EXPERTS,
    SECTIONED_ROTATION,
)
from quant.keys import Keys
from quant.metadata import ValueType

_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_LARGEST_SECTIONS = 1 << 16
_LLAMA4_PERIOD = 4  # one in so many layers does not rotate: without any, an input has no buffer
_EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")


def check_architecture(keys: Keys, key_length: int, value_length: int, n_expert: int) -> None:
    """Check the metadata against the rules of its architecture.

    Args:
        keys: The metadata.
        key_length: Width of one attention head's keys, 0 without attention.
        value_length: The same of its values.
        n_expert: Experts a layer, 0 for dense models.

    Raises:
        FormatError: a rule is broken.
    """
    for name in _EPSILONS:
        epsilon = keys.optional_float(f"attention.{name}")
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon >= 0):
            keys.fail(f"attention.{name}", f"is {epsilon}, wanted a small positive number")
    if keys.architecture in ONLY_WITH_EXPERTS and n_expert == 0:
        keys.fail("expert_count", f"is 0, a {keys.architecture} model needs experts")
    n_layer = keys.number("block_count")
    if keys.architecture == "llama4" and n_layer < _LLAMA4_PERIOD:
        keys.fail("block_count", f"is {n_layer}, wanted at least {_LLAMA4_PERIOD}")
    if keys.architecture in EQUAL_HEAD_LENGTHS and key_length != value_length:
        keys.fail("attention.value_length", f"is {value_length}, wanted the {key_length} of keys")
    _check_rope(keys, key_length)


def _check_rope(keys: Keys, key_length: int) -> None:
    scaling = keys.text("rope.scaling.type", default="linear")
    if scaling not in _ROPE_SCALINGS:
        keys.fail("rope.scaling.type", f"is {scaling[:80]!r}, wanted {', '.join(_ROPE_SCALINGS)}")
    n_rotated = keys.number("rope.dimension_count", default=key_length)
    if keys.architecture in FULL_ROTATION and n_rotated != key_length:
        keys.fail("rope.dimension_count", f"is {n_rotated}, wanted the {key_length} of a head")
    if keys.architecture not in SECTIONED_ROTATION:
        return
    sections = keys.optional_array("rope.dimension_sections", ValueType.INT32, ValueType.UINT32)
    if sections is None or sections.count != 4:
        keys.fail("rope.dimension_sections", "is missing or has not 4 elements")
    lengths = [int(length) for length in sections.read()]
    if min(lengths) < 0 or not any(lengths[:3]) or sum(lengths) > _LARGEST_SECTIONS:
        keys.fail("rope.dimension_sections", f"is {lengths}, wanted the parts of a head")
