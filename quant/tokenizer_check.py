"""Checks of the tokenizer part of a model's metadata.

llama.cpp reads it with few checks of its own and aborts on duplicate tokens, on missing byte tokens
and on special tokens that are to be added but do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from quant.keys import Keys
from quant.metadata import ArrayField, ValueType


@dataclass(frozen=True, slots=True)
class _Kind:
    """What llama.cpp assumes of one `tokenizer.ggml.model` (`llama_vocab::impl::load`)."""

    bos: int | None
    eos: int | None
    sep: int | None = None
    unk: int | None = None
    emits_unk: bool = False
    add_bos: bool = False
    add_eos: bool = False
    add_sep: bool = False
    merges: bool = False


_BYTE_PAIRS = _Kind(bos=11, eos=11, merges=True)
_KINDS = {
    "llama": _Kind(bos=1, eos=2, add_bos=True),
    "bert": _Kind(bos=101, eos=None, sep=102, unk=100, emits_unk=True, add_bos=True, add_sep=True),
    "gpt2": _BYTE_PAIRS,
    "hybriddna": _BYTE_PAIRS,
    "whitespace": _BYTE_PAIRS,
    "gemma4": _Kind(bos=None, eos=None, add_bos=True, merges=True),
    "t5": _Kind(bos=None, eos=1, unk=2, emits_unk=True, add_eos=True),
    "rwkv": _Kind(bos=None, eos=None),
    "plamo2": _Kind(bos=1, eos=2, unk=0, emits_unk=True),
}
# Pre-tokenizers after which llama.cpp adds a beginning-of-text token unasked.
_PRE_WITH_BOS = frozenset(
    {
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano", "tekken", "chameleon", "gemma4", "granite-embed-multi-311m",
    }
)  # fmt: skip
_PRE_WITHOUT_BOS_ID = frozenset({"chatglm-bpe", "glm4", "glm5"})
_LARGEST_VOCABULARY = 1 << 24
_PART_VERSION = "edgert.part.version"
_BYTE_TYPE = (6).to_bytes(4, "little")  # LLAMA_TOKEN_TYPE_BYTE


def check_tokenizer(keys: Keys) -> tuple[str, int]:
    """Check the tokenizer's keys.

    Returns:
        The tokenizer's kind (`tokenizer.ggml.model`) and the number of tokens.

    Raises:
        FormatError: the tokenizer is missing, unknown or inconsistent.
    """
    model = keys.optional_text("tokenizer.ggml.model")
    if model == "none" and _PART_VERSION in keys.tensor_file.metadata:
        # Hidden states enter such a part: llama.cpp makes up as many tokens as it has logits.
        return model, keys.number("vocab_size", at_least=1, at_most=_LARGEST_VOCABULARY)
    if model is None or model in ("none", "no_vocab"):
        _fail_missing(
            keys, "is missing: the file has no tokenizer" if model is None else f"is {model}"
        )
    if model not in _KINDS:
        keys.fail(
            "tokenizer.ggml.model", f"is {model[:80]!r}, wanted one of {', '.join(sorted(_KINDS))}"
        )
    tokens = keys.optional_array("tokenizer.ggml.tokens", ValueType.STRING)
    if tokens is None:
        _fail_missing(keys, "stands alone: tokenizer.ggml.tokens is missing")
    if not 0 < tokens.count <= _LARGEST_VOCABULARY:
        keys.fail(
            "tokenizer.ggml.tokens",
            f"has {tokens.count:,} entries, wanted 1 to {_LARGEST_VOCABULARY:,}",
        )
    pre = keys.text("tokenizer.ggml.pre", default="")
    _check_columns(keys, model, tokens.count)
    _check_merges(keys, model, pre)
    _check_specials(keys, model, pre, tokens.count)
    _check_texts(keys, model, tokens)
    return model, tokens.count


def _fail_missing(keys: Keys, message: str) -> NoReturn:
    keys.fail(
        "tokenizer.ggml.model",
        message,
        hint="convert the model again, with its tokenizer files beside it",
    )


def _check_columns(keys: Keys, model: str, n_tokens: int) -> None:
    scores = keys.optional_array("tokenizer.ggml.scores", ValueType.FLOAT32, ValueType.INT32)
    types = keys.optional_array("tokenizer.ggml.token_type", ValueType.INT32)
    for key, column in (("scores", scores), ("token_type", types)):
        if column is not None and column.count < n_tokens:
            keys.fail(
                f"tokenizer.ggml.{key}", f"has {column.count:,} entries for {n_tokens:,} tokens"
            )
    if model == "bert" and types is not None:
        raw = types.read_bytes()
        if any(raw[i : i + 4] == _BYTE_TYPE for i in range(0, 4 * n_tokens, 4)):
            keys.fail(
                "tokenizer.ggml.token_type", "marks byte tokens, which a bert vocabulary has not"
            )


def _check_merges(keys: Keys, model: str, pre: str) -> None:
    merges = keys.optional_array("tokenizer.ggml.merges", ValueType.STRING)
    if merges is None and _KINDS[model].merges and pre != "kimi-k2":
        keys.fail("tokenizer.ggml.merges", f"is missing, a {model} tokenizer needs it")
    keys.optional_array("tokenizer.ggml.suppress_tokens", ValueType.INT32)
    keys.optional_array("tokenizer.ggml.precompiled_charsmap", ValueType.INT8, ValueType.UINT8)


def _check_specials(keys: Keys, model: str, pre: str, n_tokens: int) -> None:
    """Every special token that llama.cpp would add must exist; it asserts so when it tokenizes."""
    kind = _KINDS[model]
    bos = None if pre in _PRE_WITHOUT_BOS_ID and kind.merges else kind.bos
    add_bos = kind.add_bos or (kind.merges and pre in _PRE_WITH_BOS)
    wanted = (
        ("bos_token_id", bos, _adds(keys, "bos", default=add_bos)),
        ("eos_token_id", kind.eos, _adds(keys, "eos", default=kind.add_eos)),
        # spelt so in the format
        ("seperator_token_id", kind.sep, _adds(keys, "sep", default=kind.add_sep)),
        ("unknown_token_id", kind.unk, kind.emits_unk),
    )
    for key, default, added in wanted:
        stated = keys.optional_number(f"tokenizer.ggml.{key}")
        usable = any(number is not None and number < n_tokens for number in (stated, default))
        if added and not usable:
            saw = "is missing" if stated is None else f"is {stated:,}, beyond {n_tokens:,} tokens"
            keys.fail(f"tokenizer.ggml.{key}", f"{saw}, but the tokenizer emits this token")


def _adds(keys: Keys, short_name: str, *, default: bool) -> bool:
    return keys.flag(f"tokenizer.ggml.add_{short_name}_token", default=default)


def _check_texts(keys: Keys, model: str, tokens: ArrayField) -> None:
    """Refuse duplicates, and vocabularies that must express every byte but cannot.

    llama.cpp stops reading a token at a zero byte and names empty ones after their number.
    """
    seen: dict[bytes, int] = {}
    for number, text in enumerate(tokens.read_strings()):
        name = text.split(b"\0", 1)[0] if b"\0" in text else text
        first = seen.setdefault(name or b"[EMPTY_%d]" % number, number)
        if first != number:
            keys.fail(
                "tokenizer.ggml.tokens",
                f"has {name[:80]!r} twice, as token {first:,} and {number:,}",
            )
    spell = {"llama": _sentencepiece_bytes, "rwkv": _rwkv_bytes}.get(model)
    if spell is None:
        return
    for byte in range(256):
        if seen.keys().isdisjoint(spell(byte)):
            wanted = spell(byte)[0].decode()
            keys.fail("tokenizer.ggml.tokens", f"has no token {wanted} for byte {byte}")


def _sentencepiece_bytes(byte: int) -> tuple[bytes, ...]:
    # llama_vocab::byte_to_token: <0xHH>, else the byte itself, else an exception nobody catches
    spelled = b"<0x%02X>" % byte
    return (spelled, bytes((byte,))) if byte else (spelled,)


def _rwkv_bytes(byte: int) -> tuple[bytes, ...]:
    # llm_tokenizer_rwkv_session never ends on a text whose first byte is no token
    escapes = {9: b"\\t", 10: b"\\n", 13: b"\\r", 92: b"\\\\"}
    itself = b"\\x%02x" % byte if byte in (0, 92) else bytes((byte,))
    return (b"\\x%02x" % byte, escapes.get(byte, itself), itself)
