"""Small random models of every layout that the weights have to cope with, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from make_model import Request, make_model

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
