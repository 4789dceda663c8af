"""Why a model is cut where it is, in these precisions: words only, nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgert.units import format_bytes, format_seconds
from partition.baselines import PlainWay
from partition.candidates import Candidate
from partition.problem import TIE_SHARE
from partition.reasons import Reason
from partition.split_stages import Sides, weight_bits

_Key = Callable[[Candidate], object]


def split_decisions(
    chosen: Candidate,
    ways: Sequence[Candidate],
    sides: tuple[Sides, Sides],
    contexts: tuple[Sequence[int], int, Sequence[str]],
) -> tuple[Reason, ...]:
    """Return what was decided about the cut.

    Args:
        chosen: The plan.
        ways: Everything that satisfies the goal, best first.
        sides: Of the setting that was chosen.
        contexts: Those that might be used, the one that is, and why those before it are not.
    """
    found = [_cut_reason(chosen, ways, sides)]
    for index, where in enumerate(("at home", f"on {chosen.stages[1].place.host.host_id}")):
        stage = chosen.stages[index]
        bits = weight_bits((stage,))
        found.append(
            Reason(
                f"precision {where}",
                f"{stage.source}, {bits:.3g} bits a weight",
                _against(chosen, ways, _source_of(index)),
            )
        )
    found.append(_codec_reason(chosen, ways))
    asked, n_ctx, reasons = contexts
    if len(asked) > 1:
        why = "the longest that was asked for" if n_ctx == asked[0] else f"longer: {reasons[0]}"
        found.append(Reason("context", f"{n_ctx} positions", why))
    return tuple(found)


def split_warnings(chosen: Candidate, plain: Sequence[PlainWay]) -> tuple[str, ...]:
    """Return what a person should know about a cut: lossy codecs, what is faster without one."""
    found = []
    split = chosen.split
    if split is not None and split.codec != "f32":
        bound = "" if split.bound is None else f" within {100 * split.bound:.3g} % of each token"
        found.append(f"hidden states travel as {split.codec}{bound}: lossy, by request")
    front = chosen.stages[0].source
    found += [
        f"{way.name} is predicted faster with {front} ({format_seconds(way.tpot_s)} a token): "
        "without --back it would be planned so"
        for way in plain
        if way.candidate is not None
        and way.tpot_s is not None
        and way.tpot_s < chosen.tpot_s * (1 - TIE_SHARE)
    ]
    return tuple(found)


def _cut_reason(chosen: Candidate, ways: Sequence[Candidate], sides: tuple[Sides, Sides]) -> Reason:
    """Compare with one layer more at home, and one fewer."""
    cut, n_layers = chosen.stages[0].end_layer, chosen.stages[1].end_layer
    texts = []
    for other, words in ((cut - 1, "one layer fewer at home"), (cut + 1, "one more")):
        if not 0 < other < n_layers:
            continue
        way = next((way for way in ways if _alike(way, chosen) and _cut(way) == other), None)
        if way is not None:
            texts.append(f"{words}: {format_seconds(way.tpot_s)} a token")
            continue
        limits = [
            side.refused.get((stage.source, other))
            for side, stage in zip(sides, chosen.stages, strict=True)
        ]
        known = [limit for limit in limits if limit is not None]
        texts.append(f"{words}: {known[0] if known else 'above a ceiling'}")
    texts.append(f"{format_seconds(chosen.tpot_s)} a token as planned")
    return Reason("where the model is cut", f"after {cut} of {n_layers} layers", "; ".join(texts))


def _codec_reason(chosen: Candidate, ways: Sequence[Candidate]) -> Reason:
    split = chosen.split
    codec = "f32" if split is None else split.codec
    bound = "" if split is None or split.bound is None else f" within {100 * split.bound:.3g} %"
    sent = format_bytes(int(chosen.of("sent_bytes")))
    text = f"{sent} a token there and back, {format_seconds(chosen.hops_decode_s)} on the way; "
    return Reason("hidden states between hosts", f"{codec}{bound}", text + _against(
        chosen, ways, lambda way: None if way.split is None else way.split.codec
    ))  # fmt: skip


def _against(chosen: Candidate, ways: Sequence[Candidate], key: _Key) -> str:
    """Name the best way with each other choice, among those that satisfy the goal."""
    best: dict[object, Candidate] = {}
    for way in ways:
        best.setdefault(key(way), way)
    own = key(chosen)
    others = [
        f"{name}: {format_seconds(way.tpot_s)} a token at best, "
        f"{weight_bits(way.stages):.3g} bits a weight over all"
        for name, way in best.items()
        if name != own
    ]
    return "; ".join(others) or "no other satisfies the goal"


def _source_of(index: int) -> _Key:
    return lambda way: way.stages[index].source


def _alike(way: Candidate, chosen: Candidate) -> bool:
    """Whether two ways differ in their cut alone."""
    places = [
        [(stage.source, stage.place.name) for stage in candidate.stages]
        for candidate in (way, chosen)
    ]
    codecs = [
        None if candidate.split is None else candidate.split.codec for candidate in (way, chosen)
    ]
    same = places[0] == places[1] and codecs[0] == codecs[1]
    return same and way.setting == chosen.setting


def _cut(candidate: Candidate) -> int:
    return candidate.stages[0].end_layer
