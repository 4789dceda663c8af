"""Builders of tiny GGUF files, valid ones and ones that lie about themselves."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from quant.formats import FORMATS, GgmlType
from quant.metadata import SCALAR_CODES, ValueType

N_EMBD, N_LAYER, N_HEAD, N_HEAD_KV, N_FF = 64, 2, 4, 2, 128


@dataclass(frozen=True)
class Pair:
    """One metadata pair as it is stored; `payload` is everything after the type id."""

    key: str
    type_id: int
    payload: bytes


@dataclass(frozen=True)
class RawTensor:
    """One tensor; None for an offset means right after the previous tensor."""

    name: str
    dims: tuple[int, ...]
    type_id: int = GgmlType.F32
    data: bytes = b""
    offset: int | None = None


@dataclass(frozen=True)
class RawGguf:
    """A GGUF file with every field open to lies; the defaults tell the truth."""

    pairs: list[Pair]
    tensors: list[RawTensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_pairs: int | None = None
    n_tensors: int | None = None
    alignment: int = 32

    def header(self) -> bytes:
        """Return everything before the padding to the tensor data."""
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        parts = [self.magic, struct.pack("<IQQ", self.version, n_tensors, n_pairs)]
        for pair in self.pairs:
            parts += [string(pair.key), struct.pack("<I", pair.type_id), pair.payload]
        offset = 0
        for tensor in self.tensors:
            stated = offset if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            parts += [string(tensor.name), dims, struct.pack("<IQ", tensor.type_id, stated)]
            offset += len(self._padded(tensor.data))
        return b"".join(parts)

    def content(self) -> bytes:
        """Return the whole file."""
        data = b"".join(self._padded(tensor.data) for tensor in self.tensors)
        return self._padded(self.header()) + data

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.write_bytes(self.content())
        return path

    def with_pair(self, pair: Pair) -> RawGguf:
        """Return a copy with this pair in place of the one of the same key, or added."""
        keys = [other.key for other in self.pairs]
        if pair.key not in keys:
            return replace(self, pairs=[*self.pairs, pair])
        pairs = [pair if other.key == pair.key else other for other in self.pairs]
        return replace(self, pairs=pairs)

    def without(self, *keys: str) -> RawGguf:
        """Return a copy without these metadata keys."""
        return replace(self, pairs=[pair for pair in self.pairs if pair.key not in keys])

    def with_tensor(self, index: int, **changes: object) -> RawGguf:
        """Return a copy with fields of one tensor changed."""
        tensors = list(self.tensors)
        tensors[index] = replace(tensors[index], **changes)  # type: ignore[arg-type]
        return replace(self, tensors=tensors)

    def _padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)


def string(text: str | bytes) -> bytes:
    """Return a string as GGUF stores it."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def scalar(key: str, value_type: ValueType, value: float) -> Pair:
    """Return a pair with a number or flag."""
    return Pair(key, value_type, SCALAR_CODES[value_type].pack(value))


def u32(key: str, value: int) -> Pair:
    """Return a pair with a uint32, which most keys are."""
    return scalar(key, ValueType.UINT32, value)


def text(key: str, value: str | bytes) -> Pair:
    """Return a pair with a string."""
    return Pair(key, ValueType.STRING, string(value))


def array(key: str, element_type: ValueType, values: Sequence[float] | Sequence[bytes]) -> Pair:
    """Return a pair with an array of numbers or of strings."""
    head = struct.pack("<IQ", element_type, len(values))
    if element_type is ValueType.STRING:
        body = b"".join(string(value) for value in values if isinstance(value, bytes))
    else:
        code = SCALAR_CODES[element_type]
        body = b"".join(code.pack(value) for value in values)
    return Pair(key, ValueType.ARRAY, head + body)


def spm_tokens() -> tuple[list[bytes], list[int]]:
    """Return texts and types of the smallest SentencePiece vocabulary llama.cpp can use safely."""
    letters = [b"\xe2\x96\x81", *(bytes((c,)) for c in range(ord("a"), ord("z") + 1))]
    texts = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), *letters]
    return texts, [2, 3, 3, *[6] * 256, *[1] * len(letters)]


