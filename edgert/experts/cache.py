"""The experts in memory: who is there, who comes, who goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from edgert.errors import CapacityError
from edgert.experts.arena import Arena
from edgert.experts.loads import Load, Loader, abandon
from edgert.experts.routed import Turn
from edgert.experts.scores import Scores
from edgert.experts.tally import Tally
from edgert.observer import RunObserver

_ABSENT = -1  # in tables of slots, where None would not fit into an int32 array

Key = tuple[int, int]  # index of a stack, expert


@dataclass(slots=True)
class _Early:
    """What was guessed for a turn, the likeliest first, and bytes of it that were begun."""

    order: Sequence[int]
    absent: tuple[bool, ...]
    begun: dict[int, int] = field(default_factory=dict)


class ExpertCache:
    """Slots filled on demand and ahead of it.

    Every change of who is in which slot happens on the thread that computes, between two nodes; the
    loader's threads only fill slots. What a slot holds is dropped only when neither the current
    turn nor a load needs it.

    Args:
        arena: The memory.
        turns: Layers with experts, in order of use.
        scores: What to drop first.
        tally: Counts what happens.
        observer: Told of reads.
        start_loader: Makes the loader that fills the arena.
    """

    def __init__(
        self,
        arena: Arena,
        turns: Sequence[Turn],
        scores: Scores,
        tally: Tally,
        observer: RunObserver,
        start_loader: Callable[[Callable[[Load, int], None]], Loader],
    ) -> None:
        self._arena = arena
        self.turns = turns
        self.scores = scores
        self.tally = tally
        self._observer = observer
        self._loader = start_loader(arena.bring)
        self._slots = [[_ABSENT] * s.n_experts for turn in turns for s in turn.stacks]
        self._loads: dict[Key, Load] = {}
        self._held: set[Key] = set()
        self._early: dict[int, _Early] = {}
        self._in_use: tuple[Turn, Sequence[int]] | None = None

    @property
    def held_bytes(self) -> int:
        """Memory of the slots."""
        return self._arena.slot_bytes

    def slots(self, stack: int) -> list[int]:
        """Return the slot of every expert of a stack; only those needed now are meaningful."""
        return self._slots[stack]

    def fits(self, turn: Turn, n_experts: int) -> bool:
        """Say whether so many experts of a turn can all be in memory at once."""
        needed: dict[int, int] = {}
        for stack in turn.stacks:
            pool = self._arena.pool_of[stack.index]
            needed[pool] = needed.get(pool, 0) + n_experts
        return all(self._arena.pools[pool].n_slots >= n for pool, n in needed.items())

    def has_all(self, turn: Turn, experts: Sequence[int]) -> bool:
        """Say whether experts of a turn are all in memory while nothing moves; they stay there.

        What `need` does for most turns of most tokens, at a fraction of the time.
        """
        if self._loads or self._early:
            return False
        for stack in turn.stacks:
            row = self._slots[stack.index]
            for expert in experts:
                if row[expert] == _ABSENT:
                    return False
        if self._held:
            self._release(set())
        self._in_use = (turn, experts)
        return True

    def need(
        self, turn: Turn, stacks: Iterable[int], experts: Sequence[int]
    ) -> dict[int, list[Load]]:
        """Hold experts of a turn and start to read those that are missing, all at once.

        Args:
            turn: Whose turn it is.
            stacks: Which of its stacks.
            experts: Which experts of each.

        Returns:
            By stack, what has not arrived.

        Raises:
            CapacityError: they do not fit at once.
        """
        self._in_use = None
        stacks = tuple(stacks)
        self._settle(turn.index, experts)
        needed = {(stack, expert) for stack in stacks for expert in experts}
        self._release(needed)
        missing: dict[int, list[Key]] = {}
        pending: dict[int, list[Load]] = {stack: [] for stack in stacks}
        for stack in stacks:
            row, pool = self._slots[stack], self._arena.pool_of[stack]
            for expert in experts:
                key = (stack, expert)
                load = self._loads.get(key)
                if load is not None and self._arrived(key, load):
                    load = None  # one that failed left its slot empty: it is read again
                if row[expert] == _ABSENT:
                    missing.setdefault(pool, []).append(key)
                    continue
                self._arena.pools[pool].hold(row[expert])
                self._held.add(key)
                if load is not None:
                    self._loader.urge(load)
                    pending[stack].append(load)
        for pool, keys in missing.items():
            if self._arena.pools[pool].n_available() < len(keys):
                self._give_up_guesses(needed)
            for key in self._start(turn.index, pool, keys, early=False):
                pending[key[0]].append(self._loads[key])
                self.tally.missed(turn.index, self._arena.forms[key[0]].file_bytes)
        return {stack: loads for stack, loads in pending.items() if loads}

    def guess(self, turn: Turn, order: Sequence[int], n_ranks: int) -> None:
        """Start reading what a turn to come will probably want.

        Args:
            turn: The turn.
            order: Experts of it, the likeliest first.
            n_ranks: Begin those of these first ranks; others are only remembered, to learn from.
        """
        self._hold_in_use()
        first = turn.stacks[0].index
        absent = tuple(self._slots[first][expert] == _ABSENT for expert in order)
        early = self._early[turn.index] = _Early(order, absent)
        room: dict[int, int] = {}
        keys: dict[int, list[Key]] = {}
        for expert, is_absent in list(zip(order, absent, strict=True))[:n_ranks]:
            if is_absent and not self._plan_early(turn, expert, room, keys, early):
                break
        for pool, chosen in keys.items():
            self._start(turn.index, pool, chosen, early=True)
        self.tally.begun_early(turn.index, sum(early.begun.values()))

    def _plan_early(
        self,
        turn: Turn,
        expert: int,
        room: dict[int, int],
        keys: dict[int, list[Key]],
        early: _Early,
    ) -> bool:
        """Add an expert to what is begun early, if there is room for all of it; say whether."""
        absent = [s.index for s in turn.stacks if self._slots[s.index][expert] == _ABSENT]
        pools = [self._arena.pool_of[stack] for stack in absent]
        for pool in pools:
            if pool not in room:
                room[pool] = self._arena.pools[pool].n_available()
            room[pool] -= 1
        if any(room[pool] < 0 for pool in pools):
            return False
        for stack, pool in zip(absent, pools, strict=True):
            keys.setdefault(pool, []).append((stack, expert))
        early.begun[expert] = sum(self._arena.forms[stack].file_bytes for stack in absent)
        return True

    def wait_for(self, load: Load) -> None:
        """Wait for a load, then forget it.

        Raises:
            FormatError: it failed; its slot is empty again.
        """
        if not load.done:
            seconds, ended_s = load.wait(), time.perf_counter()
            form = self._arena.forms[load.stack]
            self.tally.stalled(form.stack.turn, seconds)
            self._observer.waited(form.place.name, ended_s - seconds, ended_s)
        key = (load.stack, load.expert)
        if self._loads.get(key) is load:
            self._arrived(key, load)
        if load.error is not None:
            raise load.error

    def wait(self, stack: int, expert: int) -> None:
        """Wait until one expert that was asked for is there.

        Raises:
            FormatError: it cannot be read.
        """
        load = self._loads.get((stack, expert))
        if load is not None:
            self.wait_for(load)

    def holds(self, stack: int, expert: int) -> bool:
        """Say whether an expert is in memory, or on its way."""
        return self._slots[stack][expert] != _ABSENT

    def room(self, stack: int) -> int:
        """Return how many experts of one stack there is room for at once."""
        return self._arena.pools[self._arena.pool_of[stack]].n_slots

    def end_turn(self) -> None:
        """Let go of everything that no load needs."""
        self._in_use = None
        if self._held:
            self._release(set())

    def _hold_in_use(self) -> None:
        """Hold what `has_all` found, before anything may be dropped for something else."""
        if self._in_use is None:
            return
        turn, experts = self._in_use
        self._in_use = None
        for stack in turn.stacks:
            row, pool = self._slots[stack.index], self._arena.pool_of[stack.index]
            for expert in experts:
                self._arena.pools[pool].hold(row[expert])
                self._held.add((stack.index, expert))

    def close(self) -> None:
        """Stop loading, then give the memory back."""
        self._loader.close()
        self._arena.close()

    def _start(self, turn: int, pool: int, keys: list[Key], *, early: bool) -> list[Key]:
        """Give slots to absent experts, dropping others, and start to read them."""
        slots = self._arena.pools[pool]
        for key in slots.make_room(len(keys), self.scores.worth(turn)):
            self._slots[key[0]][key[1]] = _ABSENT
        for stack, expert in keys:
            form = self._arena.forms[stack]
            slot = slots.take(stack, form.stack.turn, expert)
            self._slots[stack][expert] = slot
            watch = self._observer.reading(form.place.name, form.file_bytes)
            load = Load(stack, expert, slot, early=early, watch=watch)
            self._loads[stack, expert] = load
            self._held.add((stack, expert))
            self.tally.read(form.stack.turn, form.file_bytes)
            self._loader.submit(load)
        return keys

    def _settle(self, turn: int, experts: Sequence[int]) -> None:
        """Compare what was guessed for a turn with what it wants, and drop what was not begun."""
        early = self._early.pop(turn, None)
        if early is None:
            return
        chosen = set(experts)
        for rank, (expert, absent) in enumerate(zip(early.order, early.absent, strict=True)):
            if absent:
                begun = expert in early.begun
                useful = expert in chosen
                self.tally.guessed(rank, useful=useful, begun=begun)
                if begun and useful:
                    self.tally.saved(turn, early.begun[expert])
                if begun and not useful:
                    self._abandon(turn, expert)

    def _abandon(self, turn: int, expert: int) -> None:
        for stack in self.turns[turn].stacks:
            key = (stack.index, expert)
            load = self._loads.get(key)
            if load is not None:
                self._dropped(key, load)

    def _dropped(self, key: Key, load: Load) -> bool:
        """Empty the slot of a load that has not begun; say whether that was so."""
        if not abandon(load):
            return False
        self._empty(key)
        form = self._arena.forms[key[0]]
        self.tally.read(form.stack.turn, -form.file_bytes)
        if load.early:
            self.tally.begun_early(form.stack.turn, -form.file_bytes)
        return True

    def _give_up_guesses(self, needed: set[Key]) -> None:
        """Let go of everything that is not needed now, waiting for reads that have begun."""
        self._early.clear()
        for key in self._held - needed:
            load = self._loads.get(key)
            if load is not None and not self._dropped(key, load):
                load.wait()
        self._release(needed)

    def _release(self, needed: set[Key]) -> None:
        """Let go of what is neither needed nor loading."""
        guessed = {
            (stack.index, expert)
            for turn, early in self._early.items()
            for stack in self.turns[turn].stacks
            for expert in early.begun
        }
        released: dict[int, list[int]] = {}
        for key in self._held - needed - guessed:
            load = self._loads.get(key)
            if load is None or self._arrived(key, load):
                self._held.discard(key)
                slot = self._slots[key[0]][key[1]]
                if slot != _ABSENT:
                    released.setdefault(self._arena.pool_of[key[0]], []).append(slot)
        for pool, slots in released.items():
            self._arena.pools[pool].release(slots)

    def _arrived(self, key: Key, load: Load) -> bool:
        """Forget a load if it has ended; a failed one leaves its slot empty."""
        if not load.done:
            return False
        self._loads.pop(key, None)
        if load.error is not None:
            self._empty(key)
        return True

    def _empty(self, key: Key) -> None:
        stack, expert = key
        slot = self._slots[stack][expert]
        self._loads.pop(key, None)
        self._held.discard(key)
        if slot == _ABSENT:
            raise CapacityError(f"expert {expert} of stack {stack} is in no slot")
        self._slots[stack][expert] = _ABSENT
        self._arena.pools[self._arena.pool_of[stack]].give_back(slot)
