"""What gRPC's statuses mean in our errors, and the other way round."""

from __future__ import annotations

import grpc

from edgert.errors import (
    Cancelled,
    CapacityError,
    ConfigError,
    EdgertError,
    FormatError,
    LinkError,
    LinkTimeout,
)
from edgert.hosts.service.messages import ERROR_KEY, clean, told_error

_CODES: tuple[tuple[type[EdgertError], grpc.StatusCode], ...] = (
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (FormatError, grpc.StatusCode.DATA_LOSS),
    (CapacityError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LinkTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
    (LinkError, grpc.StatusCode.ABORTED),
    (Cancelled, grpc.StatusCode.CANCELLED),
)


_OTHER = grpc.StatusCode.FAILED_PRECONDITION


def code_of(error: EdgertError) -> grpc.StatusCode:
    """Return the status of a call that ends with an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), _OTHER)


def is_unreachable(error: grpc.RpcError) -> bool:
    """Whether a call failed without a word of the peer."""
    told = any(item.key == ERROR_KEY for item in error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.UNAVAILABLE and not told


def link_error(error: grpc.RpcError, peer: str, method: str, waited_s: float) -> LinkError:
    """Return what a failed call means, naming peer and cause.

    Args:
        error: As gRPC raised it.
        peer: The peer's name, for people.
        method: What was called.
        waited_s: Its deadline.
    """
    told = told_error((item.key, item.value) for item in error.trailing_metadata() or ())
    if told is not None:
        return LinkError(f"{peer}: {told.message}", hint=told.hint)
    code, said = error.code(), clean(error.details() or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkTimeout(
            f"{peer}: no answer to {method} within {waited_s:g} s",
            hint="it may be busy, or there is no edgert at that address",
        )
    if code is grpc.StatusCode.CANCELLED:
        return LinkError(f"{peer}: {method} was cancelled")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return LinkError(
            f"{peer}: does not know {method}", hint="install the same version of edgert on both"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return LinkError(f"{peer}: the connection failed: {said}", hint="start edgert there again")
    return LinkError(f"{peer}: {method} failed: {code.name.lower().replace('_', ' ')}: {said}")
