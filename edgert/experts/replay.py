"""Replays what routers chose through a cache of experts: every policy, and one that sees ahead.

Counts experts, not bytes: all matrices of an expert come and go together. Nothing is guessed ahead,
which moves reads and hardly saves any.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CapacityError
from edgert.experts.scores import POLICIES, Policy, Scores, make_scores
from edgert.experts.slots import SlotPool

Choices = NDArray[np.int32]

NOBODY = -1  # in choices: the layer chose nobody for this token, or it was not written down
_WARM_SHARE = 0.1
_NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did to a trace, once the cache was warm.

    Attributes:
        misses_per_token: Experts that had to be read for a token.
        hit_rate: Share of what was wanted that was there; None where nothing was wanted.
    """

    misses_per_token: float
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every policy on one trace and capacity.

    Attributes:
        n_tokens: Tokens that were counted.
        n_warm: Tokens before them.
        n_experts: Experts that the cache holds.
        policies: By name.
        best: What seeing ahead would give: the least that any policy can.
        winner: The policy with the fewest misses.
    """

    n_tokens: int
    n_warm: int
    n_experts: int
    policies: dict[Policy, Outcome]
    best: Outcome
    winner: Policy


def by_token(lines: Sequence[tuple[int, Sequence[int]]]) -> Choices:
    """Arrange a trace by token, in the order in which the tokens come.

    Layers of a batch are written one after the other, each with a line for every token that it
    still computes: the last layer may compute fewer, the last ones.

    Args:
        lines: (layer, experts) as they were written.

    Returns:
        (n_tokens, n_layers, n_used), `NOBODY` where there is no choice; layers in ascending order.
    """
    layers = sorted({layer for layer, _ in lines})
    index_of = {layer: index for index, layer in enumerate(layers)}
    n_used = max((len(experts) for _, experts in lines), default=0)
    batches: list[list[list[Sequence[int]]]] = []
    before = len(layers)
    for layer, experts in lines:
        index = index_of[layer]
        if index < before:
            batches.append([[] for _ in layers])
        batches[-1][index].append(experts)
        before = index
    n_tokens = sum(max(map(len, batch)) for batch in batches)
    choices = np.full((n_tokens, len(layers), n_used), NOBODY, np.int32)
    end = 0
    for batch in batches:
        end += max(map(len, batch))
        for index, rows in enumerate(batch):
            for token, experts in enumerate(rows, end - len(rows)):
                choices[token, index, : len(experts)] = experts
    return choices


def compare(choices: Choices, n_experts: int, capacity: int) -> Comparison:
    """Replay a trace with every policy.

    Args:
        choices: As `by_token` arranges them.
        n_experts: Experts of a layer.
        capacity: Experts that the cache holds, of all layers together.

    Raises:
        CapacityError: the cache does not hold what one token wants of one layer.
    """
    n_tokens, n_layers, n_used = choices.shape
    if capacity < n_used:
        raise CapacityError(
            f"a cache of {capacity} experts is smaller than the {n_used} that a token wants at "
            "once",
            needed_bytes=None,
            hint=f"--experts {n_used} is the least",
        )
    n_warm = int(n_tokens * _WARM_SHARE)
    policies: dict[Policy, Outcome] = {}
    for policy in POLICIES:
        scores = make_scores(policy, n_layers, n_experts)
        policies[policy] = replay(choices, n_experts, capacity, scores, n_warm)
    best = replay_ahead(choices, capacity, n_warm)
    winner = min(POLICIES, key=lambda policy: policies[policy].misses_per_token)
    return Comparison(n_tokens - n_warm, n_warm, capacity, policies, best, winner)


def replay(choices: Choices, n_experts: int, capacity: int, scores: Scores, n_warm: int) -> Outcome:
    """Replay a trace through the pool and the scores that a model runs with.

    Args:
        choices: As `by_token` arranges them.
        n_experts: Experts of a layer.
        capacity: Experts that the cache holds.
        scores: What to drop first; learns from the trace.
        n_warm: Tokens that fill the cache before misses count.
    """
    pool = SlotPool(capacity)
    slots = [[NOBODY] * n_experts for _ in range(choices.shape[1])]
    count = _Count()
    for token, turns in enumerate(choices):
        for turn, row in enumerate(turns):
            wanted = [int(expert) for expert in row if expert != NOBODY]
            if not wanted:
                continue
            scores.routed(turn, np.bincount(wanted, minlength=n_experts), 1)
            table = slots[turn]
            there = [table[expert] for expert in wanted if table[expert] != NOBODY]
            for slot in there:
                pool.hold(slot)
            missing = [expert for expert in wanted if table[expert] == NOBODY]
            if len(missing) > capacity - pool.n_taken:
                for dropped, expert in pool.make_room(len(missing), scores.worth(turn)):
                    slots[dropped][expert] = NOBODY
            for expert in missing:
                table[expert] = pool.take(turn, turn, expert)
            pool.release(table[expert] for expert in wanted)
            count.add(token >= n_warm, len(wanted), len(missing))
    return count.outcome(len(choices) - n_warm)


def replay_ahead(choices: Choices, capacity: int, n_warm: int) -> Outcome:
    """Replay a trace dropping who is wanted last: no policy reads less.

    Args:
        choices: As `by_token` arranges them.
        capacity: Experts that the cache holds.
        n_warm: Tokens that fill the cache before misses count.

    Source: Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """
    following = _next_uses(choices)
    n_turns = choices.shape[1]
    due: dict[tuple[int, int], int] = {}  # who is held: the step that wants it next
    heap: list[tuple[int, tuple[int, int]]] = []
    count = _Count()
    for step, (row, uses) in enumerate(zip(_rows(choices), _rows(following), strict=True)):
        turn = step % n_turns
        n_missing = n_wanted = 0
        for expert, use in zip(row.tolist(), uses.tolist(), strict=True):
            if expert == NOBODY:
                continue
            n_wanted += 1
            n_missing += (turn, expert) not in due
            due[turn, expert] = use
            heapq.heappush(heap, (-use, (turn, expert)))
        current = {(turn, expert) for expert in row.tolist()}
        aside = []
        while len(due) > capacity and heap:
            entry = heapq.heappop(heap)
            if due.get(entry[1]) != -entry[0]:
                continue  # it was wanted again since, or is gone
            if entry[1] in current:
                aside.append(entry)  # it is being computed with, though nobody wants it later
            else:
                del due[entry[1]]
        for entry in aside:
            heapq.heappush(heap, entry)
        count.add(step // n_turns >= n_warm, n_wanted, n_missing)
    return count.outcome(len(choices) - n_warm)


def belady_misses(tokens: Sequence[Sequence[Sequence[int]]], capacity: int, n_warm: int) -> int:
    """Return the fewest experts that can be read for a trace, once the cache is warm.

    Args:
        tokens: By token and layer, the experts wanted at once; more than fit are read and dropped.
        capacity: Experts that the cache holds.
        n_warm: Tokens that fill the cache before misses count.
    """
    n_layers = max((len(token) for token in tokens), default=0)
    n_used = max((len(row) for token in tokens for row in token), default=0)
    choices = np.full((len(tokens), n_layers, n_used), NOBODY, np.int32)
    for index, token in enumerate(tokens):
        for layer, row in enumerate(token):
            choices[index, layer, : len(row)] = row
    found = replay_ahead(choices, capacity, n_warm)
    return round(found.misses_per_token * max(1, len(tokens) - n_warm))


class _Count:
    """Adds up what was wanted and missed."""

    def __init__(self) -> None:
        self.n_wanted = self.n_missed = 0

    def add(self, counts: bool, n_wanted: int, n_missed: int) -> None:
        if counts:
            self.n_wanted += n_wanted
            self.n_missed += n_missed

    def outcome(self, n_tokens: int) -> Outcome:
        hit_rate = 1.0 - self.n_missed / self.n_wanted if self.n_wanted else None
        return Outcome(self.n_missed / max(1, n_tokens), hit_rate)


def _rows(table: NDArray[np.generic]) -> NDArray[np.generic]:
    return table.reshape(-1, table.shape[2])


def _next_uses(choices: Choices) -> NDArray[np.int64]:
    """Return for every choice the step, token times layers, that wants the same expert next."""
    n_turns = choices.shape[1]
    following = np.full(choices.shape, _NEVER, np.int64)
    last: dict[tuple[int, int], int] = {}
    for token in range(len(choices) - 1, -1, -1):
        for turn in range(n_turns):
            for place, expert in enumerate(choices[token, turn].tolist()):
                following[token, turn, place] = last.get((turn, expert), _NEVER)
            for expert in choices[token, turn].tolist():
                last[turn, expert] = token * n_turns + turn
    return following
