"""Plans of nested models: how many bits experts get, and that the runtime does just that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import builders_devices as build
from edgert.cli.nested_planning import ask_by_flags
from edgert.cli.options import ModelFlags
from edgert.config import directories
from edgert.deployment import placement_of
from edgert.errors import PlanError
from edgert.experts.keeper import ExpertWeights
from edgert.experts.qualities import Measured, Qualities, keep_qualities
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.loading import model_path
from edgert.weights.packed import model_key
from partition.bind import bind
from partition.goal import Goal
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import Manifest, ModelFile, ModelIdentity
from partition.manifest_file import canonical_json, read_manifest
from partition.nested_plan import NestedAsk, make_nested_plan
from partition.plan import Plan
from partition.popularity import Popularity
from partition.workload import page_bytes
from planned_models import altered, outcome, remember_figures
from quant.model_spec import read_model_spec
from quant.nested.encoder import ModelEncoder
from quant.nested.file import read_nested
from quant.nested.source import TensorReader
from quant.nested.writer import NestedRequest, write_nested
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
MB = 10**6
N_CTX = 256
WIDTHS = (2, 8)
Planner = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture inside edgert, nested."""
    out = tmp_path_factory.mktemp("nested") / "nested.gguf"
    with (
        TensorReader(open_tensor_file(model_path("tiny-moe"))) as reader,
        out.open("w+b") as stream,
    ):
        encoder = ModelEncoder(reader, WIDTHS)
        request = NestedRequest(*WIDTHS, "0" * 64)
        write_nested(stream, reader, request, encoder, lambda *_: None)
    return out


@pytest.fixture
def nested(made: Path, tmp_path: Path) -> Path:
    """A copy, so that a test may damage it."""
    return Path(shutil.copy(made, tmp_path / "nested.gguf"))


@pytest.fixture
def planned(nested: Path, capsys: pytest.CaptureFixture[str]) -> Planner:
    """Plans it with flags; rates are assumed."""

    def plan(*flags: str) -> Path:
        path = nested.parent / "plan.json"
        code, _, err = outcome(
            capsys, "plan", str(nested), "--no-measure", "-c", str(N_CTX), "--memory", "2000M",
            "--prompt-tokens", "32", "-o", str(path), "--force", *flags,
        )  # fmt: skip
        assert code == 0, err
        return path

    return plan


