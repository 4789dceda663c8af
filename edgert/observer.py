"""What may watch a model being opened and run: the protocol, and one that watches nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edgert.llama.backend import Backend


class ReadWatch(Protocol):
    """Watches one read; called by the threads that read."""

    def began(self) -> None:
        """A part of the bytes is being read from now on; called once for each part."""
        ...

    def ended(self) -> None:
        """Every byte is there."""
        ...


class RunObserver(Protocol):
    """Told what moves, what waits and what was opened. Times are those of `time.perf_counter`."""

    def reading(self, name: str, n_bytes: int) -> ReadWatch:
        """Watch a read of a weight that is about to be asked for."""
        ...

    def waited(self, name: str, started_s: float, ended_s: float) -> None:
        """Hear that a weight was not there when it was needed."""
        ...

    def heard(self, line: str) -> None:
        """Hear what the native library says while the model is being opened."""
        ...

    def opened(self, backend: Backend) -> Backend:
        """Return the backend to use in place of the one that was opened."""
        ...


class Unobserved:
    """The observer and watch of runs that nobody watches."""

    def reading(self, name: str, n_bytes: int) -> ReadWatch:
        """Watch nothing."""
        del name, n_bytes
        return self

    def began(self) -> None:
        """Do nothing."""

    def ended(self) -> None:
        """Do nothing."""

    def waited(self, name: str, started_s: float, ended_s: float) -> None:
        """Do nothing."""

    def heard(self, line: str) -> None:
        """Do nothing."""

    def opened(self, backend: Backend) -> Backend:
        """Return the backend itself."""
        return backend


UNOBSERVED = Unobserved()
