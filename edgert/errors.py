"""The whole error tree: every error a caller may catch, with a hint and an exit code."""

from __future__ import annotations

from pathlib import Path


class EdgertError(Exception):
    """Base of every error edgert raises on purpose.

    Args:
        message: What went wrong, where, seen against wanted.
        hint: The next command or change to try.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(EdgertError):
    """The request is wrong: a flag, a value, a path that is not there."""

    exit_code = 2


class FormatError(EdgertError):
    """A file is wrong: truncated, inconsistent, of an unknown kind, or it changed while in use."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        offset: int | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        where = [str(path)] if path is not None else []
        where += [f"offset {offset:,}"] if offset is not None else []
        where += [f"tensor {tensor}"] if tensor is not None else []
        super().__init__(f"{', '.join(where)}: {message}" if where else message, hint=hint)
        self.path = Path(path) if path is not None else None
        self.offset = offset
        self.tensor = tensor


class CapacityError(EdgertError):
    """The request does not fit into a memory; both sides are in bytes."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int | None = None,
        available_bytes: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class PlanError(EdgertError):
    """No plan satisfies the goal; the message names every rejected option and its reason."""

    exit_code = 4


class DeviceError(EdgertError):
    """A device is missing or failed."""

    exit_code = 5


class MeasurementError(DeviceError):
    """A rate could not be measured."""


class BackendError(EdgertError):
    """A native library is missing, of the wrong version, or reported a failure."""

    exit_code = 5


class LinkError(EdgertError):
    """A peer could not be reached or broke the protocol.

    Attributes:
        said: Of a reply that it ended, the text so far; None outside of replies.
    """

    exit_code = 6
    said: str | None = None


class LinkTimeout(LinkError):
    """A peer did not answer before its deadline."""


class Cancelled(EdgertError):
    """The caller stopped the work; nothing is wrong."""

    exit_code = 130
