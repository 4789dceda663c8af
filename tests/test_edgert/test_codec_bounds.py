"""Bounds of the activation codec: searched, measured on a real model, kept and found again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.cli.calibrate_codec import Cut, Sizes, calibrate_codec, loosest_bound
from edgert.cli.eval import measure
from edgert.codec_bounds import CodecBound, bound_path, keep_bound, read_bound
from edgert.embedded import embedded_path
from edgert.errors import BackendError, ConfigError, FormatError
from edgert.events import ignore
from edgert.llama.options import LoadOptions
from edgert.llama.tapped import open_tapped
from edgert.weights.packed import model_key
from planned_models import outcome
from quant.activations.basis import Basis, Moments
from quant.activations.settings import CodecSettings
from quant.tensor_file import open_tensor_file

STORY = (
    "Once upon a time there was a little {0} named {1}. {1} loved to play with a big red {2}. "
    "One day the {2} was gone. {1} looked under the bed and in the garden. {1} was sad. "
    "Then mom came and said, look, the {2} is in the tree! {1} was very happy.\n"
)
NAMES = (
    ("dog", "Tim", "ball"),
    ("cat", "Lily", "kite"),
    ("girl", "Sue", "hat"),
    ("boy", "Ben", "car"),
)
TEXT = "".join(STORY.format(*names) for names in NAMES) * 5


def figures(basis: Basis | None = None) -> CodecBound:
    return CodecBound(
        model="ab" * 32, cut=3, bound=0.11, quality=0.995,
        basis=None if basis is None else basis.digest.hex(),
        text_bytes=5000, reference_perplexity=6.0, perplexity=6.03,
        bytes_per_token=100.0, bytes_per_batched_token=98.5, f16_bytes=512,
    )  # fmt: skip


def some_basis() -> Basis:
    moments = Moments(8)
    moments.add(np.random.default_rng(1).standard_normal((20, 8), np.float32))
    return moments.basis()


@pytest.mark.parametrize("factor", [0.3, 0.6, 5.0])
def test_the_loosest_bound_is_found_where_the_rise_goes_with_its_square(factor: float) -> None:
    bound = loosest_bound(lambda bound: factor * bound * bound, 0.005)
    assert factor * bound * bound <= 0.005
    assert factor * (1.06 * bound) ** 2 > 0.005


def test_a_bound_that_measures_worse_than_it_should_is_tightened() -> None:
    asked: list[float] = []

    def rise(bound: float) -> float:
        asked.append(bound)
        return 0.5 * bound * bound + (0.004 if bound < 0.08 or 0.09 < bound < 0.11 else 0.0)

    bound = loosest_bound(rise, 0.005)
    assert bound == asked[-1]
    assert rise(bound) <= 0.005
    assert bound < asked[4]


def test_no_rise_at_all_allows_the_loosest_bound_and_too_much_none() -> None:
    assert loosest_bound(lambda _: 0.0, 0.005) == pytest.approx(0.64)
    with pytest.raises(ConfigError, match="too much for this quality"):
        loosest_bound(lambda _: 0.1, 0.005)


def test_a_kept_bound_is_found_with_its_basis(tmp_path: Path) -> None:
    basis = some_basis()
    for one in (None, basis):
        keep_bound(tmp_path / "codecs", figures(one), one)
        found, settings = read_bound(tmp_path / "codecs", "ab" * 32, 3)
        assert found == figures(one)
        assert (found.ratio, round(found.rise, 6)) == (100 / 512, 0.005)
        assert settings.bound == 0.11
        assert (settings.basis and settings.basis.digest) == (one and one.digest)


def test_nothing_kept_says_how_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no codec was calibrated") as failure:
        read_bound(tmp_path, "ab" * 32, 2)
    assert failure.value.hint == "edgert eval MODEL TEXT --calibrate-codec --cut 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bound": 2.0}, r"\$\.bound"),
        ({"cut": 4}, "another model or cut"),
        ({"model": "cd" * 32}, "another model or cut"),
        ({"extra": 1}, r"\$\.extra"),
        ({"basis": "00" * 32}, "not the one that was measured"),
    ],
)
def test_damaged_bounds_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    basis = some_basis()
    path = keep_bound(tmp_path, figures(basis), basis)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=message):
        read_bound(tmp_path, "ab" * 32, 3)


def test_a_damaged_basis_is_refused(tmp_path: Path) -> None:
    basis = some_basis()
    keep_bound(tmp_path, figures(basis), basis)
    path = bound_path(tmp_path, "ab" * 32, 3).with_suffix(".basis")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="width 8"):
        read_bound(tmp_path, "ab" * 32, 3)


def scored(weight_memory_bytes: int | None, settings: CodecSettings | None) -> float:
    path = embedded_path("tiny-draft.gguf")
    options = LoadOptions(
        path, n_ctx=128, n_batch=128, n_logits_max=128, n_threads=1,
        weight_memory_bytes=weight_memory_bytes,
    )  # fmt: skip
    backend, tap = open_tapped(options, open_tensor_file(path), ignore)
    cut = Cut(tap, 1, 256, lambda: measure(backend, TEXT, 3, ignore).perplexity)
    try:
        return cut.score() if settings is None else cut.through(Sizes(settings).change)
    finally:
        backend.close()


@pytest.mark.model
def test_hidden_states_as_they_are_leave_the_perplexity_as_it_is() -> None:
    whole = scored(None, None)
    assert scored(None, CodecSettings("f32")) == whole
    assert scored(None, CodecSettings(bound=0.9)) > 1.02 * whole
    streamed = scored(1 << 20, None)
    assert streamed == pytest.approx(whole, rel=1e-3)
    assert scored(1 << 20, CodecSettings("f32")) == streamed


@pytest.mark.model
def test_a_cut_that_is_not_there_is_named() -> None:
    path = embedded_path("tiny-draft.gguf")
    options = LoadOptions(path, n_ctx=128, n_batch=128, n_logits_max=128, n_threads=1)
    backend, tap = open_tapped(options, open_tensor_file(path), ignore)
    cut = Cut(tap, 9, 256, lambda: measure(backend, TEXT, 1, ignore).perplexity)
    with pytest.raises(BackendError, match="no node l_out-8"):
        calibrate_codec(cut, 0.99)
    backend.close()


@pytest.mark.slow
@pytest.mark.model
def test_the_command_keeps_a_bound_that_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = embedded_path("tiny-draft.gguf"), tmp_path / "text.txt"
    text.write_text(TEXT)
    code, out, err = outcome(
        capsys, "eval", str(model), str(text), "--calibrate-codec", "-c", "128", "-t", "1",
        "--cut", "1", "--quality", "0.98", "--json", "--chunks", "9",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    key = model_key(open_tensor_file(model))
    found, settings = read_bound(Path(said["kept"]).parent, key, 1)
    assert said["bound"] == found.bound == settings.bound
    assert found.reference_perplexity / found.perplexity >= 0.98
    assert found.ratio < 0.5
    assert settings.basis is not None  # 1,024 tokens passed, four for each direction
    assert found.f16_bytes == 512


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibrate-codec"], "go together"),
        (["--cut", "1"], "go together"),
        (["--calibrate-codec", "--cut", "1", "--calibrate-bits"], "without --calibrate-bits"),
        (["--calibrate-codec", "--cut", "2"], "a model of 2 layers cannot be cut after 2"),
    ],
)
def test_cuts_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = str(embedded_path("tiny-draft.gguf"))
    code, _, err = outcome(capsys, "eval", model, str(text), *flags)
    assert code == 2
    assert message in err


def test_a_quality_without_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quality 1:"):
        calibrate_codec(Cut(None, 1, 8, lambda: 1.0), 1.0)  # type: ignore[arg-type]


def test_sizes_count_messages_of_one_token_and_of_all() -> None:
    hidden: NDArray[np.float32] = np.random.default_rng(0).standard_normal((40, 64), np.float32)
    sizes = Sizes(CodecSettings("f16"), n_alone=10)
    assert np.allclose(sizes.change(hidden), hidden, atol=1e-2)
    assert sizes.batched == [1 + 40 * 128, 40]
    assert sizes.alone == [10 * 129, 10]
