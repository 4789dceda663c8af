"""A ceiling on memory finds what a memory of that size finds; what ceilings say is by token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, PI, alone, known_host, limited, workload
from devices.profile import HostProfile
from edgert.errors import ConfigError, PlanError
from partition.goal import ALL_ABILITIES, Goal
from partition.plan import make_plan

GOAL = Goal(n_prompt=64, n_ctx=512, ubatches=(32,))
GPU_HOST = "desktop-rtx-3060-12gb"


def processor_only(host: HostProfile) -> HostProfile:
    devices = tuple(device for device in host.devices if device.kind == "cpu")
    return host.model_copy(update={"devices": devices})


@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_ceiling_on_memory_is_as_good_as_so_much_memory(shape: str, share: float) -> None:
    model = workload(shape)
    host = known_host(BOARD)
    most_bytes = int(share * model.weight_bytes + 250e6)
    under = replace(GOAL, ceilings={"memory_bytes": float(most_bytes)})
    found = make_plan(model, alone(host), under).chosen
    assert found.peak_bytes <= most_bytes
    there = make_plan(model, alone(limited(BOARD, most_bytes)), GOAL).chosen
    assert found.tpot_s == pytest.approx(there.tpot_s, rel=0.01)


@pytest.mark.parametrize("minimise", ["memory_bytes", "tpot_s"])
def test_another_device_takes_no_plan_away(minimise: str) -> None:
    host, model = known_host(GPU_HOST), workload("tiny")
    least = replace(GOAL, abilities=ALL_ABILITIES, minimise="memory_bytes")
    alone_bytes = make_plan(model, alone(processor_only(host)), least).chosen.peak_bytes
    asked = replace(
        least,
        minimise=minimise,  # type: ignore[arg-type]
        ceilings={"memory_bytes": 1.02 * alone_bytes},
    )
    assert make_plan(model, alone(host), asked).chosen.peak_bytes <= 1.02 * alone_bytes


def test_messages_about_ceilings_speak_of_tokens() -> None:
    asked = replace(
        GOAL, n_drafted=3, tokens_per_pass=2.0, draft="ngram", ceilings={"tpot_s": 0.001}
    )
    with pytest.raises(PlanError, match=r"the ceiling is 0\.001") as caught:
        make_plan(workload("1b"), alone(known_host(PI)), asked)
    assert "0.002" not in caught.value.message


def test_tokens_of_drafts_without_drafts_are_refused() -> None:
    with pytest.raises(ConfigError, match="wanted 1 without drafts"):
        replace(GOAL, n_drafted=3, tokens_per_pass=1.5).checked()
