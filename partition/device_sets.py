"""Which sets of devices a chain may have used; of devices that are alike, the first comes first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgert.errors import PlanError
from partition.problem import Problem

MOST_SETS = 4096  # 12 devices that all differ; tables grow with this


@dataclass(frozen=True, slots=True)
class DeviceSets:
    """Reachable sets, smaller ones first; set 0 is empty.

    Attributes:
        members: (n_sets, n_devices), whether a device is in a set.
        allowed: (n_sets, n_devices), whether a device may come next.
        larger: (n_sets, n_devices), the set with that device added; 0 where it may not be.
    """

    members: NDArray[np.bool_]
    allowed: NDArray[np.bool_]
    larger: NDArray[np.intp]


def device_sets(problem: Problem) -> DeviceSets:
    """List the sets of devices that need to be looked at.

    Raises:
        PlanError: there are too many.
    """
    befores = [_alike_before(problem, index) for index in range(len(problem.devices))]
    found: dict[frozenset[int], int] = {frozenset(): 0}
    queue = [frozenset[int]()]
    steps: list[tuple[int, int, int]] = []
    for used in queue:  # grows while it is read
        for device, before in enumerate(befores):
            if device in used or (before is not None and before not in used):
                continue
            larger = used | {device}
            if larger not in found:
                found[larger] = len(queue)
                queue.append(larger)
                if len(queue) > MOST_SETS:
                    raise PlanError(
                        f"{len(befores)} devices can be combined in more than {MOST_SETS} ways",
                        hint="leave out some devices",
                    )
            steps.append((found[used], device, found[larger]))
    members = np.zeros((len(queue), len(befores)), dtype=np.bool_)
    allowed = np.zeros_like(members)
    next_set = np.zeros(members.shape, dtype=np.intp)
    for index, device, larger_index in steps:
        allowed[index, device] = True
        next_set[index, device] = larger_index
        members[larger_index] |= members[index]
        members[larger_index, device] = True
    return DeviceSets(members, allowed, next_set)


def _alike_before(problem: Problem, device: int) -> int | None:
    """Return the nearest earlier device that could be swapped with this one."""
    for other in range(device - 1, -1, -1):
        if _alike(problem, other, device):
            return other
    return None


def _alike(problem: Problem, a: int, b: int) -> bool:
    one, other = problem.devices[a], problem.devices[b]
    if one != replace(other, name=one.name, pool=one.pool):
        return False
    users = [device.pool for device in problem.devices]
    alone = users.count(one.pool) == users.count(other.pool) == 1
    same_size = problem.pool_bytes[one.pool] == problem.pool_bytes[other.pool]
    if one.pool != other.pool and not (alone and same_size):
        return False
    hops = problem.hops
    return (
        problem.first_hops[a] == problem.first_hops[b]
        and problem.last_hops[a] == problem.last_hops[b]
        and hops.get((a, b)) == hops.get((b, a))
        and all(
            hops.get((a, c)) == hops.get((b, c)) and hops.get((c, a)) == hops.get((c, b))
            for c in range(len(problem.devices))
            if c not in (a, b)
        )
    )
