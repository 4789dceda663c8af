"""Flags of `edgert bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgert.cli.flags import choice_flag, count_flag, switch_flag, text_flag
from edgert.cli.options import ManifestFlags, ModelFlags, OutputFlags, TraceFlags


@dataclass(frozen=True, slots=True)
class BenchFlags:
    """What `edgert bench` measures."""

    n_prompt: Annotated[
        int, count_flag("-p", "--n-prompt", least=0, text="Tokens of the prefill test; 0 skips it.")
    ] = 512
    n_gen: Annotated[
        int, count_flag("-n", "--n-gen", least=0, text="Tokens of the decode test; 0 skips it.")
    ] = 128
    repetitions: Annotated[
        int, count_flag("-r", "--repetitions", most=1000, text="Runs of each test.")
    ] = 5
    output: Annotated[
        str,
        choice_flag(
            "-o", "--output", choices=("md", "json", "jsonl", "csv"), text="Form of the result."
        ),
    ] = "md"
    parallel: Annotated[
        int,
        count_flag(
            "-npl", "--parallel", most=64,
            text="Texts that the decode test continues together, one token of each a step.",
        ),
    ] = 1  # fmt: skip
    bench_seed: Annotated[int, count_flag("-s", "--seed", least=0, text="Seed of the tokens.")] = 1


@dataclass(frozen=True, slots=True)
class RoutingFlags:
    """What is written down about a router's choices."""

    routing_trace: Annotated[
        str | None,
        text_flag(
            "--routing-trace", metavar="FILE",
            text="Write which experts were chosen for every token (JSON lines), "
            "for edgert plan and edgert experts.",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """`edgert bench`."""

    model: ModelFlags
    bench: BenchFlags
    output: OutputFlags
    trace: TraceFlags
    routing: RoutingFlags
    deployment: ManifestFlags
    calibrate: Annotated[
        bool,
        switch_flag(
            "--calibrate",
            text="With --manifest: correct this host's rates by what was measured.",
        ),
    ] = False
