"""What is read from metadata, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import builders
from builders import RawGguf
from edgert.errors import FormatError
from quant.architectures import KNOWN_ARCHITECTURES, RECURRENT_ARCHITECTURES
from quant.formats import GgmlType
from quant.metadata import ValueType
from quant.model_spec import ModelSpec, kv_bytes, read_model_spec
from quant.tensor_file import open_tensor_file

Reader = Callable[[RawGguf], ModelSpec]
Change = Callable[[RawGguf], RawGguf]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    def read(model: builders.RawGguf) -> ModelSpec:
        return read_model_spec(open_tensor_file(model.write(tmp_path / "model.gguf")))

    return read


def test_spec_states_what_was_built(read: Reader) -> None:
    spec = read(builders.llama())
    assert (spec.architecture, spec.name, spec.tokenizer_model) == ("llama", "tiny", "llama")
    assert (spec.n_layer, spec.n_embd, spec.n_head, spec.n_head_kv) == (2, 64, 4, 2)
    assert (spec.key_length, spec.value_length, spec.n_ctx_train) == (16, 16, 128)
    assert (spec.n_vocab, spec.n_expert, spec.n_expert_used) == (286, 0, 0)
    assert (spec.chat_template, spec.tied_embeddings, spec.file_type) == (None, False, 0)
    assert spec.weight_bytes == sum(len(tensor.data) for tensor in builders.llama().tensors)


def test_model_without_output_weights_is_tied(read: Reader) -> None:
    model = builders.llama()
    assert read(replace(model, tensors=model.tensors[:-1])).tied_embeddings


def test_name_falls_back_to_the_file(read: Reader) -> None:
    assert read(builders.llama().without("general.name")).name == "model"


def test_chat_template_is_passed_on(read: Reader) -> None:
    model = builders.llama().with_pair(builders.text("tokenizer.chat_template", "{{ x }}"))
    assert read(model).chat_template == "{{ x }}"


def test_heads_may_differ_by_layer(read: Reader) -> None:
    pair = builders.array("llama.attention.head_count_kv", ValueType.UINT32, [2, 0])
    spec = read(builders.llama().with_pair(pair))
    assert spec.n_head_kv == (2, 0)
    assert spec.n_head_kv_per_layer == (2, 0)
    assert kv_bytes(spec, 256, "f16", "f16") == 256 * 2 * 16 * (2 + 2)


def test_kv_bytes_by_hand(read: Reader) -> None:
    spec = read(builders.llama())
    # 2 layers x 2 heads x 16 = 32 keys a layer and cell; 300 positions take 512 cells.
    assert kv_bytes(spec, 300, "f16", "f16") == 512 * 2 * (32 * 2 + 32 * 2)
    assert kv_bytes(spec, 256, "q8_0", "q4_0") == 256 * 2 * (34 + 18)
    with pytest.raises(ValueError, match="not a ggml type"):
        kv_bytes(spec, 256, "f17", "f16")


def test_recurrent_architectures_are_known() -> None:
    assert RECURRENT_ARCHITECTURES < KNOWN_ARCHITECTURES
    assert "clip" not in KNOWN_ARCHITECTURES
    assert len(KNOWN_ARCHITECTURES) > 100


CASES = {
    "no architecture": (lambda m: m.without("general.architecture"), "architecture is missing"),
    "unknown": (
        lambda m: m.with_pair(builders.text("general.architecture", "llama99")),
        "unknown architecture: general.architecture is 'llama99'",
    ),
    "vision part": (
        lambda m: m.with_pair(builders.text("general.architecture", "clip")),
        "architecture clip, wanted a language model",
    ),
    "zero layers": (
        lambda m: m.with_pair(builders.u32("llama.block_count", 0)),
        "llama.block_count is 0, wanted 1 to 512",
    ),
    "huge layers": (
        lambda m: m.with_pair(builders.u32("llama.block_count", 1 << 31)),
        "llama.block_count is 2,147,483,648, wanted 1 to 512",
    ),
    "too many layers": (
        lambda m: m.with_pair(builders.u32("llama.block_count", 3)),
        "llama.block_count is 3, but layer 2 has no tensors",
    ),
    "too few layers": (
        lambda m: m.with_pair(builders.u32("llama.block_count", 1)),
        r"tensor blk\.1\.attn_norm\.weight: layer 1, block_count says 1 layers",
    ),
    "zero heads": (
        lambda m: m.with_pair(builders.u32("llama.attention.head_count", 0)),
        "llama.attention.head_count is 0",
    ),
    "odd kv heads": (
        lambda m: m.with_pair(builders.u32("llama.attention.head_count_kv", 3)),
        "head_count_kv is 3 in layer 0, wanted a divisor of its 4 heads",
    ),
    "head array of wrong length": (
        lambda m: m.with_pair(
            builders.array("llama.attention.head_count_kv", ValueType.UINT32, [2, 2, 2])
        ),
        "head_count_kv has 3 elements, wanted 2, one a layer",
    ),
    "head array of strings": (
        lambda m: m.with_pair(
            builders.array("llama.attention.head_count", ValueType.STRING, [b"a", b"b"])
        ),
        "head_count is an array of string",
    ),
    "negative heads": (
        lambda m: m.with_pair(
            builders.array("llama.attention.head_count", ValueType.INT32, [-4, 4])
        ),
        "head_count is -4 in layer 0",
    ),
    "zero width": (
        lambda m: m.with_pair(builders.u32("llama.embedding_length", 0)),
        "llama.embedding_length is 0",
    ),
    "width of another model": (
        lambda m: m.with_pair(builders.u32("llama.embedding_length", 128)).with_pair(
            builders.u32("llama.rope.dimension_count", 32)
        ),
        r"tensor token_embd\.weight: shape \(64, 286\), wanted \(128, 286\)",
    ),
    "wrong type": (
        lambda m: m.with_pair(builders.text("llama.embedding_length", "64")),
        "llama.embedding_length is a string, wanted a uint32",
    ),
    "no context length": (lambda m: m.without("llama.context_length"), "context_length is missing"),
    "experts used without experts": (
        lambda m: m.with_pair(builders.u32("llama.expert_used_count", 2)),
        "expert_used_count is 2, wanted 1 to expert_count = 0",
    ),
    "too many experts": (
        lambda m: m.with_pair(builders.u32("llama.expert_count", 5000)),
        "expert_count is 5,000, wanted 0 to 1,024",
    ),
    "expert groups": (
        lambda m: m.with_pair(builders.u32("llama.expert_group_count", 1)),
        "expert_group_count is 1, wanted fewer than 0 experts",
    ),
    "rope scaling": (
        lambda m: m.with_pair(builders.text("llama.rope.scaling.type", "twisted")),
        "rope.scaling.type is 'twisted', wanted none, linear, yarn, longrope",
    ),
    "activation format as weights": (
        lambda m: m.with_tensor(0, type_id=GgmlType.I32),
        r"tensor token_embd\.weight: type i32, wanted a weight type",
    ),
    "norm in halves": (
        lambda m: m.with_tensor(1, type_id=GgmlType.F16, data=bytes(128)),
        r"tensor blk\.0\.attn_norm\.weight: type f16, wanted f32",
    ),
    "negative epsilon": (
        lambda m: m.with_pair(
            builders.scalar("llama.attention.layer_norm_rms_epsilon", ValueType.FLOAT32, -1.0)
        ),
        "layer_norm_rms_epsilon is -1.0, wanted a small positive number",
    ),
    "unequal head lengths": (
        lambda m: m.with_pair(builders.u32("llama.attention.value_length", 8)),
        "attention.value_length is 8, wanted the 16 of keys",
    ),
    "partial rotation": (
        lambda m: m.with_pair(builders.u32("llama.rope.dimension_count", 8)),
        "rope.dimension_count is 8, wanted the 16 of a head",
    ),
    "no tensors": (lambda m: replace(m, tensors=[]), "the file holds no tensors"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES.keys())
def test_contradictions_are_refused(read: Reader, change: Change, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(change(builders.llama()))
    assert "model.gguf" in caught.value.message


@pytest.mark.data
def test_published_models_are_read() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "llm" / "stories260K" / "derived"
    paths = sorted(folder.glob("*.gguf"))
    if not paths:
        pytest.skip(f"{folder} holds no models")
    for path in paths:
        spec = read_model_spec(open_tensor_file(path))
        assert (spec.architecture, spec.n_layer, spec.n_vocab) == ("llama", 5, 512)
