"""`edgert experts`: replays what routers chose, and says which experts to drop first."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.opening import embedded_model, model_path, user_path
from edgert.errors import CapacityError, ConfigError
from edgert.experts.kept_policy import KeptPolicy, PolicyStore
from edgert.experts.replay import Comparison, by_token, compare
from edgert.experts.scores import POLICIES, Policy
from edgert.units import format_bytes, parse_bytes
from edgert.weights.packed import model_key
from partition.language_workload import describe_language
from partition.popularity import read_routing_trace
from quant.model_spec import read_model_spec
from quant.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ExpertsOptions

_MOST_TOKENS = 4096  # the latest ones
_SHARES = (0.25, 0.5, 0.75)

Row = dict[str, object]


def run(options: ExpertsOptions, context: Context) -> int:
    """Print how every policy does, keep the winner when asked, and return the exit code."""
    model, trace_name = options.model, options.routing_trace
    if trace_name is None and model.model is not None:
        model, trace_name = replace(model, path=None), model.path
    if trace_name is None:
        raise ConfigError(
            "no routing trace named",
            hint="edgert bench MODEL --routing-trace FILE, then edgert experts MODEL FILE",
        )
    path = model_path(model, context.env) or embedded_model()
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    trace = user_path(trace_name)
    n_lines = _MOST_TOKENS * spec.n_layer
    read_routing_trace(trace, spec.n_layer, spec.n_expert, spec.n_expert_used)  # checks every line
    choices = by_token(_lines(trace, n_lines))[-_MOST_TOKENS:]
    n_all = choices.shape[1] * spec.n_expert
    expert_bytes = _expert_bytes(file)
    capacities = _capacities(options, n_all, spec.n_expert_used, expert_bytes)
    found = [compare(choices, spec.n_expert, capacity) for capacity in capacities]
    winner = _winner(found)
    kept = None
    if options.keep:
        record = _record(file, winner, found)
        kept = PolicyStore(context.directories.cache / "experts").save(file, record)
    if options.output.json:
        print(json.dumps(_as_json(found, winner, kept)))
        return 0
    print("\n".join(_table(found, n_all, expert_bytes)))
    n_tokens = found[0].n_tokens + found[0].n_warm
    context.say(f"{winner} misses least in {n_tokens:,} tokens of {trace}")
    if kept is not None:
        context.say(f"kept for this model: {kept}")
    return 0


def _lines(trace: Path, most: int) -> Sequence[tuple[int, list[int]]]:
    """Return the last lines of a trace that was checked."""
    with trace.open("rb") as stream:
        lines = deque((line for line in stream if line.strip()), maxlen=most)
    values = map(json.loads, lines)
    return [(value["layer"], value["experts"]) for value in values]


def _expert_bytes(file: TensorFile) -> int:
    """Return the mean size of all matrices of an expert."""
    workload = describe_language(file, read_model_spec(file))
    layers = [layer.experts for layer in workload.run_layers if layer.experts is not None]
    return round(sum(experts.expert_bytes for experts in layers) / max(1, len(layers)))


def _capacities(
    options: ExpertsOptions, n_all: int, n_used: int, expert_bytes: int
) -> tuple[int, ...]:
    if options.experts is not None and options.expert_cache is not None:
        raise ConfigError("--experts and --cache say the same", hint="leave one out")
    if options.experts is not None:
        return (options.experts,)
    if options.expert_cache is None:
        return tuple(max(n_used, round(share * n_all)) for share in _SHARES)
    size = parse_bytes(options.expert_cache)
    if size < n_used * expert_bytes:
        raise CapacityError(
            f"{size:,} bytes do not hold the {n_used} experts that a token wants at once",
            needed_bytes=n_used * expert_bytes,
            available_bytes=size,
            hint=f"--cache {n_used * expert_bytes} is the least",
        )
    return (size // expert_bytes,)


def _winner(found: Sequence[Comparison]) -> Policy:
    """Return the policy with the fewest misses, each capacity counting alike."""

    def cost(policy: Policy) -> float:
        return sum(
            one.policies[policy].misses_per_token / max(one.best.misses_per_token, 1e-9)
            for one in found
        )

    return min(POLICIES, key=cost)


def _record(file: TensorFile, winner: Policy, found: Sequence[Comparison]) -> KeptPolicy:
    return KeptPolicy(
        model=model_key(file),
        policy=winner,
        n_tokens=max(1, found[0].n_tokens + found[0].n_warm),
        n_experts=tuple(one.n_experts for one in found),
        misses_per_token={
            policy: tuple(one.policies[policy].misses_per_token for one in found)
            for policy in POLICIES
        },
    )


def _as_json(found: Sequence[Comparison], winner: Policy, kept: Path | None) -> Row:
    return {
        "winner": winner,
        "kept": None if kept is None else str(kept),
        "replays": [
            {
                "n_experts": one.n_experts,
                "n_tokens": one.n_tokens,
                "n_warm_tokens": one.n_warm,
                "policies": {policy: asdict(found) for policy, found in one.policies.items()},
                "clairvoyant": asdict(one.best),
                "winner": one.winner,
            }
            for one in found
        ],
    }


def _table(found: Sequence[Comparison], n_all: int, expert_bytes: int) -> list[str]:
    names = ["experts held", "cache", *POLICIES, "clairvoyant"]
    lines = [f"| {' | '.join(names)} |", "| " + " | ".join("--:" for _ in names) + " |"]
    for one in found:
        cells = [f"{one.n_experts} of {n_all}", format_bytes(one.n_experts * expert_bytes)]
        for outcome in (*one.policies.values(), one.best):
            hits = "" if outcome.hit_rate is None else f" ({100 * outcome.hit_rate:.1f} % hits)"
            cells.append(f"{outcome.misses_per_token:.2f}{hits}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "misses per token; clairvoyant is the least that any policy can"]