def greedy(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = outcome(
        capsys, "run", *arguments, "-p", "Once upon a time", "-n", "12", "--temp", "0"
    )
    assert code == 0, err
    return out


def goal(**changes: object) -> Goal:
    return Goal(**{"n_prompt": 16, "n_ctx": N_CTX, "ubatches": (32,), **changes})  # type: ignore[arg-type]


def inputs(path: Path, bits: str | None = None) -> tuple[LanguageWorkload, NestedAsk]:
    file = open_tensor_file(path)
    model = read_nested(file)
    assert model is not None
    ask = ask_by_flags(model, ModelFlags(expert_bits=bits), directories(os.environ).cache)
    return describe_language(file, read_model_spec(file)), ask


def plan_for(path: Path, limit_bytes: int, bits: str | None = None, **changes: object) -> Plan:
    workload, ask = inputs(path, bits)
    return make_nested_plan(
        workload, ask, build.of_any_type(limit_bytes, 1 << 30), goal(**changes), Popularity()
    )


def bound(plan: Plan) -> Manifest:
    file = ModelFile(path="m.gguf", size_bytes=1 << 40, sha256="0" * 64)
    model = ModelIdentity(
        format="gguf", name="m", architecture="qwen3moe", n_layer=plan.chosen.stages[0].end_layer,
        weight_bytes=1, files=(file,),
    )  # fmt: skip
    return bind(plan, model, "test")


def changed(path: Path, **experts: object) -> Path:
    """Rewrite the cache of a manifest, unchecked."""
    manifest = read_manifest(path)
    (stage,) = manifest.stages
    assert stage.tiers.experts is not None
    cache = stage.tiers.experts.model_copy(update=experts)
    tiers = stage.tiers.model_copy(update={"experts": cache})
    made = manifest.model_copy(update={"stages": (stage.model_copy(update={"tiers": tiers}),)})
    out = path.parent / "changed.json"
    out.write_bytes(canonical_json(made))
    return out


@pytest.mark.parametrize("bits", [None, "4", "4,8@0.25", "2,4,8"])
def test_manifest_runs_like_the_same_flags(
    planned: Planner, nested: Path, capsys: pytest.CaptureFixture[str], bits: str | None
) -> None:
    flags = () if bits is None else ("--expert-bits", bits)
    path = planned(*flags)
    manifest = read_manifest(path)
    assert manifest.requires == ("expert_cache", "nested_precision")
    plain = greedy(capsys, str(nested), "-c", str(N_CTX), "--memory", "2000M", *flags)
    assert greedy(capsys, "--manifest", str(path)) == plain
    code, _, err = outcome(
        capsys, "run", "--manifest", str(path), "--expert-bits", "3", "-p", "x", "-n", "1"
    )
    assert (code, "the manifest decides it" in err) == (2, True)


@pytest.mark.parametrize("bits", ["8", "3", "4,8@0.25"])
def test_runtime_holds_what_was_planned_and_no_more(made: Path, bits: str) -> None:
    seen = set()
    least = int(plan_for(made, 1 << 30, bits, minimise="memory_bytes").chosen.peak_bytes)
    with pytest.raises(PlanError):
        plan_for(made, least - (64 << 10), bits)
    for limit_bytes in (least, least + 2 * MB, least + 6 * MB, 1 << 30):
        plan = plan_for(made, limit_bytes, bits)
        (stage,) = bound(plan).stages
        (chosen,) = plan.chosen.stages
        assert chosen.peak_bytes <= limit_bytes
        experts = stage.tiers.experts
        assert experts is not None
        seen.add((stage.tiers.layout, bool(stage.tiers.streamed)))
        options = LoadOptions(
            made, n_ctx=N_CTX, n_batch=32, n_threads=1, placement=placement_of(stage),
            expert_bits=experts.bits, expert_cuts=experts.cuts,
        )  # fmt: skip
        backend = open_backend(options)
        try:
            backend.decode([*range(300, 332)], 0, 1)
            backend.decode([303], 32, 1)
            assert isinstance(backend, LlamaBackend)
            assert isinstance(backend._keeper, ExpertWeights)
            gauges, plans = backend.counters(), backend._keeper.plan
        finally:
            backend.close()
        moving_bytes = gauges.resident_weight_bytes - gauges.pinned_bytes
        assert moving_bytes == experts.cache_bytes + stage.tiers.window_bytes
        rows_bytes = N_CTX * page_bytes(4 * 1024)
        assert gauges.resident_weight_bytes <= chosen.forecast.held_bytes + rows_bytes
        # What loading and computing take beside it is counted too, in the runtime's own words.
        assert plans.peak_bytes <= max(
            chosen.forecast.held_bytes + chosen.working_bytes,
            chosen.forecast.held_bytes - chosen.cache_bytes + chosen.staging_bytes,
        )
    assert seen == {("file", True), ("repacked", False)}


def test_widest_width_is_chosen_unless_something_needs_fewer_bits(made: Path) -> None:
    plan = plan_for(made, 1 << 30)
    assert bound(plan).stages[0].tiers.experts.bits == (8,)  # type: ignore[union-attr]
    (reason,) = [reason for reason in plan.reasons if reason.what == "bits of experts"]
    assert "the widest there is" in reason.reason
    assert "7 bits would be" in reason.reason
    assert any("in 7 bits" in other.name for other in plan.others)
    # Little memory: fewer bits are fewer bytes to read.
    limit_bytes = plan_for(made, 1 << 30, minimise="memory_bytes").chosen.peak_bytes
    slow = plan_for(made, limit_bytes, "6").chosen.tpot_s
    fast = plan_for(made, limit_bytes, "5").chosen.tpot_s
    assert fast < slow
    plan = plan_for(made, limit_bytes, ceilings={"tpot_s": (fast + slow) / 2})
    assert bound(plan).stages[0].tiers.experts.bits == (5,)  # type: ignore[union-attr]
    (reason,) = [reason for reason in plan.reasons if reason.what == "bits of experts"]
    assert "the widest that satisfies the goal" in reason.reason
    assert "8 bits: tpot_s is" in reason.reason
    with pytest.raises(PlanError, match="tpot_s is"):
        plan_for(made, limit_bytes, ceilings={"tpot_s": fast / 1000})
    with pytest.raises(PlanError, match="tpot_s is"):
        plan_for(made, limit_bytes, "6", ceilings={"tpot_s": (fast + slow) / 2})


def test_more_bits_are_more_bytes_to_read(made: Path) -> None:
    least = plan_for(made, 1 << 30, "4,8@0.25", minimise="memory_bytes")
    limit_bytes = least.chosen.peak_bytes
    reads = [
        plan_for(made, limit_bytes, bits).chosen.stages[0].forecast.read_bytes
        for bits in ("2", "4", "4,8@0.25", "8")
    ]
    assert reads == sorted(reads)
    assert len(set(reads)) == len(reads)


def test_quality_plans_the_widths_that_were_measured(
    planned: Planner, nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [((8,), (), 10.0, 8.5), ((4, 8), (0.4,), 10.05, 6.5), ((4,), (), 10.5, 4.5)]
    policies = tuple(
        Measured(widths=w, cuts=c, perplexity=p, bits_per_weight=b) for w, c, p, b in measured
    )
    key = model_key(open_tensor_file(nested))
    cache = directories(os.environ).cache
    keep_qualities(cache / "experts", Qualities(model=key, text_bytes=9, policies=policies))
    manifest = read_manifest(planned("--quality", "0.99"))
    experts = manifest.stages[0].tiers.experts
    assert experts is not None
    assert (experts.bits, experts.cuts) == ((4, 8), (0.4,))
    said = {item.what: item for item in manifest.decisions}
    assert "--quality 0.99" in said["bits of experts"].reason
    assert "quality 0.995 as measured" in said["bits of experts"].reason
    # 6.5 of 4.5 and 8.5 bits, scales included: half and half
    assert said["share of each width"].choice == "8 bits 50 %, 4 bits 50 %"
    assert not any("each width is assumed" in warning for warning in manifest.warnings)
    manifest = read_manifest(planned("--expert-bits", "3,8@0.25"))
    assert any("each width is assumed" in warning for warning in manifest.warnings)
    code, _, err = outcome(capsys, "plan", str(nested), "--no-measure", "--quality", "1.0",
                           "--expert-bits", "4")  # fmt: skip
    assert (code, "both choose widths" in err) == (2, True)


def test_a_most_time_per_token_chooses_among_the_thresholds_that_were_measured(made: Path) -> None:
    measured = [
        ((8,), (), 10.0, 8.5), ((4, 8), (0.4,), 10.05, 6.5), ((3, 8), (0.4,), 10.6, 6.0),
        ((7,), (), 10.1, 7.5), ((4,), (), 10.5, 4.5),
    ]  # fmt: skip
    policies = tuple(
        Measured(widths=w, cuts=c, perplexity=p, bits_per_weight=b) for w, c, p, b in measured
    )
    key = model_key(open_tensor_file(made))
    cache = directories(os.environ).cache
    keep_qualities(cache / "experts", Qualities(model=key, text_bytes=9, policies=policies))
    least = plan_for(made, 1 << 30, "4,8@0.4", minimise="memory_bytes").chosen.peak_bytes
    limit_bytes = least + 6 * MB  # with less, slots for both widths cost more than they bring
    assert [rule.words for rule in inputs(made)[1].rules] == ["8", "4,8@0.4", "7", "4"]
    narrow, mixed, wide = (
        plan_for(made, limit_bytes, bits).chosen.tpot_s for bits in ("4", "4,8@0.4", "8")
    )
    assert narrow < mixed < wide
    for most, widths, cuts in (
        (2 * wide, (8,), ()), ((mixed + wide) / 2, (4, 8), (0.4,)), ((narrow + mixed) / 2, (4,), ())
    ):  # fmt: skip
        plan = plan_for(made, limit_bytes, ceilings={"tpot_s": most})
        experts = bound(plan).stages[0].tiers.experts
        assert experts is not None
        assert (experts.bits, experts.cuts) == (widths, cuts)
        (reason,) = [reason for reason in plan.reasons if reason.what == "bits of experts"]
        assert ("best measured quality that satisfies the goal" in reason.reason) is (most < wide)


def test_replan_keeps_the_widths(
    planned: Planner, nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered(planned("--expert-bits", "3,5@0.25"), fingerprint="0123456789abcdef")
    remember_figures(nested)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "--replan", "-p", "x", "-n", "1")
    assert code == 0, err
    experts = read_manifest(path).stages[0].tiers.experts
    assert experts is not None
    assert (experts.bits, experts.cuts) == ((3, 5), (0.25,))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": (9,)}, "experts.bits"),
        ({"bits": (1,)}, "experts.bits"),
        ({"bits": ()}, "experts.bits"),
        ({"bits": (8, 4), "cuts": (0.5,)}, "experts.bits"),
        ({"bits": (4, 8)}, "experts.cuts"),
        ({"cuts": (0.5,)}, "experts.cuts"),
        ({"bits": (2, 4, 8), "cuts": (0.5, 0.2)}, "experts.cuts"),
    ],
)
def test_widths_that_cannot_be_are_refused(
    planned: Planner,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    says: str,
) -> None:
    path = changed(planned(), **changes)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, f"$.stages[0].tiers.{says}" in err) == (3, True), err


