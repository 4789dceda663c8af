"""Make random-weight GGUF models of realistic shapes, for tests and measurements.

Weights are symmetric around zero: a biased code would make the hidden states of all tokens alike.
"""

from __future__ import annotations

import argparse
import itertools
import os
import string
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

N_CTX_TRAIN = 8192
SEED = 0
_POOL_ELEMENTS = 1 << 25  # as many random codes are drawn; longer tensors repeat them, shifted
_ROUTER_SPREAD = 0.5  # sigma of the log-normal factor on a router row: experts differ in popularity
_QUIET = 1 / 64
_DISTINCT_ROWS = 8000
_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of one model; with experts, `n_ff` is the width of each."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    head_length: int
    n_expert: int = 0
    n_expert_used: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to be made; `shape` is in NumPy's order, rows last. Norms are ones, routers F32.

    A "loud" embedding outweighs what "quiet" matrices add to the residual stream, and "successor"
    rows are those of the embedding, moved: such a model's greedy text counts through blocks of
    tokens, over and over (`--repeat`), at the cost of any other model of its shape.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "matrix"


@dataclass(frozen=True, slots=True)
class Request:
    """What to make and how to lay it out."""

    shape_name: str
    out: Path
    weight_type: str = "Q4_0"
    vocab: Path | None = None
    n_shards: int = 1
    scatter: bool = False
    tied: bool = False
    repeat: int | None = None
    header_only: bool = False


SHAPES = {
    "tiny": Shape(256, 4, 8, 4, 704, 32),
    "1b": Shape(2048, 22, 32, 4, 5632, 64),
    "3b": Shape(3072, 28, 24, 8, 8192, 128),
    "7b": Shape(4096, 32, 32, 32, 11008, 128),
    "70b": Shape(8192, 80, 64, 8, 28672, 128),
    "thin": Shape(2048, 22, 8, 4, 512, 64),  # the width and layers of 1b, and little to compute
    "30b-a3b": Shape(2048, 48, 32, 4, 768, 128, n_expert=128, n_expert_used=8),
    "moe": Shape(2048, 24, 32, 4, 768, 64, n_expert=64, n_expert_used=8),
    "tiny-moe": Shape(256, 4, 8, 4, 256, 32, n_expert=8, n_expert_used=2),
}


