"""Hosts that were given up are asked for nothing: their parts at home are freed."""

from __future__ import annotations

from typing import Any

import pytest

from edgert.errors import LinkError
from edgert.hosts.backend import HostsBackend, Sizes


class FreedRoute:
    """A route whose parts must not be touched once it is closed."""

    def __init__(self) -> None:
        self.is_closed = False

    @property
    def here(self) -> FreedRoute:
        return self

    def close(self) -> None:
        self.is_closed = True

    def can_shift(self) -> bool:
        assert not self.is_closed
        return True

    def order(self, order: object) -> None:
        del order
        assert not self.is_closed

    def cancel(self) -> None:
        return


def test_parts_that_were_freed_are_not_touched_again() -> None:
    route: Any = FreedRoute()
    entrance: Any = None
    hosts = HostsBackend(entrance, route, Sizes(8, 8, 8), {})
    assert hosts.can_shift()
    hosts.truncate(0)
    hosts.give_up()
    assert not hosts.can_shift()
    hosts.truncate(0)
    hosts.shift(0, 1)
    with pytest.raises(LinkError, match="given up"):
        hosts.decode([1], 0, 1)
