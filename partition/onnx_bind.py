"""From a plan of an ONNX model to its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from devices.topology import LinkProfile
from edgert.errors import FormatError
from partition.bind import (
    around,
    baselines_of,
    decisions_of,
    hosts_of,
    power_is_known,
    unrunnable,
)
from partition.manifest import (
    Ability,
    Goal,
    Manifest,
    ModelIdentity,
    Policies,
    Predicted,
    Prediction,
    Run,
    Stage,
    Subgraph,
    Tiers,
    Transport,
)
from partition.onnx_candidates import OnnxCandidate, OnnxStage
from partition.onnx_cost import float_rates
from partition.onnx_model import OnnxWeight
from partition.onnx_plan import OnnxPlan
from partition.problem import SHORT_METRICS
from partition.rates_used import half_width, link_warnings, links_used

_LONGEST_NAME = 256
_MEASURED_RANGE, _ASSUMED_RANGE = 0.25, 0.5
_MEMORY_RANGE = 0.25  # of what sessions allocate besides


def bind_onnx(plan: OnnxPlan, model: ModelIdentity, tool_version: str) -> Manifest:
    """Return the manifest of a plan; `tool_version` says who made it.

    Raises:
        FormatError: a name in the model is too long for a manifest.
    """
    chosen, goal = plan.chosen, plan.goal
    for stage in chosen.stages:
        _check_names(plan, (*stage.inputs, *stage.outputs, *stage.weights))
    required = onnx_requirements(chosen, plan.topology.home)
    links = links_used([stage.place.host.host_id for stage in chosen.stages], plan.topology)
    asked = {SHORT_METRICS[name]: most for name, most in goal.ceilings.items()}
    return Manifest(
        tool_version=tool_version,
        model=model,
        goal=Goal.model_validate(
            {"minimise": SHORT_METRICS[goal.minimise], "n_prompt": 1, "ceilings": asked}
        ),
        hosts=hosts_of([stage.place for stage in chosen.stages], plan.topology),
        stages=tuple(_stage(stage, index) for index, stage in enumerate(chosen.stages)),
        run=Run(
            n_ctx=1, n_batch=1, n_ubatch=1, n_logits_max=1, cache_type_k="f16", cache_type_v="f16"
        ),
        transport=_transport(chosen.stages),
        policies=Policies.model_validate(
            {"home": plan.topology.home, "may_leave": tuple(goal.may_leave)}
        ),
        requires=required,
        predicted=_predicted(chosen, links),
        binds=plan.binds,
        decisions=decisions_of(plan.reasons),
        baselines=baselines_of(plan.plain),
        warnings=(*plan.warnings, *link_warnings(links), *unrunnable(required)),
    )  # fmt: skip


def onnx_requirements(candidate: OnnxCandidate, home: str) -> tuple[Ability, ...]:
    """Return what a runtime at home must be able to do to execute a candidate, sorted."""
    found: set[Ability] = {"onnx", "resident"}
    if len(candidate.stages) > 1 or candidate.stages[0].place.host.host_id != home:
        found.add("pipeline")
    if any(stage.place.device.kind != "cpu" for stage in candidate.stages):
        found.add("accelerator")
    return tuple(sorted(found))


def _check_names(plan: OnnxPlan, names: Sequence[str]) -> None:
    for name in names:
        if not 1 <= len(name) <= _LONGEST_NAME:
            raise FormatError(
                f"a name of {len(name)} characters, wanted 1 to {_LONGEST_NAME}",
                path=plan.chain.workload.path,
                tensor=name[:80],
            )


def _stage(stage: OnnxStage, index: int) -> Stage:
    return Stage(
        stage_id=f"s{index}",
        host_id=stage.place.host.host_id,
        device_id=stage.place.device.device_id,
        first_layer=stage.first_unit,
        end_layer=stage.end_unit,
        embedding=False,
        head=False,
        precision=_precision(stage.weights.values()),
        tiers=Tiers(layout="file", pinned=tuple(sorted(stage.weights))),
        subgraph=Subgraph(inputs=stage.inputs, outputs=stage.outputs),
        kv_bytes=0,
        buffer_bytes=stage.live_bytes,
    )


def _precision(weights: Iterable[OnnxWeight]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for weight in weights:
        totals[weight.type_name] = totals.get(weight.type_name, 0) + weight.size_bytes
    return dict(sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])))


def _transport(stages: Sequence[OnnxStage]) -> tuple[Transport, ...]:
    return tuple(
        Transport(
            source_stage=f"s{index}",
            target_stage=f"s{index + 1}",
            kind=("memory" if one.place.host.host_id == other.place.host.host_id else "exchange"),
            codec="f32",
        )
        for index, (one, other) in enumerate(pairwise(stages))
    )


def _predicted(chosen: OnnxCandidate, links: Sequence[LinkProfile]) -> Predicted:
    origins = {float_rates(stage.place.device).origin for stage in chosen.stages}
    figures = [figure for link in links for figure in (link.round_trip_s, link.bytes_per_s)]
    width = _MEASURED_RANGE if origins == {"measured"} else _ASSUMED_RANGE
    width = max(width, half_width(figures))
    seconds, peaks = chosen.tpot_s, dict[str, int]()
    for stage in chosen.stages:
        host = stage.place.host.host_id
        peaks[host] = peaks.get(host, 0) + stage.peak_bytes
    peak = float(max(peaks.values()))
    rate = 1 / max(seconds, 1e-9)
    return Predicted(
        load_ms=around(1e3 * chosen.load_s, width),
        ttft_ms=around(1e3 * seconds, width),
        tpot_ms=around(1e3 * seconds, width),
        decode_tok_s=Prediction(value=rate, low=rate / (1 + width), high=rate / (1 - width)),
        peak_memory_bytes=Prediction(value=peak, low=peak * (1 - _MEMORY_RANGE), high=peak),
        bytes_read_per_token=around(0.0, 0.0),
        bytes_sent_per_token=around(chosen.sent_bytes, 0.02),
        energy_mj_per_token=(
            around(1e3 * chosen.energy_j, width)
            if power_is_known(stage.place for stage in chosen.stages)
            else None
        ),
    )
