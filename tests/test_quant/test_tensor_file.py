"""Places of tensors and values of metadata, against the reference reader of gguf."""

import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

import builders
from edgert.errors import FormatError
from quant.formats import GgmlType
from quant.metadata import ArrayField, ValueType
from quant.tensor_file import open_tensor_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return builders.llama().write(tmp_path / "model.gguf")


def test_places_equal_those_of_the_reference_reader(model: Path) -> None:
    reference = gguf.GGUFReader(model)
    tensors = open_tensor_file(model).tensors
    saw = [(t.name, list(t.shape), t.offset_bytes, t.size_bytes) for t in tensors]
    assert saw == [
        (t.name, [int(n) for n in t.shape], t.data_offset, t.n_bytes) for t in reference.tensors
    ]


def test_metadata_equals_that_of_the_reference_reader(model: Path) -> None:
    file = open_tensor_file(model)
    for key, reference in gguf.GGUFReader(model).fields.items():
        if key.startswith("GGUF."):
            continue
        value = file.metadata[key]
        assert (value.read() if isinstance(value, ArrayField) else value) == reference.contents()


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    model = builders.llama()
    new = open_tensor_file(model.write(tmp_path / "3.gguf"))
    old = open_tensor_file(replace(model, version=2).write(tmp_path / "2.gguf"))
    assert old.tensors == new.tensors


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_alignment_moves_tensors(tmp_path: Path, alignment: int) -> None:
    model = replace(builders.llama(), alignment=alignment)
    path = model.with_pair(builders.u32("general.alignment", alignment)).write(tmp_path / "m.gguf")
    file = open_tensor_file(path)
    assert all(t.offset_bytes % alignment == 0 for t in file.tensors)
    raw = path.read_bytes()
    for stated, tensor in zip(model.tensors, file.tensors, strict=True):
        assert raw[tensor.offset_bytes : tensor.end_bytes] == stated.data


def test_layer_of_a_tensor_is_in_its_name(model: Path) -> None:
    file = open_tensor_file(model)
    assert file.tensor("blk.1.ffn_up.weight").layer_index == 1
    assert file.tensor("token_embd.weight").layer_index is None
    assert file.tensor("blk.0.ffn_up.weight").ggml_type is GgmlType.F32
    with pytest.raises(FormatError, match=r"tensor blk\.9: the model has no such tensor"):
        file.tensor("blk.9")


def test_weight_bytes_leave_out_padding(model: Path) -> None:
    assert open_tensor_file(model).weight_bytes == sum(
        len(t.data) for t in builders.llama().tensors
    )


def test_shards_join_to_the_whole(tmp_path: Path, model: Path) -> None:
    whole = open_tensor_file(model)
    paths = builders.write_shards(builders.split(builders.llama(), 3), tmp_path)
    joined = open_tensor_file(paths[0])
    assert [shard.path for shard in joined.shards] == paths
    assert {t.shard_index for t in joined.tensors} == {0, 1, 2}
    assert [(t.name, t.shape) for t in joined.tensors] == [(t.name, t.shape) for t in whole.tensors]
    for tensor in joined.tensors:
        place, other = joined.shards[tensor.shard_index].path, whole.tensor(tensor.name)
        saw = place.read_bytes()[tensor.offset_bytes : tensor.end_bytes]
        assert saw == model.read_bytes()[other.offset_bytes : other.end_bytes]


def test_symlinks_are_followed(tmp_path: Path, model: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    assert open_tensor_file(link).tensors == open_tensor_file(model).tensors


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    path = builders.llama().with_pair(builders.text("general.name", b"a\xff")).write(tmp_path / "m")
    name = open_tensor_file(path).metadata["general.name"]
    assert isinstance(name, str)
    assert name.encode("utf-8", "surrogateescape") == b"a\xff"


def test_arrays_stay_in_the_file_until_read(model: Path) -> None:
    file = open_tensor_file(model)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, ArrayField)
    assert (tokens.element_type, tokens.count) == (ValueType.STRING, 286)
    assert tokens.read_strings() == builders.spm_tokens()[0]
    os.truncate(model, tokens.offset_bytes + 10)
    with pytest.raises(FormatError, match="differs from when the header was read") as caught:
        tokens.read()
    assert caught.value.hint is not None


def test_changed_string_lengths_are_noticed(model: Path) -> None:
    tokens = open_tensor_file(model).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, ArrayField)
    with model.open("r+b") as file:
        file.seek(tokens.offset_bytes)
        file.write(struct.pack("<Q", 1 << 40))
    with pytest.raises(FormatError, match="differs"):
        tokens.read()


def test_numbers_are_no_strings(model: Path) -> None:
    scores = open_tensor_file(model).metadata["tokenizer.ggml.scores"]
    assert isinstance(scores, ArrayField)
    assert scores.read()[:3] == [0.0, -1.0, -2.0]
    with pytest.raises(FormatError, match="wanted an array of strings, saw float32"):
        scores.read_strings()


def test_large_vocabularies_cost_one_walk(tmp_path: Path) -> None:
    texts = [b"token %d" % number for number in range(150_000)]
    model = builders.llama().with_pair(
        builders.array("tokenizer.ggml.tokens", ValueType.STRING, texts)
    )
    path = model.write(tmp_path / "large.gguf")
    start = time.process_time()
    file = open_tensor_file(path)
    # A tenth of this on the machine it was written on; a read call per token would take longer.
    assert time.process_time() - start < 1.0
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, ArrayField)
    assert tokens.read_strings() == texts


def test_file_without_tensors_is_read(tmp_path: Path) -> None:
    path = builders.RawGguf(builders.llama_pairs()).write(tmp_path / "vocabulary.gguf")
    assert open_tensor_file(path).tensors == ()