class WeightSource:
    """Random weights with unit-variance output for unit-variance input, drawn from one pool."""

    def __init__(self, weight_type: str, repeat: int | None = None) -> None:
        self.weight_type = GGMLQuantizationType[weight_type]
        self._repeat = repeat
        self.random = np.random.default_rng(SEED)
        self._cursor = 0
        self._pool = self._draw_pool()

    def data(self, weight: Weight) -> NDArray[np.generic]:
        """Return one tensor as it is stored."""
        if weight.kind == "norm":
            return np.ones(weight.shape, np.float32)
        if weight.kind == "router":
            n_expert, n_embd = weight.shape
            popularity = np.exp(_ROUTER_SPREAD * self.random.standard_normal(n_expert))
            rows = self.random.standard_normal(weight.shape) / np.sqrt(n_embd)
            router: NDArray[np.float32] = (rows * popularity[:, None]).astype(np.float32)
            return router
        if weight.kind == "successor" and self._repeat is not None:
            return self._successor(weight, self._repeat)
        row_length = weight.shape[-1]
        scale = {"quiet": _QUIET, "loud": row_length**0.5}.get(weight.kind, 1.0)
        return self._matrix(int(np.prod(weight.shape)), row_length, scale)

    def _successor(self, weight: Weight, period: int) -> NDArray[np.generic]:
        """Return rows such that after token t the likeliest is the next of its block."""
        cursor, self._cursor = self._cursor, 0  # where the token embedding, the first, began
        n_rows, row_length = weight.shape
        embedding = self._matrix(n_rows * row_length, row_length, 1.0).reshape(n_rows, -1)
        self._cursor = cursor
        tokens = np.arange(n_rows)
        before = tokens - tokens % period + (tokens - 1) % period
        moved: NDArray[np.generic] = embedding[np.minimum(before, n_rows - 1)].copy()
        # Codes repeat after a while and equal rows would tie: only the first are at full scale.
        weak = moved[_DISTINCT_ROWS:]
        if self.weight_type is GGMLQuantizationType.F16:
            moved[_DISTINCT_ROWS:] = weak.view(np.float16) * np.float16(0.5)
        elif len(weak):
            block_bytes = gguf.GGML_QUANT_SIZES[self.weight_type][1]
            scales = weak.reshape(len(weak), -1, block_bytes)[:, :, :2].copy()
            halved = (scales.view(np.float16) * np.float16(0.5)).view(np.uint8)
            weak.reshape(len(weak), -1, block_bytes)[:, :, :2] = halved
        return moved

    def _draw_pool(self) -> NDArray[np.uint8]:
        normal = self.random.standard_normal(_POOL_ELEMENTS, np.float32)
        if self.weight_type is GGMLQuantizationType.Q4_0:
            codes: NDArray[np.uint8] = (np.clip(np.rint(normal * 2.6), -7, 7) + 8).astype(np.uint8)
            return codes[0::2] | codes[1::2] << np.uint8(4)
        if self.weight_type is GGMLQuantizationType.Q8_0:
            wide: NDArray[np.int8] = np.clip(np.rint(normal * 32), -127, 127).astype(np.int8)
            return wide.view(np.uint8)
        return normal.astype(np.float16).view(np.uint8)

    def _matrix(self, n_elements: int, row_length: int, scale: float) -> NDArray[np.generic]:
        unit = scale * row_length**-0.5
        if self.weight_type is GGMLQuantizationType.F16:
            return self._take(2 * n_elements).view(np.float16) * np.float16(unit)
        is_q4 = self.weight_type is GGMLQuantizationType.Q4_0
        n_blocks, code_bytes, step = n_elements // 32, 16 if is_q4 else 32, 2.6 if is_q4 else 32.0
        blocks = np.empty((n_blocks, 2 + code_bytes), np.uint8)
        blocks[:, :2] = np.array([unit / step], np.float16).view(np.uint8)
        blocks[:, 2:] = self._take(n_blocks * code_bytes).reshape(n_blocks, code_bytes)
        return blocks

    def _take(self, n_bytes: int) -> NDArray[np.uint8]:
        taken = np.resize(np.roll(self._pool, -self._cursor), n_bytes).astype(np.uint8, copy=False)
        # Even, so that halves of floats are not mixed.
        self._cursor = (self._cursor + n_bytes * 7 + 131) % len(self._pool) // 2 * 2
        return taken