def with_byte_pairs(model: RawGguf, pre: str = "gpt-2") -> RawGguf:
    """Return a copy with a byte-pair vocabulary of the same size in place of its own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]
    merged = [f"{a}{b}" for a in "th" for b in "abcdefghijklmn"]
    texts = [text.encode() for text in [*letters, *merged, "<|endoftext|>", "<|im_end|>"]]
    merges = [f"{pair[0]} {pair[1]}".encode() for pair in merged]
    for pair in (
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", pre),
        array("tokenizer.ggml.tokens", ValueType.STRING, texts),
        array("tokenizer.ggml.merges", ValueType.STRING, merges),
        array("tokenizer.ggml.token_type", ValueType.INT32, [*[1] * (len(texts) - 2), 3, 3]),
        u32("tokenizer.ggml.bos_token_id", len(texts) - 2),
        u32("tokenizer.ggml.eos_token_id", len(texts) - 1),
    ):
        model = model.with_pair(pair)
    return model.without("tokenizer.ggml.scores")


def llama_pairs(n_layer: int = N_LAYER) -> list[Pair]:
    """Return the metadata of a tiny llama with its tokenizer."""
    texts, types = spm_tokens()
    return [
        text("general.architecture", "llama"),
        text("general.name", "tiny"),
        u32("general.file_type", 0),
        u32("llama.context_length", 128),
        u32("llama.embedding_length", N_EMBD),
        u32("llama.block_count", n_layer),
        u32("llama.feed_forward_length", N_FF),
        u32("llama.attention.head_count", N_HEAD),
        u32("llama.attention.head_count_kv", N_HEAD_KV),
        scalar("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, 1e-5),
        u32("llama.rope.dimension_count", N_EMBD // N_HEAD),
        text("tokenizer.ggml.model", "llama"),
        array("tokenizer.ggml.tokens", ValueType.STRING, texts),
        array("tokenizer.ggml.scores", ValueType.FLOAT32, [-float(i) for i in range(len(texts))]),
        array("tokenizer.ggml.token_type", ValueType.INT32, types),
        u32("tokenizer.ggml.bos_token_id", 1),
        u32("tokenizer.ggml.eos_token_id", 2),
        scalar("tokenizer.ggml.add_bos_token", ValueType.BOOL, True),
    ]


def llama(n_layer: int = N_LAYER, weight_type: GgmlType = GgmlType.F32) -> RawGguf:
    """Return a valid llama of a few hundred KB with seeded weights (zeros for quantized types)."""
    n_vocab, kv_length = len(spm_tokens()[0]), N_EMBD // N_HEAD * N_HEAD_KV
    random = np.random.default_rng(0)

    def matrix(name: str, n_in: int, n_out: int) -> RawTensor:
        entry = FORMATS[weight_type]
        data = bytes(n_in * n_out // entry.block_length * entry.block_bytes)
        if weight_type is GgmlType.F32:
            values = random.standard_normal(n_in * n_out, np.float32) / np.float32(n_in**0.5)
            data = values.tobytes()
        return RawTensor(name, (n_in, n_out), weight_type, data)

    def norm(name: str) -> RawTensor:
        return RawTensor(name, (N_EMBD,), GgmlType.F32, np.ones(N_EMBD, np.float32).tobytes())

    tensors = [matrix("token_embd.weight", N_EMBD, n_vocab)]
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        tensors += [
            norm(prefix + "attn_norm.weight"),
            matrix(prefix + "attn_q.weight", N_EMBD, N_EMBD),
            matrix(prefix + "attn_k.weight", N_EMBD, kv_length),
            matrix(prefix + "attn_v.weight", N_EMBD, kv_length),
            matrix(prefix + "attn_output.weight", N_EMBD, N_EMBD),
            norm(prefix + "ffn_norm.weight"),
            matrix(prefix + "ffn_gate.weight", N_EMBD, N_FF),
            matrix(prefix + "ffn_up.weight", N_EMBD, N_FF),
            matrix(prefix + "ffn_down.weight", N_FF, N_EMBD),
        ]
    tensors += [norm("output_norm.weight"), matrix("output.weight", N_EMBD, n_vocab)]
    return RawGguf(llama_pairs(n_layer), tensors)


def split(model: RawGguf, n_shards: int) -> list[RawGguf]:
    """Return the shards of a model, with correct split keys; the first holds the metadata."""
    n_tensors = len(model.tensors)
    shards = []
    for index in range(n_shards):
        keys = [
            scalar("split.no", ValueType.UINT16, index),
            scalar("split.count", ValueType.UINT16, n_shards),
            scalar("split.tensors.count", ValueType.INT32, n_tensors),
        ]
        part = model.tensors[n_tensors * index // n_shards : n_tensors * (index + 1) // n_shards]
        shards.append(
            replace(model, pairs=[*(model.pairs if index == 0 else []), *keys], tensors=part)
        )
    return shards


def write_shards(shards: Sequence[RawGguf], folder: Path, stem: str = "model") -> list[Path]:
    """Write shards under the names llama.cpp wants and return their paths."""
    count = len(shards)
    return [
        shard.write(folder / f"{stem}-{i + 1:05d}-of-{count:05d}.gguf")
        for i, shard in enumerate(shards)
    ]