def test_cache_that_is_too_small_is_refused(
    planned: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(planned(), cache_bytes=4096)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "one token's experts need" in err) == (4, True), err


def test_manifest_that_hides_the_ability_is_refused(
    planned: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered(planned(), requires=("expert_cache",))
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "nested_precision" in err) == (3, True), err


def test_other_planes_are_refused(
    planned: Planner, nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planned("--expert-bits", "4")
    model = read_nested(open_tensor_file(nested))
    assert model is not None
    entry = next(iter(model.tensors.values())).entry
    content = bytearray(nested.read_bytes())
    content[entry.offset_bytes + 4096] ^= 1
    nested.write_bytes(content)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "sha256" in err) == (3, True), err


def test_nested_expert_that_is_not_cached_is_refused(
    planned: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    path = planned()
    manifest = read_manifest(path)
    (stage,) = manifest.stages
    first, *others = stage.tiers.cached
    tiers = stage.tiers.model_copy(
        update={"cached": tuple(others), "pinned": (*stage.tiers.pinned, first)}
    )
    path = altered(path, stages=(stage.model_copy(update={"tiers": tiers}),))
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, f"{first} is nested and not cached" in err) == (4, True), err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--expert-bits", "9"), "the file has 2 to 8"),
        (("--expert-bits", "4,8@2"), "cuts"),
        (("--quality", "0.9"), "no qualities were measured"),
        (("--pareto",), "does not compare widths"),
    ],
)
def test_flags_that_no_plan_can_follow_are_refused(
    nested: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    code, _, err = outcome(capsys, "plan", str(nested), "--no-measure", "-c", "256", *flags)
    assert (code, says in err) == (2, True), err


def test_widths_of_a_plain_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "plan", "tiny-moe", "--no-measure", "--expert-bits", "4")
    assert (code, "this model has none" in err) == (2, True), err


def test_first_use_of_an_expert_may_be_read_also_where_everything_fits(made: Path) -> None:
    plan = plan_for(made, 1 << 30, "4")
    read = bound(plan).predicted.bytes_read_per_token
    wanted_bytes = plan.chosen.stages[0].forecast.wanted_bytes
    model = read_nested(open_tensor_file(made))
    assert model is not None
    # Four of sixteen experts in four bits, of every stack; classes of experts are rounded.
    prefixes = (t.n_expert * t.layout.prefix_bytes(4) for t in model.tensors.values())
    assert wanted_bytes == pytest.approx(sum(prefixes) / 4, rel=0.01)
    assert (read.low, read.value) == (0.0, 0.0)
    assert read.high == pytest.approx(wanted_bytes / 10)
