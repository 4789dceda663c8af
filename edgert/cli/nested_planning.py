"""What plans of nested models are made from: experts in every width, and what is known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.errors import ConfigError
from edgert.experts.qualities import Qualities, asked_bits, qualities_path, read_qualities
from edgert.experts.widths import WidthPolicy, choose_widths
from edgert.llama.options import LoadOptions
from edgert.weights.packed import model_key
from partition.nested_plan import NestedAsk, make_nested_plan
from partition.nested_widths import StackWidth, WidthRule
from partition.plan import Plan, make_plan
from quant.nested.blocks import block_form
from quant.nested.file import NestedModel, NestedTensor

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.options import ModelFlags
    from edgert.cli.planning import Inputs
    from partition.manifest import Manifest


def plan_of(inputs: Inputs) -> Plan:
    """Plan a model; of a nested one the bits of its experts too.

    Raises:
        ConfigError: the goal contradicts itself.
        PlanError: nothing satisfies it.
    """
    if inputs.nested is None:
        return make_plan(inputs.workload, inputs.topology, inputs.goal, inputs.popularity)
    return make_nested_plan(
        inputs.workload, inputs.nested, inputs.topology, inputs.goal, inputs.popularity
    )


def ask_by_flags(nested: NestedModel, flags: ModelFlags, cache: Path) -> NestedAsk:
    """Return what `--expert-bits` or `--quality` ask for, read as they are to run the model.

    Raises:
        ConfigError: both are given, one is wrong, the file lacks a width, or no quality was
            measured.
        FormatError: the kept qualities are damaged.
    """
    path = nested.file.path
    known = _known(nested, cache)
    asked = asked_bits(path, flags.expert_bits, flags.quality, cache)
    if not asked["expert_bits"]:
        return _ask(nested, known)
    policy = choose_widths(nested, LoadOptions(path, **asked))
    why = f"--expert-bits {flags.expert_bits}"
    if flags.quality is not None:
        why = f"the fewest measured bits that keep --quality {flags.quality:g}"
    return _ask(nested, known, policy, why)


def ask_again(nested: NestedModel, manifest: Manifest, cache: Path) -> NestedAsk:
    """Return the widths of a manifest; a width that the file lacks is a ConfigError."""
    known, experts = _known(nested, cache), manifest.stages[0].tiers.experts
    if experts is None or not manifest.stages[0].is_nested:
        return _ask(nested, known)
    policy = WidthPolicy(experts.bits, experts.cuts)
    return _ask(nested, known, policy, "as in the manifest before")


def _ask(
    nested: NestedModel, known: Qualities | None, policy: WidthPolicy | None = None, why: str = ""
) -> NestedAsk:
    widths = range(nested.base, nested.top + 1)
    for width in () if policy is None else policy.widths:
        if width not in widths:
            raise ConfigError(
                f"experts in {width} bits, the file has {nested.base} to {nested.top}",
                hint=f"--expert-bits {nested.top}",
            )
    stacks = {
        name: {width: _stack_width(tensor, nested.width_of(name, width)) for width in widths}
        for name, tensor in nested.tensors.items()
    }
    uniform = tuple(_rule((width,), (), known) for width in reversed(widths))
    asked = None if policy is None else _rule(policy.widths, policy.cuts, known)
    return NestedAsk(stacks, uniform, asked, why, _measured(known))


def _measured(known: Qualities | None) -> tuple[WidthRule, ...]:
    """Return what is worth trying of what was measured, the best first.

    Single widths are among it also where two of fewer bits are better: one wants fewer slots.
    """
    if known is None:
        return ()
    single = (one for one in known.policies if len(one.widths) == 1)
    found = {*known.worth_having(), *single}
    ordered = sorted(found, key=lambda one: (one.perplexity, one.bits_per_weight))
    return tuple(_rule(one.widths, one.cuts, known) for one in ordered)


def _stack_width(tensor: NestedTensor, bits: int) -> StackWidth:
    form = block_form(bits, tensor.layout.top)
    memory_bytes = tensor.layout.n_groups * form.block_bytes
    return StackWidth(bits, form.name, memory_bytes, tensor.layout.prefix_bytes(bits))


def _rule(widths: tuple[int, ...], cuts: tuple[float, ...], known: Qualities | None) -> WidthRule:
    """Return a rule with what was measured of it."""
    for measured in () if known is None else known.policies:
        if known is not None and (measured.widths, measured.cuts) == (widths, cuts):
            return WidthRule(widths, cuts, known.quality(measured), measured.bits_per_weight)
    return WidthRule(widths, cuts)


def _known(nested: NestedModel, cache: Path) -> Qualities | None:
    """Return the qualities that were measured for this very file, None if there are none."""
    folder, key = cache / "experts", model_key(nested.file)
    return read_qualities(folder, key) if qualities_path(folder, key).exists() else None
