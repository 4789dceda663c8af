"""One cut between edge and cloud: exact, within both memories, and said why."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from builders_plan import BOARD, MB, PI, alone, identity, limited, workload
from devices.catalog import known_host, usual_link
from devices.profile import HostProfile
from devices.topology import LinkProfile, Topology
from edgert.errors import CapacityError, ConfigError, PlanError
from partition.bind import bind
from partition.build_problem import build_problem
from partition.candidates import Split
from partition.cost import Missing, unit_seconds
from partition.goal import ALL_ABILITIES, Goal, Stay
from partition.manifest import ModelFile
from partition.manifest_file import canonical_json, parse_manifest, violations
from partition.popularity import Popularity
from partition.problem import Placement, Score, StageChoice
from partition.settings import Prepared, prepare
from partition.split_link import SplitCodecs, hidden_bytes
from partition.split_plan import SplitAsk, SplitPlan, make_split_plan
from partition.split_stages import SplitFile, weight_bits
from partition.stage_plan import StagePlan, plan_stage
from quant.activations.codec import encode
from quant.activations.settings import CodecSettings

NO_SCORE = Score(0, 0, 0, 0, 0)
BITS = {"Q4_0": 4.5, "Q8_0": 8.5, "F16": 16.0}
GOAL = Goal(
    n_prompt=64, n_ctx=512, ubatches=(64, 32), abilities=ALL_ABILITIES,
    may_leave=("hidden_states",),
)  # fmt: skip


def file(shape: str, kind: str) -> SplitFile:
    return SplitFile(f"{kind}.gguf", workload(shape, kind))


def pair(
    one: HostProfile, other: HostProfile, bytes_per_s: float = 1e8, round_trip_s: float = 1e-3
) -> Topology:
    def link(source: HostProfile, target: HostProfile) -> LinkProfile:
        made = usual_link("ethernet_1g", source.host_id, target.host_id)
        rate = made.bytes_per_s.model_copy(update={"value": bytes_per_s})
        trip = made.round_trip_s.model_copy(update={"value": round_trip_s})
        return made.model_copy(update={"bytes_per_s": rate, "round_trip_s": trip})

    return Topology(
        home=one.host_id, hosts=(one, other), links=(link(one, other), link(other, one))
    )


def asked(
    shape: str, fronts: str, backs: str, codecs: SplitCodecs | None = None, *contexts: int
) -> SplitAsk:
    files = [tuple(file(shape, kind) for kind in kinds.split()) for kinds in (fronts, backs)]
    return SplitAsk(files[0], files[1], codecs or SplitCodecs(), contexts)


def cut(plan: SplitPlan) -> int:
    return plan.plan.chosen.stages[0].end_layer


def codec(plan: SplitPlan) -> str:
    assert plan.plan.chosen.split is not None
    return plan.plan.chosen.split.codec


def stage_of(
    of: SplitFile, option: Prepared, topology: Topology, goal: Goal, layers: tuple[int, int, bool]
) -> StagePlan | None:
    """Hold layers as a stage beside another one, which is on the other host."""
    at, n_layers, front = layers
    built = build_problem(option.chain, topology, goal, option.overheads)
    home = next(i for i, place in enumerate(built.places) if place.at_home)
    choices = (
        StageChoice(home, 0, at, float("inf")), StageChoice(1 - home, at, n_layers, float("inf"))
    )  # fmt: skip
    choice = choices[0] if front else choices[1]
    try:
        stage = plan_stage(of.workload, option, built, (choice, Placement(choices, NO_SCORE)), None)
    except CapacityError:
        return None
    host = stage.place.host
    return stage if stage.peak_bytes <= host.pools[0].available_bytes else None


def brute_force(ask: SplitAsk, topology: Topology, goal: Goal) -> tuple[object, ...] | None:
    """Try everything, one stage at a time; return what is chosen, in words."""
    n_layers = len(ask.fronts[0].workload.run_layers)
    there, back = topology.links
    ways = []
    for front, rear in product(ask.fronts, ask.backs):
        counted = [prepare(f.workload, topology, goal, Popularity()) for f in (front, rear)]
        for one, other in zip(*counted, strict=True):
            for at, split in product(range(1, n_layers), ask.codecs.at("", 0)):
                stages = [
                    stage_of(front, one, topology, goal, (at, n_layers, True)),
                    stage_of(rear, other, topology, goal, (at, n_layers, False)),
                ]
                known = [stage for stage in stages if stage is not None]
                if len(known) < 2:
                    continue
                size = hidden_bytes(split, front.workload.spec.n_embd)
                hops = [link.round_trip_s.value / 2 for link in (there, back)]
                slow = [size / link.bytes_per_s.value for link in (there, back)]
                tpot_s = sum(s.forecast.decode.steady_s for s in known) + sum(hops) + sum(slow)
                ttft_s = sum(s.forecast.prefill_s for s in known) + sum(hops)
                ttft_s += goal.n_prompt * sum(slow)
                if tpot_s > goal.ceilings.get("tpot_s", 1e9):
                    continue
                if ttft_s > goal.ceilings.get("ttft_s", 1e9):
                    continue
                loss = ("f32", "f16", "adaptive").index(split.codec)
                key = (-round(weight_bits(known), 6), loss, ttft_s, tpot_s)
                what = (front.name, rear.name, at, split.codec, one.setting.n_ubatch)
                ways.append((tpot_s, key, what))
    if not ways:
        return None
    least = min(tpot_s for tpot_s, _, _ in ways)
    return min((key, what) for tpot_s, key, what in ways if tpot_s <= least * 1.02)[1]


@pytest.mark.parametrize("seed", range(12))
def test_choice_is_that_of_trying_everything(seed: int) -> None:
    rng = random.Random(seed)
    shape, sizes_mb = rng.choice(
        [
            ("tiny", ((152, 210), (134, 145))),
            ("tiny-moe", ((152, 210), (134, 150))),
            ("thin", ((240, 500), (215, 420))),
        ]
    )
    kinds = ["Q4_0", "Q8_0", "F16"]
    ask = asked(
        shape, " ".join(rng.sample(kinds, rng.randint(1, 2))), " ".join(rng.sample(kinds, 2)),
        SplitCodecs(("f32", "f16", "adaptive")),
    )  # fmt: skip
    home, cloud = (
        limited(name, rng.randint(*sizes) * MB)
        for name, sizes in zip((PI, BOARD), sizes_mb, strict=True)
    )
    topology = pair(home, cloud, 10 ** rng.uniform(4, 8), 10 ** rng.uniform(-4, -2))
    goal = replace(GOAL, abilities=ALL_ABILITIES - {"expert_cache", "accelerator"})
    if rng.random() < 0.5:
        goal = replace(goal, ceilings={"tpot_s": 10 ** rng.uniform(-2, -0.5)})
    if rng.random() < 0.3:
        goal = replace(goal, ceilings={**goal.ceilings, "ttft_s": 10 ** rng.uniform(-1, 0)})
    wanted = brute_force(ask, topology, goal)
    try:
        made = make_split_plan(ask, topology, goal)
    except PlanError:
        assert wanted is None
        return
    chosen = made.plan.chosen
    assert wanted == (
        made.front.name, made.back.name, cut(made), codec(made), chosen.setting.n_ubatch
    )  # fmt: skip


def test_token_takes_the_rooflines_of_both_files_and_the_way_there_and_back() -> None:
    topology = pair(known_host(PI), known_host(BOARD), 1e6, 0.02)
    made = make_split_plan(asked("tiny", "Q4_0", "F16"), topology, GOAL)
    wanted = 0.02 + 2 * 4 * 256 / 1e6
    prompt = 0.02 + 64 * 2 * 4 * 256 / 1e6
    for stage, of in zip(made.plan.chosen.stages, (made.front, made.back), strict=True):
        counted = prepare(of.workload, topology, GOAL, Popularity())
        option = next(o for o in counted if o.setting == made.plan.chosen.setting)
        for unit in option.chain.units[stage.first_layer : stage.end_layer]:
            seconds = unit_seconds(unit, stage.place.device, "repacked")
            assert not isinstance(seconds, Missing)
            wanted, prompt = wanted + seconds[0], prompt + seconds[1]
    assert made.plan.chosen.tpot_s == pytest.approx(wanted, rel=1e-9)
    assert made.plan.chosen.ttft_s == pytest.approx(prompt, rel=1e-9)
    assert made.plan.chosen.sent_bytes == 2 * 4 * 256


@pytest.mark.parametrize("limits_mb", [(1000, 3500), (1500, 3000), (2000, 2600), (3000, 1500)])
def test_neither_host_takes_more_than_it_has(limits_mb: tuple[int, int]) -> None:
    hosts = [limited(name, mb * MB) for name, mb in zip((PI, BOARD), limits_mb, strict=True)]
    made = make_split_plan(asked("7b", "Q4_0", "Q4_0 Q8_0"), pair(hosts[0], hosts[1]), GOAL)
    for stage, limit_mb in zip(made.plan.chosen.stages, limits_mb, strict=True):
        assert stage.peak_bytes <= limit_mb * MB
    front, back = made.plan.chosen.stages
    assert (front.first_layer, back.end_layer, front.end_layer) == (0, 32, back.first_layer)
    assert (front.head, back.head) == (True, False)


def test_more_precision_comes_first_among_what_takes_as_long() -> None:
    topology = pair(known_host(PI), known_host(BOARD), 1e6, 1.0)  # the way is nearly everything
    made = make_split_plan(asked("tiny", "Q4_0 Q8_0", "Q8_0 F16 Q4_0"), topology, GOAL)
    assert (made.front.name, made.back.name, cut(made)) == ("Q8_0.gguf", "F16.gguf", 1)
    only = make_split_plan(asked("tiny", "Q4_0", "Q4_0"), topology, GOAL)
    assert only.plan.chosen.tpot_s == pytest.approx(made.plan.chosen.tpot_s, rel=0.02)


def test_ceiling_takes_the_precision_that_meets_it() -> None:
    topology = pair(known_host(PI), known_host(BOARD))
    ask = asked("7b", "Q8_0", "Q8_0")
    slow = make_split_plan(ask, topology, GOAL).plan.chosen.tpot_s
    tight = replace(GOAL, ceilings={"tpot_s": 0.9 * slow})
    with pytest.raises(PlanError, match=r"tpot_s is .*, at most"):
        make_split_plan(ask, topology, tight)
    made = make_split_plan(asked("7b", "Q8_0", "Q8_0 Q4_0"), topology, tight)
    assert made.back.name == "Q4_0.gguf"
    assert made.plan.chosen.tpot_s <= 0.9 * slow
    assert len(made.plan.rejected) < 10
    assert made.plan.rejected[-1].option.endswith("more ways")


def test_slow_links_take_the_codec_that_is_allowed_and_fast_ones_none() -> None:
    codecs = SplitCodecs(("f32", "f16", "adaptive"), 0.05, {("Q4_0.gguf", 1): 0.2})
    ask = asked("tiny", "Q4_0", "Q4_0", codecs)
    hosts = known_host(PI), known_host(BOARD)
    assert codec(make_split_plan(ask, pair(*hosts, 1e9), GOAL)) == "f32"
    slow = make_split_plan(ask, pair(*hosts, 1e4), GOAL)
    assert (codec(slow), cut(slow)) == ("adaptive", 1)
    assert slow.plan.chosen.split == Split("adaptive", 0.2)
    assert any("lossy" in warning for warning in slow.plan.warnings)
    kept = make_split_plan(asked("tiny", "Q4_0", "Q4_0"), pair(*hosts, 1e4), GOAL)
    assert codec(kept) == "f32"


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3, 0.5, 1.0])
def test_bytes_of_a_coded_state_are_those_of_normal_values(bound: float) -> None:
    states = np.random.default_rng(3).standard_normal((1, 4096)).astype(np.float32)
    n_bytes = len(encode(states, CodecSettings(bound=bound)))
    assert hidden_bytes(Split("adaptive", bound), 4096) == pytest.approx(n_bytes, rel=0.08)
    for kind in ("f32", "f16"):
        exact = len(encode(states, CodecSettings(kind=kind))) - 1
        assert hidden_bytes(Split(kind), 4096) == exact


def test_longest_context_that_fits_is_taken() -> None:
    topology = pair(limited(PI, 900 * MB), limited(BOARD, 5500 * MB))
    long = make_split_plan(asked("7b", "Q4_0", "Q4_0", None, 2048, 512), topology, GOAL)
    assert long.plan.goal.n_ctx == 2048
    topology = pair(limited(PI, 900 * MB), limited(BOARD, 3900 * MB))
    no_flash = topology.model_copy(
        update={"hosts": tuple(h.model_copy(update={"flash": None}) for h in topology.hosts)}
    )
    short = make_split_plan(asked("7b", "Q4_0", "Q4_0", None, 4096, 512), no_flash, GOAL)
    assert short.plan.goal.n_ctx == 512
    assert any(reason.what == "context" for reason in short.plan.reasons)


def test_manifest_names_both_files_and_the_way_between_them() -> None:
    topology = pair(known_host(PI), known_host(BOARD), 1e5)
    ask = asked("tiny", "Q4_0", "F16", SplitCodecs(("adaptive",)))
    made = make_split_plan(ask, topology, GOAL)
    back = identity(made.back.workload).model_copy(
        update={"files": (ModelFile(path="f16.gguf", size_bytes=1 << 30, sha256="1" * 64),)}
    )
    front = identity(made.front.workload)
    manifest = bind(made.plan, front, "0", variants={made.back.name: back})
    assert violations(manifest) == ()
    assert parse_manifest(canonical_json(manifest), "m.json") == manifest
    assert [stage.variant for stage in manifest.stages] == [None, 0]
    assert manifest.model_of(manifest.stages[1]) == back
    assert set(manifest.stages[1].precision) == {"f16", "f32"}
    ways = [(t.kind, t.codec, t.bound) for t in manifest.transport]
    assert ways == [("service", "adaptive", 0.1)] * 2
    assert manifest.requires == ("edge_cloud", "pipeline", "resident")
    assert manifest.policies.may_leave == ("hidden_states",)


def test_same_file_on_both_sides_has_no_variant() -> None:
    topology = pair(known_host(PI), known_host(BOARD))
    made = make_split_plan(asked("tiny", "Q4_0", "Q4_0"), topology, GOAL)
    manifest = bind(made.plan, identity(made.front.workload), "0")
    assert (manifest.variants, violations(manifest)) == ((), ())


def test_decisions_say_cut_precisions_codec_and_what_else_there_was() -> None:
    topology = pair(limited(PI, 1500 * MB), known_host(BOARD))
    codecs = SplitCodecs(("f32", "f16"))
    made = make_split_plan(asked("7b", "Q4_0", "Q4_0 Q8_0", codecs), topology, GOAL)
    said = {reason.what: reason for reason in made.plan.reasons}
    assert said["where the model is cut"].choice == "after 1 of 32 layers"
    assert "one more: 2" in said["where the model is cut"].reason
    assert said["precision at home"].choice == "Q4_0.gguf, 4.5 bits a weight"
    assert "Q8_0.gguf: 3" in said[f"precision on {BOARD}"].reason
    assert "f16: 2" in said["hidden states between hosts"].reason
    names = [way.name for way in made.plan.others]
    assert len(names) == len(set(names)) > 2
    assert made.plan.chosen.name not in names


def test_layers_that_must_stay_move_the_cut() -> None:
    topology = pair(known_host(PI), known_host(BOARD))
    goal = replace(GOAL, stays=(Stay(0, 20, topology.home),))
    made = make_split_plan(asked("7b", "Q4_0", "Q4_0"), topology, goal)
    assert cut(made) == 20
    text = next(r.reason for r in made.plan.reasons if r.what == "where the model is cut")
    assert "one layer fewer at home: layers 19..32 may not all be on" in text


def test_least_memory_streams_both_sides() -> None:
    topology = pair(known_host(PI), known_host(BOARD))
    ask = asked("7b", "Q4_0", "Q4_0 Q8_0")
    fast = make_split_plan(ask, topology, GOAL).plan.chosen
    lean = make_split_plan(ask, topology, replace(GOAL, minimise="memory_bytes")).plan.chosen
    assert lean.peak_bytes < fast.peak_bytes / 2
    assert all(stage.tiers.streamed for stage in lean.stages)


def test_what_cannot_be_cut_is_refused_with_its_reason() -> None:
    home, cloud = known_host(PI), known_host(BOARD)
    ask = asked("tiny", "Q4_0", "Q4_0")
    with pytest.raises(ConfigError, match="is the only one") as caught:
        make_split_plan(ask, alone(home), GOAL)
    assert caught.value.hint is not None
    with pytest.raises(PlanError, match="hidden states may not leave home"):
        make_split_plan(ask, pair(home, cloud), replace(GOAL, may_leave=()))
    with pytest.raises(PlanError, match="unreachable: no link"):
        make_split_plan(ask, Topology(home=home.host_id, hosts=(home, cloud)), GOAL)
    with pytest.raises(PlanError, match=r"Q4_0\.gguf at home"):
        make_split_plan(ask, pair(limited(PI, 20 * MB), cloud), GOAL)
    small = [limited(name, mb * MB).model_copy(update={"flash": None})
             for name, mb in ((PI, 1200), (BOARD, 1200))]  # fmt: skip
    with pytest.raises(PlanError, match=r"home holds layers 0\.\.\d+ at most, another host"):
        make_split_plan(asked("7b", "Q4_0", "Q4_0"), pair(small[0], small[1]), GOAL)
