"""What a layer keeps between tokens: attention over cached positions, recurrent state.

Read from metadata only; weights are counted by `partition.language_workload`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant.formats import row_bytes, type_named
from quant.model_spec import ModelSpec
from quant.tensor_file import ArrayField

_KV_CELLS_STEP = 256  # llama-context.cpp pads n_ctx to this
_STATE_BYTES = 4  # recurrent states are f32 by default

Metadata = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of one layer.

    Attributes:
        n_head: Heads of queries.
        n_head_kv: Heads of keys and values.
        key_length: Width of one head's keys.
        value_length: Width of one head's values.
        window: Most positions a token sees, where the metadata says which layers have a sliding
            window; None is the whole context, an upper bound where it does not.
    """

    n_head: int
    n_head_kv: int
    key_length: int
    value_length: int
    window: int | None = None

    def visible(self, n_cached: int) -> int:
        """Return how many of `n_cached` positions a token sees."""
        return n_cached if self.window is None else min(n_cached, self.window)

    def flops(self, n_cached: int) -> int:
        """Return the operations of one token that sees `n_cached` positions, its own included."""
        return 2 * self.n_head * (self.key_length + self.value_length) * self.visible(n_cached)

    def prompt_flops(self, n_tokens: int, n_cached: int = 0) -> int:
        """Return the operations of `n_tokens` tokens after `n_cached`, each seeing those before."""
        per_position = 2 * self.n_head * (self.key_length + self.value_length)
        first, last = n_cached + 1, n_cached + n_tokens
        if self.window is not None and last > self.window:
            n_full = last - max(self.window, n_cached)
            last = max(self.window, n_cached)
            return per_position * (self.window * n_full + _sum_between(first, last))
        return per_position * _sum_between(first, last)

    def row_bytes(self, type_k: str, type_v: str) -> int:
        """Return the bytes of one cached position; ValueError as `quant.formats.row_bytes`."""
        keys = row_bytes(type_named(type_k), self.key_length * self.n_head_kv)
        return keys + row_bytes(type_named(type_v), self.value_length * self.n_head_kv)

    def cache_bytes(self, n_ctx: int, type_k: str, type_v: str) -> int:
        """Return the bytes of the cache for `n_ctx` positions, rounded up to 256 of them.

        A sliding window does not make it smaller: `swa_full` is llama.cpp's default.

        Source: `llama_kv_cache::llama_kv_cache`, src/llama-kv-cache.cpp.
        """
        return -(-n_ctx // _KV_CELLS_STEP) * _KV_CELLS_STEP * self.row_bytes(type_k, type_v)


def attention_shape(metadata: Metadata, spec: ModelSpec, layer: int) -> AttentionShape | None:
    """Return the attention of a layer; None where it has none.

    Args:
        metadata: Of the model's file.
        spec: Read from the same.
        layer: 0 to `n_layer` - 1.
    """
    n_head_kv = spec.n_head_kv_per_layer[layer]
    if not n_head_kv or not spec.key_length:
        return None
    window = _window(metadata, spec.architecture, layer)
    return AttentionShape(spec.n_head, n_head_kv, spec.key_length, spec.value_length, window)


def recurrent_bytes(metadata: Metadata, spec: ModelSpec) -> int:
    """Return the bytes of the recurrent state of one layer that has one, for one sequence.

    Source: `llama_hparams::n_embd_r` and `n_embd_s`, src/llama-hparams.cpp.
    """

    def value(key: str) -> int:
        found = metadata.get(f"{spec.architecture}.{key}")
        return found if isinstance(found, int) else 0

    if head_size := value("wkv.head_size"):
        n_shift = value("token_shift_count") or 2
        return _STATE_BYTES * spec.n_embd * (n_shift + head_size)
    if n_taps := value("shortconv.l_cache"):
        return _STATE_BYTES * spec.n_embd * (n_taps - 1)
    if kda_length := value("kda.head_dim"):
        inner = kda_length * spec.n_head
        return _STATE_BYTES * (3 * max(0, value("ssm.conv_kernel") - 1) + kda_length) * inner
    inner, state = value("ssm.inner_size"), value("ssm.state_size")
    taps = max(0, value("ssm.conv_kernel") - 1)
    mixed = inner + 2 * value("ssm.group_count") * state
    return _STATE_BYTES * (taps * mixed + inner * state)


def _window(metadata: Metadata, architecture: str, layer: int) -> int | None:
    window = metadata.get(f"{architecture}.attention.sliding_window")
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        return None
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, ArrayField):
        flags = pattern.read()
        return window if layer < len(flags) and flags[layer] is True else None
    # A number: the last of every so many layers sees everything (`set_swa_pattern`).
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        return window if layer % pattern < pattern - 1 else None
    return None


def _sum_between(first: int, last: int) -> int:
    return (first + last) * (last - first + 1) // 2 if last >= first else 0
