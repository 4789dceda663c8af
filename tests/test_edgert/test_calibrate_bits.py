"""`edgert eval --calibrate-bits`: what is measured, kept, and then chosen by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgert.cli.calibrate_bits import LEAST_TEXT_BYTES, calibrate, policies, report
from edgert.errors import ConfigError
from edgert.experts.qualities import Measured, Qualities, read_qualities
from edgert.llama.backend import ExpertCounters, ExpertCounts
from make_model import Request, make_model
from planned_models import outcome

TEXT = "x" * LEAST_TEXT_BYTES


def counters(bits: float) -> ExpertCounters:
    return ExpertCounters(ExpertCounts(used_weights=2, used_bits=2 * bits), (), ())


def test_every_width_and_mixtures_of_two_are_measured_the_widest_first() -> None:
    found = list(policies(2, 5))
    assert found[:4] == [((5,), ()), ((4,), ()), ((3,), ()), ((2,), ())]
    assert len(set(found)) == len(found)
    assert {widths for widths, _ in found[4:]} == {(2, 4), (2, 5), (3, 5)}
    assert all(0 < cut < 1 for _, cuts in found[4:] for cut in cuts)


def test_what_was_measured_is_kept_and_only_what_is_worth_having_is_told(tmp_path: Path) -> None:
    def measure(widths: tuple[int, ...], cuts: tuple[float, ...]) -> tuple[float, ExpertCounters]:
        bits = sum(widths) / len(widths) - sum(cuts)
        return (20.0 if cuts else 10.0) + 8 - bits, counters(bits)

    found, path = calibrate(measure, (2, 4), "key", TEXT, tmp_path)
    assert read_qualities(tmp_path, "key") == found
    assert len(found.policies) == len(list(policies(2, 4)))
    # the mixtures are twice as bad as a single width of as many bits
    lines = report(found, path, as_json=False).splitlines()
    assert [line.split("--expert-bits ")[1] for line in lines[1:]] == ["2", "3", "4"]
    assert json.loads(report(found, path, as_json=True))["kept"] == str(path)


def test_policies_worth_having_are_better_than_all_of_fewer_bits() -> None:
    measured = [(8, 10.0, 8.5), (7, 10.0, 7.5), (6, 11.0, 6.5), (5, 10.5, 5.5), (4, 12.0, 4.5)]
    found = Qualities(
        model="key", text_bytes=1,
        policies=tuple(
            Measured(widths=(w,), cuts=(), perplexity=p, bits_per_weight=b) for w, p, b in measured
        ),
    )  # fmt: skip
    assert [policy.widths for policy in found.worth_having()] == [(4,), (5,), (7,)]


def test_text_that_is_too_short_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too short to calibrate on"):
        calibrate(lambda *_: pytest.fail("measured"), (2, 4), "key", TEXT[1:], tmp_path)


@pytest.mark.model
def test_command_measures_what_quality_then_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model(Request("tiny-moe", tmp_path / "source.gguf", weight_type="F16"))[0]
    path, text = tmp_path / "nested.gguf", tmp_path / "text.txt"
    assert outcome(capsys, "quantize", str(source), "--nested", "3..4", "-o", str(path))[0] == 0
    text.write_text("abc def " * (LEAST_TEXT_BYTES // 8))
    command = (
        "eval",
        str(path),
        str(text),
        "--calibrate-bits",
        "--chunks",
        "1",
        "-c",
        "64",
        "-t",
        "1",
    )
    code, printed, err = outcome(capsys, *command, "--json")
    assert code == 0, err
    found = Qualities.model_validate(
        {key: value for key, value in json.loads(printed).items() if key != "kept"}
    )
    assert [(p.widths, p.bits_per_weight) for p in found.policies] == [((4,), 4.5), ((3,), 3.5)]
    least = min(found.quality(policy) for policy in found.policies)
    few = ("-p", "0", "-n", "2", "-r", "1", "-t", "1", "-o", "json")
    code, printed, err = outcome(capsys, "bench", str(path), *few, "--quality", f"{min(1, least)}")
    assert code == 0, err
    assert json.loads(printed)[0]["expert_bits_per_weight"] == 3.5
