"""Tokenizers that llama.cpp would abort on are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

import builders
from builders import Pair, RawGguf
from edgert.errors import FormatError
from mutations import outcomes
from quant.metadata import ValueType
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

Change = Callable[[RawGguf], RawGguf]

TEXTS, TYPES = builders.spm_tokens()


def tokens(texts: list[bytes]) -> Pair:
    return builders.array("tokenizer.ggml.tokens", ValueType.STRING, texts)


def flag(key: str, value: bool) -> Pair:
    return builders.scalar(key, ValueType.BOOL, value)


CASES = {
    "missing": (lambda m: m.without("tokenizer.ggml.model"), "the file has no tokenizer"),
    "none": (lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "none")), "is none"),
    "unknown": (
        lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "abacus")),
        "is 'abacus', wanted one of bert, gemma4, gpt2",
    ),
    "no tokens": (lambda m: m.without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens is missing"),
    "empty": (lambda m: m.with_pair(tokens([])), "has 0 entries"),
    "numbers as tokens": (
        lambda m: m.with_pair(
            builders.array("tokenizer.ggml.tokens", ValueType.UINT32, [1] * len(TEXTS))
        ),
        "is an array of uint32, wanted string",
    ),
    "duplicate": (
        lambda m: m.with_pair(tokens([*TEXTS[:-1], b"<s>"])),
        r"has b'<s>' twice, as token 1 and 285",
    ),
    "duplicate before a zero byte": (
        lambda m: m.with_pair(tokens([*TEXTS[:-1], b"<s>\0x"])),
        r"has b'<s>' twice",
    ),
    "byte missing": (
        lambda m: m.with_pair(tokens([t if t != b"<0xFF>" else b"zz" for t in TEXTS])),
        "has no token <0xFF> for byte 255",
    ),
    "few scores": (
        lambda m: m.with_pair(builders.array("tokenizer.ggml.scores", ValueType.FLOAT32, [0.0])),
        "scores has 1 entries for 286 tokens",
    ),
    "few types": (
        lambda m: m.with_pair(builders.array("tokenizer.ggml.token_type", ValueType.INT32, [1])),
        "token_type has 1 entries for 286 tokens",
    ),
    "types of wrong type": (
        lambda m: m.with_pair(builders.array("tokenizer.ggml.token_type", ValueType.UINT32, TYPES)),
        "token_type is an array of uint32, wanted int32",
    ),
    "no merges": (
        lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "gpt2")),
        "tokenizer.ggml.merges is missing, a gpt2 tokenizer needs it",
    ),
    "bytes in bert": (
        lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "bert")),
        "marks byte tokens",
    ),
    "absent end token to be added": (
        lambda m: (
            m.with_pair(builders.text("tokenizer.ggml.model", "plamo2"))
            .without("tokenizer.ggml.scores")
            .with_pair(tokens([b"a", b"b"]))
            .with_pair(flag("tokenizer.ggml.add_eos_token", value=True))
            .with_pair(builders.u32("tokenizer.ggml.eos_token_id", 7))
        ),
        "eos_token_id is 7, beyond 2 tokens, but the tokenizer emits this token",
    ),
    "absent unknown token": (
        lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "t5")).with_pair(
            tokens([b"a", b"b"])
        ),
        "unknown_token_id is missing, but the tokenizer emits this token",
    ),
    "rwkv without bytes": (
        lambda m: m.with_pair(builders.text("tokenizer.ggml.model", "rwkv")),
        r"has no token \\x00 for byte 0",
    ),
    "number as flag": (
        lambda m: m.with_pair(builders.u32("tokenizer.ggml.add_bos_token", 1)),
        "add_bos_token is a uint32, wanted a bool",
    ),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES.keys())
def test_bad_tokenizers_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = change(builders.llama()).write(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=message):
        read_model_spec(open_tensor_file(path))


def test_longer_columns_are_fine(tmp_path: Path) -> None:
    column = builders.array("tokenizer.ggml.scores", ValueType.INT32, [0] * 300)
    path = builders.llama().with_pair(column).write(tmp_path / "model.gguf")
    assert read_model_spec(open_tensor_file(path)).n_vocab == 286


def test_rwkv_vocabulary_spells_bytes_its_own_way(tmp_path: Path) -> None:
    special = {9: b"\\t", 10: b"\\n", 13: b"\\r", 92: b"\\\\"}
    singles = [
        special.get(byte, bytes((byte,)) if 32 <= byte < 127 else b"\\x%02x" % byte)
        for byte in range(256)
    ]
    more = [b"more %d" % number for number in range(286 - 256)]
    model = builders.llama().with_pair(builders.text("tokenizer.ggml.model", "rwkv"))
    path = model.with_pair(tokens([*singles, *more])).write(tmp_path / "model.gguf")
    assert read_model_spec(open_tensor_file(path)).tokenizer_model == "rwkv"
    assert outcomes([path]) == ["decoded 0"]
