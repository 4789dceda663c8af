"""Small random models of every layout, made once; the embedded model and a manifest of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgert.loading import model_path
from make_model import Request, make_model
from planned_models import outcome

LAYOUTS = ("plain", "split", "scattered", "tied", "experts", "q8_0", "f16")


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """First file of a 4-layer model in each layout; `repeating` counts through blocks of 16."""
    folder = tmp_path_factory.mktemp("random")
    requests = {
        "plain": Request("tiny", folder / "plain.gguf"),
        "split": Request("tiny", folder / "split.gguf", n_shards=3),
        "scattered": Request("tiny", folder / "scattered.gguf", scatter=True),
        "tied": Request("tiny", folder / "tied.gguf", tied=True),
        "experts": Request("tiny-moe", folder / "experts.gguf"),
        "q8_0": Request("tiny", folder / "q8_0.gguf", weight_type="Q8_0"),
        "f16": Request("tiny", folder / "f16.gguf", weight_type="F16"),
        "repeating": Request("tiny", folder / "repeating.gguf", repeat=16),
    }
    return {name: make_model(request)[0] for name, request in requests.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, so that a test may damage it."""
    return Path(shutil.copy(model_path(None), tmp_path / "chat.gguf"))


@pytest.fixture
def planned(model: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A manifest for this host; rates are assumed, which the plan says."""
    return plan_of(model, capsys)


@pytest.fixture
def planned_experts(
    random_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The same of a small mixture of experts."""
    return plan_of(Path(shutil.copy(random_models["experts"], tmp_path / "experts.gguf")), capsys)


def plan_of(model: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Plan a model and return the manifest beside it."""
    path = model.parent / "plan.json"
    code, out, _ = outcome(
        capsys, "plan", str(model), "--no-measure", "-c", "256", "--memory", "2000M",
        "--prompt-tokens", "32", "-o", str(path),
    )  # fmt: skip
    assert (code, "warning: rates" in out) == (0, True)
    return path
