"""Part files that lie about themselves, and models that are not taken apart."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import Pair, RawGguf, RawTensor, array, scalar, text, u32
from edgert.errors import ConfigError, FormatError
from make_model import Request, make_model
from part_models import N_VOCAB, SHAPES, SOURCE, Shape, make_part, random_model
from quant.formats import GgmlType
from quant.header_writer import Listed, compose_header
from quant.header_writer import Pair as WrittenPair
from quant.header_writer import pair as written
from quant.metadata import ValueType
from quant.nested.encoder import ModelEncoder
from quant.nested.file import read_nested
from quant.nested.source import TensorReader
from quant.nested.writer import NestedRequest, write_nested
from quant.parts.cuts import are_alike
from quant.parts.file import read_part
from quant.parts.keys import KEY
from quant.parts.spec import HeadRows, PartSpec, Share
from quant.parts.write import part_content
from quant.tensor_file import open_tensor_file

SHARED = PartSpec(1, 3, False, HeadRows(0, 100), Share(0, 2, 3))
FRONT = PartSpec(0, 2, True, "none")
EXIT = PartSpec(4, 4, False, "whole")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(SHAPES["llama"]).write(tmp_path_factory.mktemp("model") / "llama.gguf")


def numbers(key: str, *values: int) -> Pair:
    return array(KEY + key, ValueType.UINT32, values)


def with_pair(model: Path, spec: PartSpec, out: Path, changed: Pair | str) -> Path:
    """Write a part with one key changed, or left out where only its name is given."""
    content = part_content(open_tensor_file(model), spec, SOURCE)
    path = out / "part.gguf"
    path.write_bytes(b"".join(content.read(0)))
    file = open_tensor_file(path)
    name = changed if isinstance(changed, str) else changed.key
    pairs = [written(k, file.value_types[k], v) for k, v in file.metadata.items() if k != name]
    if not isinstance(changed, str):
        pairs.append(WrittenPair(changed.key, ValueType(changed.type_id), changed.payload))
    first = file.shards[0].data_offset_bytes
    listed = [
        Listed(t.name, t.shape, int(t.ggml_type), t.offset_bytes - first) for t in file.tensors
    ]
    path.write_bytes(compose_header(pairs, listed, 32) + path.read_bytes()[first:])
    return path


@pytest.mark.parametrize(
    ("spec", "changed", "message"),
    [
        (SHARED, f"{KEY}version", "version is missing or no uint32"),
        (SHARED, u32(f"{KEY}version", 2), "version is 2, wanted 1"),
        (SHARED, text(f"{KEY}version", "1"), "version is missing or no uint32"),
        (SHARED, text(f"{KEY}source", "5" * 63), "source is '5+', wanted a sha256"),
        (SHARED, f"{KEY}source", "source is missing or no string"),
        (SHARED, f"{KEY}layers", "layers is missing or no array of uint32"),
        (SHARED, numbers("layers", 1), "layers has 1 elements, wanted 2"),
        (SHARED, numbers("layers", 3, 1), "layers is 3 to 1 of 4"),
        (SHARED, numbers("layers", 1, 5), "layers is 1 to 5 of 4"),
        (SHARED, numbers("layers", 1, 4), "has 3 layers, llama.block_count says otherwise"),
        (SHARED, numbers("share", 2, 2, 3), "share is 2 to 2 of 3"),
        (SHARED, numbers("share", 0, 4, 3), "share is 0 to 4 of 3"),
        (SHARED, numbers("head_rows", 0, N_VOCAB + 1), "head_rows is 0 to"),
        (SHARED, numbers("head_rows", 0, 99), "wants 99 rows of token_embd.weight, it has 100"),
        (SHARED, text(f"{KEY}head", "half"), "head is 'half', wanted none, whole or rows"),
        (SHARED, text(f"{KEY}head", "whole"), "rows of token_embd.weight, it has 100"),
        (SHARED, text(f"{KEY}head", "none"), "wants 32 rows of token_embd.weight"),
        (SHARED, scalar(f"{KEY}embedding", ValueType.BOOL, True), "the head has some rows only"),
        (SHARED, text(f"{KEY}architecture", "qwen3"), "is 'qwen3', general.architecture says"),
        (SHARED, text(f"{KEY}architecture", "qwen2"), "is 'qwen2', general.architecture says"),
        (SHARED, f"{KEY}tied", "tied is missing or no boolean"),
        (FRONT, scalar(f"{KEY}embedding", ValueType.BOOL, False), "the tokenizer says otherwise"),
        (FRONT, text(f"{KEY}head", "whole"), "head and embedding want output.weight"),
        (FRONT, u32(f"{KEY}n_vocab", 7), "wants 7 rows of token_embd.weight"),
        (FRONT, numbers("layers", 0, 0), "says otherwise"),
        (EXIT, text(f"{KEY}head", "none"), "not either the embeddings or the head"),
        (EXIT, numbers("layers", 2, 4), "llama.block_count says otherwise"),
        (EXIT, numbers("share", 0, 1, 3), "share is 0 to 1 of 3"),
    ],
)
def test_keys_that_lie_are_found(
    llama: Path, tmp_path: Path, spec: PartSpec, changed: Pair | str, message: str
) -> None:
    path = with_pair(llama, spec, tmp_path, changed)
    with pytest.raises(FormatError, match=message) as caught:
        read_part(open_tensor_file(path))
    assert caught.value.path == path


def test_key_left_as_it_is_is_no_lie(llama: Path, tmp_path: Path) -> None:
    path = with_pair(llama, SHARED, tmp_path, "no such key")
    part = read_part(open_tensor_file(path))
    assert part is not None
    assert part.spec == SHARED


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_mutated_part_is_read_or_refused(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, position: float, value: int
) -> None:
    content = part_content(open_tensor_file(llama), SHARED, SOURCE)
    data = bytearray(b"".join(content.read(0)))
    data[int(position * len(content.header))] = value
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(data)
    with suppress(FormatError):
        read_part(open_tensor_file(path))


def called(architecture: str) -> RawGguf:
    return random_model(replace(SHAPES["llama"], architecture=architecture))


def with_tensor(name: str, *dims: int) -> RawGguf:
    model = random_model(SHAPES["llama"])
    size = 4
    for length in dims:
        size *= length
    return replace(
        model, tensors=[*model.tensors, RawTensor(name, dims, GgmlType.F32, bytes(size))]
    )


def mixed() -> RawGguf:
    """A model whose FFNs have types of other block lengths."""
    wide = replace(SHAPES["llama"], n_ff=256)
    model = random_model(wide)
    of_blocks = random_model(replace(wide, weight_type=GgmlType.Q8_0))
    tensors = [
        blocked if plain.name == "blk.1.ffn_down.weight" else plain
        for plain, blocked in zip(model.tensors, of_blocks.tensors, strict=True)
    ]
    return replace(model, tensors=tensors)


def narrow_heads() -> RawGguf:
    """A model in which two heads share a block."""
    return random_model(Shape(weight_type=GgmlType.Q8_0, n_head=4, n_head_kv=4, head_length=16))


def biased_output(architecture: str) -> RawGguf:
    model = called(architecture)
    bias = RawTensor("output.bias", (N_VOCAB,), GgmlType.F32, bytes(4 * N_VOCAB))
    return replace(model, tensors=[*model.tensors, bias])


LAYERS = PartSpec(0, 2, True, "none")
THIRD = PartSpec(0, 4, False, "none", Share(0, 1, 3))


@pytest.mark.parametrize(
    ("model", "spec", "reason"),
    [
        (called("gemma"), LAYERS, "scales what enters its first layer"),
        (called("gemma3"), LAYERS, "sliding window follows from their numbers"),
        (called("gemma3n"), LAYERS, "use what others computed"),
        (called("stablelm"), LAYERS, r"verified that its parts .* \(architecture stablelm\)"),
        (called("llama"), PartSpec(2, 5, False, "none"), "it has 4 layers"),
        (called("llama"), PartSpec(0, 4, True, HeadRows(0, 9)), "embeddings have the rows of all"),
        (called("llama"), PartSpec(0, 4, False, HeadRows(0, 10**6)), "tokens"),
        (called("llama"), PartSpec(4, 4, True, "whole"), "each in a file of its own"),
        (called("llama"), PartSpec(4, 4, False, "none"), "each in a file of its own"),
        (called("llama"), replace(THIRD, share=Share(0, 1, 2)), "are no 2 equal groups"),
        (called("llama"), replace(THIRD, share=Share(1, 1, 3)), "groups begin before they end"),
        (called("llama").with_pair(u32("llama.nextn_predict_layers", 1)), LAYERS, "predict ahead"),
        (with_tensor("position_embd.weight", 64, 128), LAYERS, "belongs to no layer and no end"),
        (with_tensor("blk.1.attn_sinks.weight", 64, 6), THIRD, "has no known split"),
        (with_tensor("blk.1.attn_q_norm.weight", 192), THIRD, "has no known split"),
        (biased_output("qwen2"), EXIT, "no place in the graph of such a part"),
        (biased_output("qwen2"), replace(THIRD, head="whole"), "no place in the graph"),
        (narrow_heads(), replace(THIRD, share=Share(0, 1, 4)), "reach over 4 groups"),
        (random_model(Shape(weight_type=GgmlType.Q8_0, n_ff=64)), THIRD, "too narrow"),
        (mixed(), THIRD, "cut at different columns"),
    ],
)
def test_part_that_would_compute_something_else_is_refused(
    tmp_path: Path, model: RawGguf, spec: PartSpec, reason: str
) -> None:
    path = model.write(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=reason):
        part_content(open_tensor_file(path), spec, SOURCE)


def test_mixture_has_layers_but_no_shares(tmp_path: Path) -> None:
    (path, *_) = make_model(Request("tiny-moe", tmp_path / "moe.gguf"))
    make_part(path, PartSpec(1, 3, False, "none"), tmp_path / "part.gguf")
    with pytest.raises(ConfigError, match="experts are not split"):
        part_content(open_tensor_file(path), PartSpec(1, 3, False, "none", Share(0, 1, 2)), SOURCE)


def test_layers_of_a_nested_model_stay_nested(tmp_path: Path) -> None:
    (source, *_) = make_model(Request("tiny-moe", tmp_path / "moe.gguf"))
    path = tmp_path / "nested.gguf"
    with TensorReader(open_tensor_file(source)) as reader, path.open("w+b") as stream:
        encoder = ModelEncoder(reader, (2, 4))
        write_nested(stream, reader, NestedRequest(2, 4, "0" * 64), encoder, lambda *_: None)
    whole = read_nested(open_tensor_file(path))
    part = make_part(path, PartSpec(1, 3, False, "none"), tmp_path / "part.gguf")
    own = read_nested(part.file)
    assert whole is not None
    assert own is not None
    assert len(own.tensors) == 2 * len(whole.tensors) // 4
    for name, tensor in own.tensors.items():
        own.verify(name)
        of_whole = whole.tensor(part.whole_name(name) or "")
        assert (tensor.sha256, tensor.layout) == (of_whole.sha256, of_whole.layout)
    head = make_part(path, PartSpec(4, 4, False, "whole"), tmp_path / "head.gguf")
    assert read_nested(head.file) is None


def test_ffns_are_alike_where_all_blocks_end_at_the_same_columns() -> None:
    assert are_alike([(512, 32), (512, 256)], 2)
    assert not are_alike([(512, 32), (512, 256)], 4)
    assert are_alike([(512, 32)] * 3, 3)
    assert not are_alike([(512, 32), (256, 32)], 1)
