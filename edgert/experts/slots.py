"""Memory for experts: places of one length, each empty or holding one expert of one stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CapacityError
from edgert.experts.scores import Floats


class SlotPool:
    """Slots of one length, and who is in them. Holds no memory itself.

    Args:
        n_slots: How many.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._free = list(range(n_slots - 1, -1, -1))
        self._stack = np.zeros(n_slots, np.int32)
        self._turn = np.zeros(n_slots, np.int32)
        self._expert = np.zeros(n_slots, np.int32)
        self._stays = np.ones(n_slots, np.bool_)  # empty, or in use by what is being computed

    @property
    def n_taken(self) -> int:
        """Slots that hold something."""
        return self.n_slots - len(self._free)

    def take(self, stack: int, turn: int, expert: int) -> int:
        """Give an empty slot to an expert and hold it; IndexError when none is empty."""
        slot = self._free.pop()
        self._stack[slot], self._turn[slot], self._expert[slot] = stack, turn, expert
        self._stays[slot] = True
        return slot

    def hold(self, slot: int) -> None:
        """Keep what is in a slot until it is released."""
        self._stays[slot] = True

    def release(self, slots: Iterable[int]) -> None:
        """Let what is in these slots be dropped again."""
        self._stays[list(slots)] = False

    def give_back(self, slot: int) -> None:
        """Empty a slot."""
        self._stays[slot] = True
        self._free.append(slot)

    def n_available(self) -> int:
        """Return how many slots are empty or may be dropped."""
        return len(self._free) + int(np.count_nonzero(~self._stays))

    def spares(self, worth: Floats, at_least: float) -> bool:
        """Say whether a slot is empty, or holds something worth less than `at_least`."""
        if self._free:
            return True
        values = np.where(self._stays, np.inf, worth[self._turn, self._expert])
        return bool(values.min(initial=np.inf) < at_least)

    def make_room(self, n_slots: int, worth: Floats) -> list[tuple[int, int]]:
        """Empty as many slots as it takes for `n_slots` to be free, the least worth first.

        Args:
            n_slots: How many are to be free.
            worth: (n_turns, n_experts), as `Scores.worth` gives it.

        Returns:
            (stack, expert) of everything dropped.

        Raises:
            CapacityError: too many slots are held.
        """
        wanted = n_slots - len(self._free)
        if wanted <= 0:
            return []
        values = worth[self._turn, self._expert]
        values[self._stays] = np.inf
        victims = _least(values, wanted)
        if victims is None:
            raise CapacityError(
                f"{n_slots} experts are needed at once, {self.n_available()} of {self.n_slots} "
                "places are free",
                hint="raise --memory, or lower --ubatch-size",
            )
        for slot in victims:
            self.give_back(slot)
        return [(int(self._stack[slot]), int(self._expert[slot])) for slot in victims]


def _least(values: Floats, n: int) -> Sequence[int] | None:
    if n > len(values):
        return None
    order: NDArray[np.int64] = np.argpartition(values, n - 1)[:n]
    if not np.isfinite(values[order]).all():
        return None
    return [int(slot) for slot in order]
