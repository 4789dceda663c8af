"""Part files: what they hold of a model, to the byte, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import split, write_shards
from edgert.errors import FormatError
from part_models import N_VOCAB, SHAPES, SOURCE, Shape, make_part, random_model
from partition.language_workload import describe_language
from partition.manifest import TensorShare
from partition.tensor_split import Part as PlannedPart
from partition.tensor_split import split_workload, why_not_split
from quant.formats import format_of
from quant.model_spec import read_model_spec
from quant.nested.source import TensorReader
from quant.parts.cuts import width_rows
from quant.parts.file import read_part
from quant.parts.rules import SHARES_VERIFIED
from quant.parts.spec import HeadRows, PartSpec, Share
from quant.parts.write import PIECE_BYTES, part_content, source_identity
from quant.tensor_file import TensorFile, open_tensor_file

SHARES = [Share(0, 2, 3), Share(2, 3, 3), Share(0, 1, 3), Share(1, 2, 3), Share(0, 3, 3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: random_model(s).write(folder / f"{name}.gguf") for name, s in SHAPES.items()}


def values(file: TensorFile, name: str) -> np.ndarray:
    """Blocks of a tensor, (rows, blocks of a row, bytes of a block)."""
    entry = file.tensor(name)
    with TensorReader(file) as reader:
        data = reader.data(entry, 0, entry.size_bytes)
    kind = format_of(entry.ggml_type)
    n_rows = entry.shape[1] if len(entry.shape) > 1 else 1
    return data.reshape(n_rows, -1, kind.block_bytes)


@pytest.mark.parametrize(
    "name", [n for n, s in SHAPES.items() if s.architecture in SHARES_VERIFIED]
)
@pytest.mark.parametrize("share", SHARES)
def test_shares_have_the_bytes_that_the_planner_counts(
    models: dict[str, Path], tmp_path: Path, name: str, share: Share
) -> None:
    file = open_tensor_file(models[name])
    workload = describe_language(file, read_model_spec(file))
    assert why_not_split(workload) is None
    planned_share = TensorShare(
        first_group=share.first_group, end_group=share.end_group, n_groups=share.n_groups
    )
    planned = split_workload(workload, PlannedPart(planned_share, False, "rows"))
    rows = HeadRows(share.first_group * N_VOCAB // 3, share.end_group * N_VOCAB // 3)
    part = make_part(models[name], PartSpec(0, 4, False, rows, share), tmp_path / "part.gguf")
    counted = {t.name: (t.shape, t.size_bytes) for x in planned.layers for t in x.tensors}
    counted |= {t.name: (t.shape, t.size_bytes) for t in planned.head.tensors}
    held = {part.whole_name(e.name): (e.shape, e.size_bytes) for e in part.file.tensors}
    assert held == counted
    spec = read_model_spec(part.file)
    assert (spec.n_head, spec.n_head_kv) == (planned.spec.n_head, planned.spec.n_head_kv)


@pytest.mark.parametrize("name", ["llama", "llama-tied-q8_0", "llama-q4_0", "qwen2-tied-f16"])
def test_rows_and_columns_of_a_share_are_those_of_its_heads(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    whole = open_tensor_file(models[name])
    spec = PartSpec(1, 3, False, "none", Share(1, 3, 3))
    part = make_part(models[name], spec, tmp_path / "part.gguf").file
    block = format_of(whole.tensor("blk.2.ffn_down.weight").ggml_type).block_length
    first = 224 // 3 // block * block  # of 224 columns a third, down to whole blocks
    for own, tensor, rows, cut in (
        ("blk.1.attn_q.weight", "blk.2.attn_q.weight", slice(64, 192), slice(None)),
        ("blk.1.attn_k.weight", "blk.2.attn_k.weight", slice(32, 96), slice(None)),
        ("blk.1.attn_v.weight", "blk.2.attn_v.weight", slice(32, 96), slice(None)),
        ("blk.1.ffn_up.weight", "blk.2.ffn_up.weight", slice(first, 224), slice(None)),
        ("blk.1.attn_output.weight", "blk.2.attn_output.weight", slice(None),
         slice(64 // block, 192 // block)),
        ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight", slice(None),
         slice(first // block, 224 // block)),
    ):  # fmt: skip
        assert np.array_equal(values(part, own), values(whole, tensor)[rows, cut])


def test_fused_queries_keys_and_values_are_each_cut(
    models: dict[str, Path], tmp_path: Path
) -> None:
    whole = values(open_tensor_file(models["llama-fused"]), "blk.0.attn_qkv.weight")
    spec = PartSpec(0, 1, False, "none", Share(1, 2, 3))
    part = make_part(models["llama-fused"], spec, tmp_path / "part.gguf").file
    wanted = np.concatenate([whole[64:128], whole[192 + 32 : 192 + 64], whole[288 + 32 : 288 + 64]])
    assert np.array_equal(values(part, "blk.0.attn_qkv.weight"), wanted)


def test_biases_before_the_sum_are_cut_and_those_after_it_are_whole(
    models: dict[str, Path], tmp_path: Path
) -> None:
    spec = PartSpec(0, 1, False, "none", Share(0, 1, 3))
    part = make_part(models["llama-biased"], spec, tmp_path / "part.gguf").file
    whole = open_tensor_file(models["llama-biased"])
    for name, n_kept in (("ffn_up", 74), ("ffn_gate", 74), ("attn_output", 64), ("ffn_down", 64)):
        own = values(part, f"blk.0.{name}.bias")
        assert np.array_equal(own, values(whole, f"blk.0.{name}.bias")[:, :n_kept])


@pytest.mark.parametrize("tied", [False, True])
def test_names_lead_to_the_model_and_back(
    models: dict[str, Path], tmp_path: Path, tied: bool
) -> None:
    model = models["llama-tied-q8_0" if tied else "llama"]
    whole = open_tensor_file(model)
    specs = {
        "front": PartSpec(0, 1, True, "none"),
        "middle": PartSpec(1, 3, False, "none"),
        "back": PartSpec(3, 4, False, "whole"),
        "exit": PartSpec(4, 4, False, "whole"),
        "rows": PartSpec(0, 4, False, HeadRows(5, 90), Share(0, 1, 3)),
        "entrance": PartSpec(0, 0, True, "none"),
    }
    parts = {name: make_part(model, spec, tmp_path / name) for name, spec in specs.items()}
    for part in parts.values():
        for name in whole.by_name:
            own = part.part_name(name)
            assert own is None or part.whole_name(own) == name
        for name in part.file.by_name:
            back = part.whole_name(name)
            assert back is None or part.part_name(back) == name
    held = {n for name in ("front", "middle", "back") for n in whole.by_name
            if parts[name].part_name(n) is not None}  # fmt: skip
    assert held == set(whole.by_name)
    assert parts["front"].zeros == {"output_norm.weight"}
    assert parts["middle"].zeros == {"token_embd.weight", "output_norm.weight"}
    assert parts["back"].zeros == parts["rows"].zeros == parts["entrance"].zeros == set()
    assert parts["exit"].part_name("output_norm.weight") == "output_norm.weight"
    assert parts["exit"].part_name("blk.3.attn_q.weight") is None
    assert set(parts["entrance"].file.by_name) == {"token_embd.weight"}


@given(offset=st.integers(0, 200_000))
@settings(max_examples=25, deadline=None)
def test_part_continues_from_any_byte(models: dict[str, Path], offset: int) -> None:
    spec = PartSpec(1, 3, False, "whole", Share(1, 3, 3))
    content = part_content(open_tensor_file(models["llama-q4_0"]), spec, SOURCE)
    whole = b"".join(content.read(0))
    assert len(whole) == content.size_bytes
    assert b"".join(content.read(offset)) == whole[offset:]


def test_pieces_are_small_and_nothing_of_other_tensors_is_read(tmp_path: Path) -> None:
    shape = Shape(n_layer=2, n_embd=512, n_head=6, n_head_kv=3, head_length=64, n_ff=3072)
    model = random_model(shape).write(tmp_path / "wide.gguf")
    content = part_content(
        open_tensor_file(model), PartSpec(0, 1, False, "none", Share(0, 2, 3)), SOURCE
    )
    sizes = [len(piece) for piece in content.read(0)]
    assert max(sizes) <= PIECE_BYTES
    assert sum(sizes) == content.size_bytes < model.stat().st_size / 2


def test_shards_of_a_model_make_the_same_part(models: dict[str, Path], tmp_path: Path) -> None:
    shards = write_shards(split(random_model(SHAPES["llama"]), 3), tmp_path)
    spec = PartSpec(1, 3, False, "whole")
    of_shards = part_content(open_tensor_file(shards[0]), spec, SOURCE)
    of_one = part_content(open_tensor_file(models["llama"]), spec, SOURCE)
    assert b"".join(of_shards.read(0)) == b"".join(of_one.read(0))


def test_key_of_a_part_says_what_is_in_it(models: dict[str, Path]) -> None:
    file = open_tensor_file(models["llama"])
    specs = [PartSpec(0, 2, False, "none"), PartSpec(1, 3, False, "none"),
             PartSpec(0, 2, False, "none", Share(0, 1, 3)),
             PartSpec(0, 2, False, "none", Share(1, 2, 3))]  # fmt: skip
    keys = [part_content(file, spec, SOURCE).key for spec in specs]
    assert len(set(keys)) == 4
    assert part_content(file, specs[0], SOURCE).key == keys[0]
    assert part_content(file, specs[0], "6" * 64).key not in keys


def test_identity_of_several_files_depends_on_their_order() -> None:
    assert source_identity(["a" * 64]) == "a" * 64
    assert source_identity(["a" * 64, "b" * 64]) != source_identity(["b" * 64, "a" * 64])


def test_whole_model_is_no_part(models: dict[str, Path]) -> None:
    assert read_part(open_tensor_file(models["llama"])) is None


def test_part_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    part = make_part(models["llama"], PartSpec(0, 2, True, "none"), tmp_path / "part.gguf")
    part.check_source(SOURCE)
    with pytest.raises(FormatError, match="made of the model 5555"):
        part.check_source("6" * 64)


def test_gate_and_up_in_one_tensor_are_each_cut() -> None:
    assert width_rows(6, 3, (1, 3)) == ((1, 3), (4, 6))
    assert width_rows(3, 3, (1, 3)) == ((1, 3),)
