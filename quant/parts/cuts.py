"""Where a host's share of a layer begins and ends; the one rule of planner and part files.

Heads are shared out in equal groups of KV heads, with the query heads that use them. The FFN's
columns are cut at the same fractions, down to whole quantization blocks of `ffn_down`. Products
that widen lose rows, the two that are summed over hosts (`attn_output`, `ffn_down`) lose columns.

Source: TPI-LLM (arXiv 2410.00531), after Megatron-LM's split of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

Range = tuple[int, int]
Cut = Literal["head_rows", "width_rows", "columns", "whole"]

_HEAD_ROWS = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv"})
_WIDTH_ROWS = frozenset({"ffn_gate", "ffn_up"})
_COLUMNS = frozenset({"attn_output", "ffn_down"})
_OF_ONE_HEAD = frozenset({"attn_q_norm", "attn_k_norm"})
_MATRIX = 2


class Groups(Protocol):
    """Groups `[first_group, end_group)` of `n_groups` of KV heads."""

    @property
    def first_group(self) -> int:
        """First of them."""
        ...

    @property
    def end_group(self) -> int:
        """One past the last."""
        ...

    @property
    def n_groups(self) -> int:
        """How many there are."""
        ...


def stem(name: str) -> str:
    """Return what a tensor is: `attn_q` of `blk.3.attn_q.weight`; other names are their own."""
    return name.split(".")[2] if name.startswith("blk.") else name


def cut_of(name: str, n_dims: int) -> Cut:
    """Return what a share of a tensor is made of; biases of summed products stay whole.

    They do because the sum over hosts comes before the bias is added, once.
    """
    part = stem(name)
    if part in _HEAD_ROWS:
        return "head_rows"
    if part in _WIDTH_ROWS:
        return "width_rows"
    return "columns" if part in _COLUMNS and n_dims >= _MATRIX else "whole"


def why_not_cut(name: str, shape: tuple[int, ...], key_length: int) -> str | None:
    """Return why a tensor of a layer has no known split, None where it has."""
    part = stem(name)
    if len(shape) > 1:
        known = len(shape) == _MATRIX and cut_of(name, len(shape)) != "whole"
        return None if known else f"{name} has no known split"
    if part in _OF_ONE_HEAD and shape[0] != key_length:
        return f"{name} has no known split"  # it would need the heads of other hosts
    return None


def bound(width: int, block_length: int, group: int, n_groups: int) -> int:
    """Return the column where a group begins: whole blocks of the tensor's type."""
    if group == n_groups:
        return width
    return group * width // n_groups // block_length * block_length


def columns(width: int, block_length: int, share: Groups) -> Range:
    """Return the columns of a share."""
    first = bound(width, block_length, share.first_group, share.n_groups)
    return first, bound(width, block_length, share.end_group, share.n_groups)


def are_alike(kinds: Iterable[tuple[int, int]], n_groups: int) -> bool:
    """Whether all FFNs are cut at the same columns; llama.cpp wants one width for all layers.

    Args:
        kinds: Columns and block length of each layer's `ffn_down`.
        n_groups: Into how many groups.
    """
    cuts = {
        tuple(bound(width, block, group, n_groups) for group in range(1, n_groups + 1))
        for width, block in set(kinds)
    }
    return len(cuts) <= 1


def head_rows(n_rows: int, share: Groups) -> Range:
    """Return the rows of a share of what all groups have the same number of."""
    of_one = n_rows // share.n_groups
    return of_one * share.first_group, of_one * share.end_group


def width_rows(n_rows: int, width: int, own: Range) -> tuple[Range, ...]:
    """Return the rows that make the columns `own` of `ffn_down`.

    Gate and up may be one tensor of twice the rows, one after the other.
    """
    first, end = own
    return tuple((at + first, at + end) for at in range(0, n_rows, width))


def vocabulary_rows(n_vocab: int, share: Groups) -> Range:
    """Return the tokens whose logits a share of the output computes."""
    first = share.first_group * n_vocab // share.n_groups
    return first, share.end_group * n_vocab // share.n_groups


def most_groups(
    n_head: int, n_head_kv: int, value_length: int, block_lengths: Iterable[int]
) -> int:
    """Return into how many equal groups heads can be cut, 1 if into none.

    Args:
        n_head: Query heads.
        n_head_kv: KV heads.
        value_length: Columns of `attn_output` that belong to a query head.
        block_lengths: Of the types that `attn_output` has; a group's columns are whole blocks.
    """
    blocks = set(block_lengths)
    for n_groups in range(n_head_kv, 1, -1):
        n_columns = n_head // n_groups * value_length
        if n_head_kv % n_groups == 0 and not any(n_columns % block for block in blocks):
            return n_groups
    return 1
