"""Nested experts in memory: who is there in how many bits, who is widened, who loses planes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgert.experts.loads import Load, Loader
from edgert.experts.nested_arena import LevelForm, NestedArena
from edgert.experts.routed import Turn
from edgert.experts.scores import Scores
from edgert.experts.slots import SlotPool
from edgert.experts.tally import Tally
from edgert.observer import RunObserver

Key = tuple[int, int]  # index of a stack, expert


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an expert is and at which level."""

    level: int
    slot: int


@dataclass(frozen=True, slots=True)
class _Job:
    """What a load does: read a whole prefix, add planes to `source`, or drop planes of it."""

    entry: _Entry
    source: _Entry | None
    after: Load | None


class NestedCache:
    """Slots of several widths, filled on demand.

    An expert that is there in fewer bits than wanted is widened by the planes it lacks; one that is
    there in more is used as it is. What has to leave a slot of a wide level is narrowed rather than
    dropped where a slot of the next narrower level is worth less: planes go highest first, the base
    last. Every change of who is where happens on the thread that computes.

    Args:
        memory: The arena, and the layers whose experts it holds.
        scores: What to drop first.
        tally: Counts what happens.
        observer: Told of reads.
        start_loader: Makes the loader that fills the arena.
    """

    def __init__(
        self,
        memory: tuple[NestedArena, Sequence[Turn]],
        scores: Scores,
        tally: Tally,
        observer: RunObserver,
        start_loader: Callable[[Callable[[Load, int], None]], Loader],
    ) -> None:
        self._arena, self.turns = memory
        self.scores = scores
        self.tally = tally
        self._observer = observer
        self._loader = start_loader(self._bring)
        self._entries: dict[Key, _Entry] = {}
        self._before: dict[Key, _Entry] = {}  # what an expert that is being widened was
        self._loads: dict[Key, Load] = {}
        self._jobs: dict[Key, _Job] = {}
        self._leaving: dict[tuple[int, int], Load] = {}  # slots whose bytes are still being moved
        self._held: set[Key] = set()
        self._owed: dict[int, int] = {}  # slots by pool that the turn at hand has yet to take

    @property
    def held_bytes(self) -> int:
        """Memory of the slots."""
        return self._arena.slot_bytes

    def need(
        self, turn: Turn, stacks: Iterable[int], wanted: Mapping[int, int]
    ) -> dict[int, list[Load]]:
        """Hold experts of a turn at no less than their levels, start to read what is missing.

        Args:
            turn: Whose turn it is.
            stacks: Which of its stacks.
            wanted: Level by expert, in the order in which they are to be read.

        Returns:
            By stack, what has not arrived.

        Raises:
            CapacityError: they do not fit at once.
        """
        keys = [(stack, expert) for stack in stacks for expert in wanted]
        self._release(set(keys))
        missing = [key for key in keys if not self._hold(key, wanted[key[1]])]
        self._owe(missing, wanted, set(keys))
        for key in missing:
            self._owed[self._arena.pool_of[key[0], wanted[key[1]]]] -= 1
            self._start(turn.index, key, wanted[key[1]])
        pending: dict[int, list[Load]] = {}
        for key in keys:
            if key in self._loads:
                pending.setdefault(key[0], []).append(self._loads[key])
        return pending

    def holds(self, stack: int, expert: int) -> bool:
        """Say whether an expert is in memory, or on its way."""
        return (stack, expert) in self._entries

    def place(self, stack: int, expert: int) -> tuple[int, int]:
        """Return level and slot of an expert that is held."""
        entry = self._entries[stack, expert]
        return entry.level, entry.slot

    def narrowed(self, stack: int, expert: int, level: int) -> int:
        """Return a tensor of one expert that is held, at a lower level; until the next call."""
        forms, entry = self._arena.forms[stack], self._entries[stack, expert]
        return self._arena.narrowed(forms[entry.level], forms[level], entry.slot)

    def used(self, stack: int, level: int, n_rows: int) -> None:
        """Count rows that were computed with a stack's experts of a level."""
        form = self._arena.forms[stack][level]
        layout = form.nested.layout
        n_weights = layout.n_rows * layout.row_length
        n_bits = 8.0 * layout.prefix_bytes(form.width)
        self.tally.used(form.stack.turn, n_rows * n_weights, n_rows * n_bits)

    def tensor(self, stack: int, level: int) -> int:
        """Return the tensor that reads a stack's slots of a level."""
        return self._arena.tensors[stack, level]

    def room(self, stack: int) -> int:
        """Return how many experts of a stack there is room for at once, whatever their levels."""
        pools = (self._arena.pool_of[stack, form.level] for form in self._arena.forms[stack])
        return min(self._arena.pools[pool].n_slots for pool in pools)

    def wait(self, load: Load) -> None:
        """Wait for a load.

        Raises:
            FormatError: it failed; the expert is what it was before.
        """
        if not load.done:
            seconds, ended_s = load.wait(), time.perf_counter()
            form = self._arena.forms[load.stack][0]
            self.tally.stalled(form.stack.turn, seconds)
            self._observer.waited(form.stack.name, ended_s - seconds, ended_s)
        self._settle((load.stack, load.expert))
        if load.error is not None:
            raise load.error

    def end_turn(self) -> None:
        """Let go of everything that no load needs."""
        self._release(set())

    def close(self) -> None:
        """Stop loading, then give the memory back."""
        self._loader.close()
        self._arena.close()

    def _hold(self, key: Key, level: int) -> bool:
        """Hold an expert; False if it is not there, nor on its way, at that level."""
        load = self._loads.get(key)
        if load is not None and self._entries[key].level < level:
            load.wait()
        self._settle(key)
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._pool(key, entry).hold(entry.slot)
        self._held.add(key)
        return entry.level >= level

    def _owe(self, missing: Sequence[Key], wanted: Mapping[int, int], needed: set[Key]) -> None:
        """Count the slots that are to be taken; where they are short, wait for what is not needed.

        Loads of a pass that ended early may still be under way, and hold their slots.
        """
        self._owed = {}
        for stack, expert in missing:
            pool = self._arena.pool_of[stack, wanted[expert]]
            self._owed[pool] = self._owed.get(pool, 0) + 1
        if any(self._arena.pools[pool].n_available() < n for pool, n in self._owed.items()):
            for key in self._held - needed:
                if key in self._loads:
                    self._loads[key].wait()
            self._release(needed)

    def _is_short(self, pool: int) -> bool:
        """Say whether every slot of a pool that may be taken is owed to the turn at hand."""
        return self._arena.pools[pool].n_available() <= self._owed.get(pool, 0)

    def _start(self, turn: int, key: Key, level: int) -> None:
        """Bring an expert that is absent, or widen one that is there in fewer bits."""
        before = self._entries.get(key)
        number = self._arena.pool_of[key[0], level]
        same = before is not None and self._arena.pool_of[key[0], before.level] == number
        if before is not None and same and self._is_short(number):  # no second slot: read it anew
            self._entries.pop(key)
            self._held.discard(key)
            self._arena.pools[number].give_back(before.slot)
            before = None
        forms = self._arena.forms[key[0]]
        narrow = None if before is None else forms[before.level]
        entry, after = self._take(turn, key, level)
        if before is not None:
            self._before[key] = before
        n_bytes = self._arena.read_bytes(forms[level], narrow)
        self.tally.missed(turn, n_bytes)
        self.tally.read(turn, n_bytes)
        self._submit(key, _Job(entry, before, after), n_bytes)

    def _take(self, turn: int, key: Key, level: int) -> tuple[_Entry, Load | None]:
        """Give an expert a slot of a level; also returns what must be moved out of it first."""
        number = self._arena.pool_of[key[0], level]
        pool = self._arena.pools[number]
        worth = self.scores.worth(turn)
        for leaving in pool.make_room(1, worth):
            self._leave(turn, leaving, float(worth[self._turn(leaving), leaving[1]]))
        slot = pool.take(key[0], self._turn(key), key[1])
        return _Entry(level, slot), self._leaving.pop((number, slot), None)

    def _leave(self, turn: int, key: Key, worth: float) -> None:
        """Move an expert that lost its slot to the next narrower level, if it is worth that."""
        entry = self._entries.pop(key)
        if not entry.level:
            return
        numbers = [self._arena.pool_of[key[0], entry.level - drop] for drop in (0, 1)]
        narrower = self._arena.pools[numbers[1]]
        if numbers[0] == numbers[1] or self._is_short(numbers[1]):
            return
        if not narrower.spares(self.scores.worth(turn), worth):
            return
        lower, after = self._take(turn, key, entry.level - 1)
        self._submit(key, _Job(lower, entry, after), 0)
        self._leaving[numbers[0], entry.slot] = self._loads[key]

    def _submit(self, key: Key, job: _Job, n_bytes: int) -> None:
        name = self._form(key, job.entry).nested.entry.name
        watch = self._observer.reading(name, n_bytes)
        load = Load(key[0], key[1], job.entry.slot, early=False, watch=watch)
        self._entries[key] = job.entry
        self._held.add(key)
        self._jobs[key] = job
        self._loads[key] = load
        self._loader.submit(load)

    def _bring(self, load: Load, number: int) -> None:
        """Do what a load's job says; on the loader's threads."""
        key = (load.stack, load.expert)
        job = self._jobs[key]
        if job.after is not None:
            job.after.wait()
        form = self._form(key, job.entry)
        if job.source is None:
            self._arena.fill(form, load.expert, job.entry.slot, number)
            return
        source = self._form(key, job.source)
        slots = (job.source.slot, job.entry.slot)
        if source.width < form.width:
            self._arena.widen((source, form), load.expert, slots, number)
        else:
            self._arena.narrow(source, form, slots)

    def _settle(self, key: Key) -> bool:
        """Forget a load that has ended, False if it has not; a failed one changes nothing."""
        load = self._loads.get(key)
        if load is None:
            return True
        if not load.done:
            return False
        self._loads.pop(key)
        job = self._jobs.pop(key)
        before = self._before.pop(key, None)
        lost = before if load.error is None else job.entry
        if lost is not None:
            self._pool(key, lost).give_back(lost.slot)
        if load.error is not None:
            self._held.discard(key)
            self._entries.pop(key)
            if before is not None:
                self._entries[key] = before
                self._pool(key, before).release((before.slot,))
        return True

    def _release(self, needed: set[Key]) -> None:
        """Let go of what is neither needed nor loading."""
        for key in self._held - needed:
            if self._settle(key) and key in self._held:
                self._held.discard(key)
                entry = self._entries[key]
                self._pool(key, entry).release((entry.slot,))

    def _pool(self, key: Key, entry: _Entry) -> SlotPool:
        return self._arena.pools[self._arena.pool_of[key[0], entry.level]]

    def _form(self, key: Key, entry: _Entry) -> LevelForm:
        return self._arena.forms[key[0]][entry.level]

    def _turn(self, key: Key) -> int:
        return self._arena.forms[key[0]][0].stack.turn
