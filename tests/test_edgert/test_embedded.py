"""The models inside edgert: found by name, one vocabulary, the mixture of experts in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgert.api import EMBEDDED_MODEL, SamplingParams, load
from edgert.cli.opening import find_model
from edgert.embedded import EMBEDDED, EMBEDDED_EXPERTS, embedded_path, named_path
from edgert.errors import ConfigError
from edgert.loading import model_path
from quant.formats import GgmlType
from quant.metadata import ArrayField
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

FOLDER = Path(__file__).parents[2] / "edgert" / "models"


@pytest.mark.parametrize("file", EMBEDDED)
def test_embedded_model_has_a_card_and_is_found_by_name(file: str) -> None:
    name = Path(file).stem
    assert named_path(name) == embedded_path(file) == FOLDER / file
    assert model_path(name) == find_model(name, {}) == FOLDER / file
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")


@pytest.mark.parametrize("name", ["", ".", "tiny-moe.gguf", "models/tiny-moe", "x\0", "x" * 5000])
def test_other_names_are_none_of_them(name: str) -> None:
    assert named_path(name) is None


def test_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny-moe").touch()
    assert named_path("tiny-moe") is None
    assert model_path("tiny-moe") == find_model("tiny-moe", {}) == Path("tiny-moe")


def test_folder_of_that_name_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny-moe").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        find_model("tiny-moe", {})


def test_experts_are_a_mixture_with_exact_routers_and_one_vocabulary_with_the_chat_model() -> None:
    file, chat = (open_tensor_file(embedded_path(n)) for n in (EMBEDDED_EXPERTS, EMBEDDED_MODEL))
    spec = read_model_spec(file)
    assert (spec.architecture, spec.n_layer, spec.n_embd) == ("qwen3moe", 8, 256)
    assert (spec.n_expert, spec.n_expert_used, spec.tied_embeddings) == (16, 4, True)
    for tensor in file.tensors:
        is_exact = "norm" in tensor.name or "ffn_gate_inp" in tensor.name
        assert tensor.ggml_type == (GgmlType.F32 if is_exact else GgmlType.F16), tensor.name
    for key in ("tokens", "merges", "token_type"):
        name = f"tokenizer.ggml.{key}"
        ours, theirs = file.metadata[name], chat.metadata[name]
        assert isinstance(ours, ArrayField)
        assert isinstance(theirs, ArrayField)
        assert ours.read() == theirs.read()


@pytest.mark.model
def test_experts_answer_alike_with_and_without_drafts() -> None:
    messages = [{"role": "user", "content": "What is your name?"}]
    greedy = SamplingParams(temperature=0.0)
    with load("tiny-moe", threads=1) as engine:
        reply = engine.chat(messages, sampling=greedy, max_tokens=40)
    with load("tiny-moe", threads=1, draft="embedded", draft_max=6) as drafting:
        fast = drafting.chat(messages, sampling=greedy, max_tokens=40)
    assert "Tiny" in reply.text
    assert fast.token_ids == reply.token_ids
    assert fast.stats.n_accepted > 0