def make_model(request: Request) -> list[Path]:
    """Write the model and return its files, which get their names once all are complete."""
    shape = SHAPES[request.shape_name]
    weights = _weights(shape, _vocabulary_size(request.vocab), request.tied)
    if request.repeat is not None:
        weights = [_repeating(weight) for weight in weights]
    if request.scatter:
        order = np.random.default_rng(SEED + 1).permutation(len(weights))
        weights = [weights[i] for i in order]
    weight_type = GGMLQuantizationType[request.weight_type]
    source = None if request.header_only else WeightSource(request.weight_type, request.repeat)
    finals = _shard_paths(request)
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in finals]
    bounds = [len(weights) * i // len(finals) for i in range(len(finals) + 1)]
    try:
        for index, temporary in enumerate(temporaries):
            writer = _writer(temporary, request, shape, first=index == 0)
            if len(finals) > 1:
                writer.add_uint16("split.no", index)
                writer.add_uint16("split.count", len(finals))
                writer.add_int32("split.tensors.count", len(weights))
            own = weights[bounds[index] : bounds[index + 1]]
            _write(writer, temporary, own, (weight_type, source))
        for temporary, final in zip(temporaries, finals, strict=True):
            temporary.replace(final)
    finally:
        for temporary in temporaries:
            with suppress(FileNotFoundError):
                temporary.unlink()
    return finals


def _shard_paths(request: Request) -> list[Path]:
    if request.n_shards == 1:
        return [request.out]
    count = request.n_shards
    names = [f"{request.out.stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    return [request.out.with_name(name) for name in names]


def _writer(path: Path, request: Request, shape: Shape, *, first: bool) -> GGUFWriter:
    writer = GGUFWriter(path, "qwen3moe" if shape.n_expert else "llama")
    if not first:
        return writer
    writer.add_name(f"random {request.shape_name} {request.weight_type}")
    n_vocab = _add_vocabulary(writer, request.vocab)
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_length)
    writer.add_file_type(_FILE_TYPES[request.weight_type])
    if shape.n_head * shape.head_length != shape.n_embd or shape.n_expert:
        writer.add_key_length(shape.head_length)
        writer.add_value_length(shape.head_length)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff)
        writer.add_rope_freq_base(1e6)
    return writer


