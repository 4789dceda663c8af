"""Flags of `edgert plan`, and of running what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgert.cli.flags import choice_flag, count_flag, real_flag, switch_flag, text_flag
from edgert.cli.options import ModelFlags, OutputFlags


@dataclass(frozen=True, slots=True)
class GoalFlags:
    """What `edgert plan` optimises, within which limits."""

    goal: Annotated[
        str,
        choice_flag(
            "--goal", choices=("tpot", "ttft", "memory", "energy", "bytes-sent"),
            text="What to make smallest: time per token, time to the first token, memory, "
            "energy per token, bytes sent to other hosts.",
        ),
    ] = "tpot"  # fmt: skip
    prompt_tokens: Annotated[
        int | None,
        count_flag(
            "--prompt-tokens",
            text="Length of the prompt that the plan is for (default: 128, or half the context).",
        ),
    ] = None
    max_tpot: Annotated[
        float | None, real_flag("--max-tpot", least=1e-6, text="Most seconds per token.")
    ] = None
    max_ttft: Annotated[
        float | None, real_flag("--max-ttft", least=1e-6, text="Most seconds to the first token.")
    ] = None
    max_energy: Annotated[
        float | None, real_flag("--max-energy", least=1e-6, text="Most joules per token.")
    ] = None
    max_bytes_sent: Annotated[
        str | None,
        text_flag(
            "--max-bytes-sent", metavar="SIZE", text="Most bytes sent to other hosts per token."
        ),
    ] = None
    cache_types: Annotated[
        str,
        text_flag(
            "--cache-types", metavar="LIST",
            text="KV cache types the plan may use, best first; all but f16 lose precision.",
        ),
    ] = "f16"  # fmt: skip
    stays: Annotated[
        tuple[str, ...],
        text_flag(
            "--stay", metavar="FIRST:END=HOST",
            text="These layers must be on this host; may be repeated.",
        ),
    ] = ()  # fmt: skip
    may_leave: Annotated[
        str,
        text_flag(
            "--may-leave", metavar="LIST",
            text="What other hosts may see: input, hidden_states, logits.",
        ),
    ] = "hidden_states"  # fmt: skip
    tokens_per_pass: Annotated[
        float,
        real_flag(
            "--tokens-per-pass", least=1, most=257,
            text="Tokens that speculation makes of one pass, as edgert bench measured it.",
        ),
    ] = 1.0  # fmt: skip
    dimensions: Annotated[
        tuple[str, ...],
        text_flag(
            "--dimension", metavar="NAME=N",
            text="Size of a dimension that an ONNX model leaves open; may be repeated.",
        ),
    ] = ()  # fmt: skip
    routing_trace: Annotated[
        str | None,
        text_flag(
            "--routing-trace", metavar="FILE", text="Which experts a router chose (JSON lines)."
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class HardwareFlags:
    """What `edgert plan` plans for; this host when nothing is named."""

    topology: Annotated[
        str | None,
        text_flag("--topology", metavar="FILE", text="Hosts and links to plan for (JSON)."),
    ] = None
    devices: Annotated[
        tuple[str, ...],
        text_flag(
            "--device", metavar="ID",
            text="Plan for this known device (edgert devices --catalog); may be repeated.",
        ),
    ] = ()  # fmt: skip
    future: Annotated[
        bool,
        switch_flag(
            "--future",
            text="Also use what this version plans for and cannot execute yet, on this host.",
        ),
    ] = False  # fmt: skip
    measure: Annotated[
        bool, switch_flag("--measure", text="Measure this host again, although figures are known.")
    ] = False
    no_measure: Annotated[
        bool, switch_flag("--no-measure", text="Assume rates of this host that are not known.")
    ] = False


@dataclass(frozen=True, slots=True)
class SplitFlags:
    """One cut between edge and cloud: MODEL at home, another precision of it behind the cut."""

    backs: Annotated[
        tuple[str, ...],
        text_flag(
            "--back", metavar="FILE",
            text="Cut the model once: layers behind the cut run on another host, from this file "
            "of the same model; may be repeated, the plan chooses.",
        ),
    ] = ()  # fmt: skip
    fronts: Annotated[
        tuple[str, ...],
        text_flag(
            "--front", metavar="FILE",
            text="With --back, another precision that home may have instead of MODEL; may be "
            "repeated.",
        ),
    ] = ()  # fmt: skip
    codecs: Annotated[
        str,
        text_flag(
            "--codecs", metavar="LIST",
            text="With --back, how hidden states may travel: f32, f16, adaptive; all but f32 lose "
            "precision.",
        ),
    ] = "f32"  # fmt: skip
    least_context: Annotated[
        int | None,
        count_flag(
            "--least-context",
            text="With --back, halve the context down to this where a longer one does not fit.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class PlanOutputFlags:
    """What `edgert plan` writes."""

    out: Annotated[
        str | None, text_flag("-o", "--out", metavar="FILE", text="Write the manifest here.")
    ] = None
    fallback: Annotated[
        str | None,
        text_flag(
            "--fallback", metavar="FILE",
            text="Also plan for home alone, to go on with when another host is gone.",
        ),
    ] = None  # fmt: skip
    force: Annotated[bool, switch_flag("--force", text="Replace files that are there.")] = False
    explain: Annotated[
        bool, switch_flag("--explain", text="Say what binds, the next-best plans and every reason.")
    ] = False
    pareto: Annotated[
        bool, switch_flag("--pareto", text="List the plans that no other beats in every metric.")
    ] = False
    report: Annotated[
        str | None,
        text_flag("--report", metavar="FILE", text="Write a page about the plan (HTML)."),
    ] = None
    simulated: Annotated[
        str | None,
        text_flag("--trace", metavar="FILE", text="Write the simulated timeline (Chrome trace)."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """`edgert plan`."""

    model: ModelFlags
    goal: GoalFlags
    hardware: HardwareFlags
    split: SplitFlags
    result: PlanOutputFlags
    output: OutputFlags
