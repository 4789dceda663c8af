"""The maker of random models: shapes, layouts, statistics."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_model.py"


def make(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make("tiny", path)
    return path


def test_tiny_passes_validation(tiny: Path) -> None:
    spec = read_model_spec(open_tensor_file(tiny))
    assert (spec.architecture, spec.n_layer, spec.n_embd, spec.n_vocab) == ("llama", 4, 256, 32000)
    assert not spec.tied_embeddings


def test_codes_are_symmetric(tiny: Path) -> None:
    file = open_tensor_file(tiny)
    tensor = file.tensor("blk.0.ffn_up.weight")
    raw = np.fromfile(tiny, np.uint8, tensor.size_bytes, offset=tensor.offset_bytes)
    codes = raw.reshape(-1, 18)[:, 2:]
    values = np.concatenate([codes & 15, codes >> 4]).astype(int) - 8
    assert abs(values.mean()) < 0.05
    assert 2.4 < values.std() < 2.8


def test_header_alone_is_of_the_type_that_was_asked_for(tmp_path: Path) -> None:
    make("tiny", tmp_path / "hole.gguf", "--type", "Q8_0", "--header-only")
    file = open_tensor_file(tmp_path / "hole.gguf")
    matrix = file.tensor("blk.0.ffn_up.weight")
    assert matrix.size_bytes * 32 == matrix.shape[0] * matrix.shape[1] * 34


def test_nothing_else_is_left_behind(tiny: Path) -> None:
    assert list(tiny.parent.iterdir()) == [tiny]


def test_split_scattered_tied_mixture_of_experts(tmp_path: Path) -> None:
    make("tiny-moe", tmp_path / "m.gguf", "--split", 3, "--scatter", "--tied", "--type", "Q8_0")
    file = open_tensor_file(tmp_path / "m-00001-of-00003.gguf")
    spec = read_model_spec(file)
    assert len(file.shards) == 3
    assert (spec.architecture, spec.n_expert, spec.n_expert_used) == ("qwen3moe", 8, 2)
    assert spec.tied_embeddings
    layers = [t.layer_index for t in file.tensors if t.layer_index is not None]
    assert layers != sorted(layers)


def test_same_request_gives_same_bytes(tiny: Path, tmp_path: Path) -> None:
    make("tiny", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()


def test_vocabulary_covers_every_byte_once() -> None:
    specification = importlib.util.spec_from_file_location("make_model", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["make_model"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    texts, types = module.synthetic_tokens(32000)
    assert len(set(texts)) == len(texts) == len(types) == 32000
    with pytest.raises(ValueError, match="cannot be made"):
        module.synthetic_tokens(100_000)
