"""Every layer shared between hosts: what it costs, when it is chosen, and its manifest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, PI, identity, limited, workload
from builders_tensor import GOAL, boards, refused, shared, star
from devices.catalog import known_host
from partition.bind import bind
from partition.candidates import Candidate
from partition.goal import ALL_ABILITIES, Goal, Stay
from partition.manifest import TensorShare
from partition.manifest_file import canonical_json, parse_manifest
from partition.plan import make_plan
from partition.popularity import Popularity
from partition.tensor_candidates import OPTION, tensor_candidates
from partition.tensor_split import Part, share_groups, split_workload, why_not_split
from partition.tensor_star import Exchanges
from partition.timeline import plan_timeline

WITH_LOGITS = replace(GOAL, may_leave=("hidden_states", "logits"))


def n_groups(candidate: Candidate) -> list[int]:
    shares = [stage.share for stage in candidate.stages]
    return [share.end_group - share.first_group for share in shares if share is not None]


def share(first: int, end: int, of: int) -> TensorShare:
    return TensorShare(first_group=first, end_group=end, n_groups=of)


def test_exchanges_of_a_small_star_by_hand() -> None:
    topology = boards(3)
    link = topology.links[0]
    trip_s, rate = link.round_trip_s.value, link.bytes_per_s.value
    # 10 layers: 20 sums and half an exchange to hand out embeddings. Each waits for one round trip
    # and moves 4,000 bytes of each of two hosts through home's link, there and back; hosts
    # themselves take 150 us of each.
    exchanges = Exchanges(n_layers=10, token_bytes=4000, n_prompt=64, n_sweeps=2)
    decode_s, prefill_s = exchanges.seconds(topology, ["board1", "board2"])
    assert decode_s == pytest.approx(20.5 * (150e-6 + trip_s + 2 * 2 * 4000 / rate))
    # Two micro-batches of 32 tokens.
    assert prefill_s == pytest.approx(20.5 * 2 * (150e-6 + trip_s + 2 * 2 * 32 * 4000 / rate))
    assert exchanges.sent_bytes(2) == 20.5 * 2 * 2 * 4000


def test_drafted_tokens_are_exchanged_too() -> None:
    topology = boards(3)
    link = topology.links[0]
    trip_s, rate = link.round_trip_s.value, link.bytes_per_s.value
    drafting = Exchanges(n_layers=10, token_bytes=4000, n_prompt=64, n_sweeps=2, n_decoded=17)
    decode_s, _ = drafting.seconds(topology, ["board1", "board2"])
    # One round trip for all 17 tokens of a pass, the sums of each of them.
    own_s = drafting.own_s[0]
    assert decode_s == pytest.approx(20.5 * (trip_s + 2 * 2 * 17 * 4000 / rate) + own_s)
    assert drafting.transfer_s(topology, "board1")[0] == pytest.approx(20.5 * 2 * 17 * 4000 / rate)
    assert drafting.sent_bytes(2) == 20.5 * 2 * 2 * 17 * 4000
    alone, several = (
        shared("1b", boards(2), replace(GOAL, n_drafted=n, tokens_per_pass=1.0)) for n in (0, 16)
    )
    assert several.sent_bytes == 17 * alone.sent_bytes
    assert several.hops_decode_s > alone.hops_decode_s
    assert several.hops_prefill_s == alone.hops_prefill_s


def test_latency_and_transfers_of_the_search_add_up_to_the_star() -> None:
    topology = boards(4)
    exchanges = Exchanges(n_layers=22, token_bytes=8192, n_prompt=64, n_sweeps=2, n_decoded=5)
    others = ["board1", "board2", "board3"]
    for phase, seconds in enumerate(exchanges.seconds(topology, others)):
        latency_s = max(exchanges.latency_s(topology, host)[phase] for host in others)
        transfer_s = max(exchanges.transfer_s(topology, host)[phase] for host in others)
        own_s = exchanges.own_s[phase]
        assert latency_s + len(others) * transfer_s + own_s == pytest.approx(seconds)


def test_two_hosts_send_at_once_what_is_small() -> None:
    topology = boards(2)
    exchanges = Exchanges(n_layers=22, token_bytes=8192, n_prompt=64, n_sweeps=2)
    assert exchanges.pair_factors == (0.5, 1.0)  # a prompt's sums are 256 KiB
    for phase, seconds in enumerate(exchanges.seconds(topology, ["board1"])):
        star_s = exchanges.latency_s(topology, "board1")[phase]
        star_s += exchanges.transfer_s(topology, "board1")[phase]
        wanted = exchanges.pair_factors[phase] * star_s + exchanges.own_s[phase]
        assert seconds == pytest.approx(wanted)


def test_token_takes_the_slowest_share_the_output_and_the_exchanges() -> None:
    found = shared("1b", boards(2))
    home_s, other_s = (stage.forecast.decode.steady_s for stage in found.stages)
    assert home_s == pytest.approx(other_s + found.head_decode_s, rel=1e-6)
    assert found.tpot_s == pytest.approx(home_s + found.hops_decode_s, rel=1e-6)
    assert found.peak_bytes == sum(stage.peak_bytes for stage in found.stages)


@pytest.mark.parametrize("n_hosts", [2, 4])
def test_equal_hosts_get_equal_shares_home_first(n_hosts: int) -> None:
    found = shared("7b", boards(n_hosts))
    assert n_groups(found) == [32 // n_hosts] * n_hosts
    assert found.stages[0].place.host.host_id == "board0"
    assert [stage.head for stage in found.stages] == [True] + [False] * (n_hosts - 1)


def test_faster_host_gets_more() -> None:
    slow, fast = n_groups(shared("7b", star([known_host(PI), known_host(BOARD)])))
    assert fast > slow


def test_hosts_are_used_only_as_long_as_they_help() -> None:
    four = [known_host(BOARD, f"board{index}") for index in range(4)]
    assert len(shared("7b", star(four)).stages) == 4
    # Exchanges with any second host take longer than computing; home and one other are the least.
    assert len(shared("1b", star(four, "cellular")).stages) == 2


def test_only_processors_repack_their_share() -> None:
    hosts = [known_host("cloud-h100-80gb", name) for name in ("a", "b")]
    for stage in shared("1b", star(hosts)).stages:
        layout = "repacked" if stage.place.device.kind == "cpu" else "file"
        assert (stage.place.device.kind, stage.tiers.layout) == ("gpu", layout)
        assert stage.place.at_home == (stage.place.host.host_id == "a")


def test_shares_hold_every_weight_of_the_layers_once_and_norms_everywhere() -> None:
    model = workload("7b")
    cuts = [(0, 5), (5, 18), (18, 32)]
    parts = [
        split_workload(model, Part(share(*cut, 32), entrance=False, head="rows")) for cut in cuts
    ]
    for index, layer in enumerate((*model.run_layers, model.head)):
        for place, tensor in enumerate(layer.tensors):
            sizes = [(*part.run_layers, part.head)[index].tensors[place] for part in parts]
            whole = tensor.size_bytes if len(tensor.shape) > 1 else len(cuts) * tensor.size_bytes
            assert sum(thin.size_bytes for thin in sizes) == whole
    kept = [part.kept_bytes(512) for part in parts]
    assert sum(kept) == model.kept_bytes(512)


def test_groups_are_joined_until_blocks_end_where_heads_do() -> None:
    model = workload("7b")
    assert share_groups(model) == 32
    wide = [
        replace(
            layer,
            tensors=tuple(
                replace(tensor, type_name="q4_K") if "attn_output" in tensor.name else tensor
                for tensor in layer.tensors
            ),
        )
        for layer in model.layers
    ]
    # A block of 256 weights reaches over two heads of 128.
    assert share_groups(replace(model, layers=tuple(wide))) == 16


@pytest.mark.parametrize("limit_mb", [700, 1200, 2000, 4000])
def test_no_host_takes_more_memory_than_it_has(limit_mb: int) -> None:
    hosts = [limited(BOARD, limit_mb * MB, f"board{index}") for index in range(3)]
    for goal in (GOAL, WITH_LOGITS):
        for stage in shared("7b", star(hosts), goal).stages:
            assert stage.peak_bytes <= limit_mb * MB


def test_hosts_that_are_short_of_memory_stream_their_own_share() -> None:
    hosts = [limited(BOARD, 1200 * MB, f"board{index}") for index in range(2)]
    found = shared("7b", star(hosts))
    assert all(stage.tiers.streamed for stage in found.stages)
    alone = make_plan(workload("7b"), star(hosts[:1]), GOAL).chosen
    read = [stage.forecast.read_bytes for stage in found.stages]
    assert sum(read) < alone.stages[0].forecast.read_bytes


def test_vocabulary_is_shared_where_logits_may_leave_and_it_pays() -> None:
    at_home, shards = shared("1b", boards(2)), shared("1b", boards(2), WITH_LOGITS)
    assert [stage.head for stage in shards.stages] == [True, True]
    assert shards.tpot_s < at_home.tpot_s
    chosen = make_plan(workload("1b"), boards(2), WITH_LOGITS)
    manifest = bind(chosen, identity(workload("1b")), "test")
    assert {"tensor_parallel", "vocabulary_shards"} <= set(manifest.requires)


def test_plan_says_what_both_ways_would_take() -> None:
    near = make_plan(workload("7b"), boards(2), GOAL)
    far = make_plan(workload("7b"), star(boards(2).hosts, "internet"), GOAL)
    for plan, choice in ((near, "tensor parallel"), (far, "layers one after another")):
        (reason,) = (item for item in plan.reasons if item.what == "how hosts share the work")
        assert reason.choice == choice
        assert "sharing every layer:" in reason.reason
        assert "one after another on" in reason.reason
    assert near.chosen.parallel
    assert not far.chosen.parallel


@pytest.mark.parametrize("goal", [GOAL, WITH_LOGITS], ids=["head at home", "head by rows"])
def test_manifest_of_shares_is_read_back_unchanged_and_equal_each_time(goal: Goal) -> None:
    texts = []
    for _ in range(2):
        plan = make_plan(workload("7b"), boards(3), goal)
        texts.append(canonical_json(bind(plan, identity(workload("7b")), "test")))
    manifest = parse_manifest(texts[0], "test")
    assert canonical_json(manifest) == texts[0] == texts[1]
    assert "tensor_parallel" in manifest.requires
    assert "pipeline" not in manifest.requires
    assert [stage.embedding for stage in manifest.stages] == [True, False, False]
    ways = {(item.source_stage, item.target_stage) for item in manifest.transport}
    assert ways == {("s1", "s0"), ("s0", "s1"), ("s2", "s0"), ("s0", "s2")}


def test_shared_stages_of_a_timeline_begin_together() -> None:
    candidate = shared("1b", boards(2))
    spans = [span for span in plan_timeline(candidate).spans if span.name == "prefill"]
    assert len({span.start_s for span in spans}) == 1


def test_experts_are_not_split_and_the_plan_says_so() -> None:
    assert "experts are not split" in refused(workload("moe"), boards(2))
    plan = make_plan(workload("moe"), boards(2), GOAL)
    assert any(item.option == OPTION for item in plan.rejected)


def test_nothing_is_shared_that_must_stay() -> None:
    model = workload("1b")
    assert "may not leave" in refused(model, boards(2), replace(GOAL, may_leave=()))
    stays = (Stay(0, 1, "board0"),)
    assert "must stay" in refused(model, boards(2), replace(GOAL, stays=stays))
    unlinked = boards(2).model_copy(update={"links": ()})
    assert "unreachable" in refused(model, unlinked)
    today = replace(GOAL, abilities=ALL_ABILITIES - {"tensor_parallel"})
    assert tensor_candidates(model, boards(2), today, Popularity()) == ((), ())


def test_weights_without_a_known_split_are_named() -> None:
    model = workload("1b")
    first = model.layers[0]
    odd = replace(first.tensors[1], name="blk.0.attn_kv_b.weight", shape=(64, 64))
    layers = (replace(first, tensors=(*first.tensors, odd)), *model.layers[1:])
    assert (
        why_not_split(replace(model, layers=layers)) == "blk.0.attn_kv_b.weight has no known split"
    )