def _write(
    writer: GGUFWriter,
    path: Path,
    weights: list[Weight],
    content: tuple[GGMLQuantizationType, WeightSource | None],
) -> None:
    """Write a file; without a source a hole takes the place of the data: enough to plan for."""
    weight_type, source = content
    n_data_bytes = 0
    for weight in weights:
        is_matrix = weight.kind not in ("norm", "router")
        tensor_type = weight_type if is_matrix else GGMLQuantizationType.F32
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        n_bytes = int(np.prod(weight.shape)) // block_length * block_bytes
        stored = gguf.quant_shape_to_byte_shape(weight.shape, tensor_type)
        plain = tensor_type in (GGMLQuantizationType.F16, GGMLQuantizationType.F32)
        writer.add_tensor_info(
            weight.name,
            weight.shape if plain else stored,
            np.dtype(np.float32 if plain else np.uint8),
            n_bytes,
            raw_dtype=tensor_type,
        )
        n_data_bytes += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if source is not None:
        for weight in weights:
            writer.write_tensor_data(source.data(weight))
    writer.close()
    if source is None:
        os.truncate(path, -(-path.stat().st_size // 32) * 32 + n_data_bytes)


def _weights(shape: Shape, n_vocab: int, tied: bool) -> list[Weight]:
    weights = [Weight("token_embd.weight", (n_vocab, shape.n_embd))]
    for layer in range(shape.n_layer):
        weights += _layer_weights(shape, f"blk.{layer}.")
    weights.append(Weight("output_norm.weight", (shape.n_embd,), "norm"))
    return weights if tied else [*weights, Weight("output.weight", (n_vocab, shape.n_embd))]


def _repeating(weight: Weight) -> Weight:
    if weight.name == "output.weight":
        return replace(weight, kind="successor")
    if weight.name == "token_embd.weight":
        return replace(weight, kind="loud")
    quiet = ("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight")
    return replace(weight, kind="quiet") if weight.name.endswith(quiet) else weight


def _layer_weights(shape: Shape, prefix: str) -> Iterator[Weight]:
    n_embd, n_ff, n_expert = shape.n_embd, shape.n_ff, shape.n_expert
    q_length, kv_length = shape.n_head * shape.head_length, shape.n_head_kv * shape.head_length
    yield Weight(prefix + "attn_norm.weight", (n_embd,), "norm")
    yield Weight(prefix + "attn_q.weight", (q_length, n_embd))
    yield Weight(prefix + "attn_k.weight", (kv_length, n_embd))
    yield Weight(prefix + "attn_v.weight", (kv_length, n_embd))
    yield Weight(prefix + "attn_output.weight", (n_embd, q_length))
    yield Weight(prefix + "ffn_norm.weight", (n_embd,), "norm")
    if not n_expert:
        yield Weight(prefix + "ffn_gate.weight", (n_ff, n_embd))
        yield Weight(prefix + "ffn_up.weight", (n_ff, n_embd))
        yield Weight(prefix + "ffn_down.weight", (n_embd, n_ff))
        return
    yield Weight(prefix + "attn_q_norm.weight", (shape.head_length,), "norm")
    yield Weight(prefix + "attn_k_norm.weight", (shape.head_length,), "norm")
    yield Weight(prefix + "ffn_gate_inp.weight", (n_expert, n_embd), "router")
    yield Weight(prefix + "ffn_gate_exps.weight", (n_expert, n_ff, n_embd))
    yield Weight(prefix + "ffn_up_exps.weight", (n_expert, n_ff, n_embd))
    yield Weight(prefix + "ffn_down_exps.weight", (n_expert, n_embd, n_ff))


def synthetic_tokens(n_vocab: int) -> tuple[list[bytes], list[int]]:
    """Return texts and types of a SentencePiece vocabulary: specials, bytes, letters, groups."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    # "\u2581" stands for a space, which is why no plain one is among the characters
    pieces = ["\u2581", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces += [f"\u2581{letter}" for letter in string.ascii_letters]
    for length, front in itertools.product((2, 3), ("", "\u2581")):
        groups = itertools.product(string.ascii_lowercase, repeat=length)
        pieces += [front + "".join(group) for group in groups]
    pieces = pieces[: n_vocab - len(texts)]
    if len(texts) + len(pieces) != n_vocab:
        raise ValueError(f"a vocabulary of {n_vocab} tokens cannot be made, wanted 259 to 36,000")
    types += [gguf.TokenType.NORMAL] * len(pieces)
    return [text.encode() for text in [*texts, *pieces]], [int(t) for t in types]


_SYNTHETIC_VOCABULARY = 32000


def _add_vocabulary(writer: GGUFWriter, vocab: Path | None) -> int:
    if vocab is None:
        texts, types = synthetic_tokens(_SYNTHETIC_VOCABULARY)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores([-float(i) for i in range(len(texts))])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        return len(texts)
    fields = GGUFReader(vocab).fields
    for key, field in fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    return len(fields["tokenizer.ggml.tokens"].data)


def _vocabulary_size(vocab: Path | None) -> int:
    if vocab is None:
        return _SYNTHETIC_VOCABULARY
    return len(GGUFReader(vocab).fields["tokenizer.ggml.tokens"].data)


def main() -> int:
    """Parse the command line, make the model, print its files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="the GGUF to write")
    parser.add_argument("--vocab", type=Path, help="take the tokenizer of this GGUF")
    parser.add_argument("--type", choices=_FILE_TYPES, default="Q4_0", dest="weight_type")
    parser.add_argument("--split", type=int, default=1, metavar="N", help="write N shards")
    parser.add_argument("--scatter", action="store_true", help="shuffle the order of the tensors")
    parser.add_argument(
        "--header-only", action="store_true", help="a hole in place of the weights: to plan for"
    )
    parser.add_argument("--tied", action="store_true", help="no output.weight, as tied embeddings")
    parser.add_argument(
        "--repeat", type=int, metavar="PERIOD", help="greedy text repeats blocks of PERIOD tokens"
    )
    options = parser.parse_args()
    if options.repeat is not None and (options.repeat < 2 or options.scatter or options.tied):
        parser.error("--repeat wants at least 2, and neither --scatter nor --tied")
    if not 1 <= options.split <= 64:
        parser.error(f"--split {options.split}: wanted 1 to 64")
    request = Request(
        options.shape,
        options.out,
        options.weight_type,
        options.vocab,
        options.split,
        options.scatter,
        options.tied,
        options.repeat,
        options.header_only,
    )
    for path in make_model(request):
        print(f"{path} {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
