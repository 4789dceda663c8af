"""The best placement of a problem, or why there is none."""

from __future__ import annotations

from partition.bounded_search import bounded_search
from partition.chain_search import chain_search, separable
from partition.infeasible import why_infeasible
from partition.problem import Placement, Problem


def search(problem: Problem) -> Placement:
    """Find the placement whose objective is least under the ceilings.

    Where no two devices share a memory and there are no ceilings, one dynamic programme settles it,
    ties included. Everything else is branch and bound, which is also faster than trying everything
    for the smallest problems.

    Raises:
        PlanError: nothing satisfies the problem; the message lists what was rejected and why.
    """
    found = chain_search(problem) if separable(problem) else bounded_search(problem)
    if found is None:
        raise why_infeasible(problem)
    return found
