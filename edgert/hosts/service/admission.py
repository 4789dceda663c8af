"""Who may call, and how much at a time; what failed calls are told and remembered as."""

from __future__ import annotations

import logging
import ssl
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

import grpc

from edgert.errors import CapacityError, EdgertError, FormatError, LinkError
from edgert.hosts.certificates import fingerprint_of
from edgert.hosts.identity import TrustedPeer
from edgert.hosts.service.messages import (
    CLIENT_CERTIFICATE_KEY,
    check_versions,
    clean,
    error_metadata,
    own_versions,
)
from edgert.hosts.service.statuses import code_of

logger = logging.getLogger(__name__)

_MOST_REFUSALS = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: The peer and the address it calls from, for people.
    """

    peer: TrustedPeer
    name: str


class Admission:
    """Knows whom to let in, and counts long calls.

    Args:
        trusted: Who is let in.
        most_calls: Opens, uploads and links at a time.
    """

    def __init__(self, trusted: Sequence[TrustedPeer], most_calls: int) -> None:
        self._peers = {peer.fingerprint: peer for peer in trusted}
        self._most_calls = most_calls
        self._n_calls = 0
        self._is_draining = False
        self._lock = threading.Lock()
        self._refusals: deque[LinkError] = deque(maxlen=_MOST_REFUSALS)

    @property
    def refusals(self) -> tuple[LinkError, ...]:
        """How the last calls that failed ended, oldest first; each names peer and cause."""
        with self._lock:
            return tuple(self._refusals)

    def drain(self) -> None:
        """Let no long call begin any more."""
        with self._lock:
            self._is_draining = True

    @contextmanager
    def admitted(self, method: str, context: grpc.ServicerContext) -> Iterator[Caller]:
        """Find out who calls, and end the call as errors say; `greet` is still to come."""
        origin = unquote(context.peer().partition(":")[2])
        name = clean(origin)
        try:
            peer = self._find(context)
            name = f"{peer.name} ({clean(origin)})"
            check_versions((key, value) for key, value in context.invocation_metadata())
            yield Caller(peer, name)
        except EdgertError as error:
            words = error.message.removeprefix(f"{name}: ")
            logger.warning("%s: %s: %s", name, method, words)
            with self._lock:
                kind = type(error) if isinstance(error, LinkError) else LinkError
                self._refusals.append(kind(f"{name}: {method}: {words}", hint=error.hint))
            context.set_trailing_metadata(error_metadata(error))
            context.abort(code_of(error), f"{type(error).__name__}: {_ascii(words)}")

    def begin(self) -> None:
        """Count a long call, to be ended with `end`.

        Raises:
            CapacityError: there are too many, or the server is about to stop.
        """
        with self._lock:
            if self._is_draining:
                raise CapacityError(
                    "it is about to stop and begins nothing new",
                    hint="try again in a while, or ask another host",
                )
            if self._n_calls >= self._most_calls:
                raise CapacityError(
                    f"{self._n_calls} calls are running, {self._most_calls} at most",
                    hint="try again when another one has ended",
                )
            self._n_calls += 1

    def end(self) -> None:
        """Forget a long call."""
        with self._lock:
            self._n_calls -= 1

    @contextmanager
    def short(self, method: str, context: grpc.ServicerContext) -> Iterator[Caller]:
        """Let a short call in."""
        with self.admitted(method, context) as caller:
            greet(context)
            yield caller

    @contextmanager
    def long(self, method: str, context: grpc.ServicerContext) -> Iterator[Caller]:
        """Let a long call in, and count it while it runs."""
        with self.admitted(method, context) as caller:
            self.begin()
            try:
                greet(context)
                yield caller
            finally:
                self.end()

    def _find(self, context: grpc.ServicerContext) -> TrustedPeer:
        """Return who has proven the key of this connection."""
        shown: Sequence[object] = tuple(context.auth_context().get("x509_pem_cert", ()))
        content = shown[0] if len(shown) == 1 else None
        if not isinstance(content, bytes):
            raise LinkError("no certificate")
        try:
            key = fingerprint_of(_der(content))
        except FormatError as error:
            raise LinkError(error.message, hint=error.hint) from error
        peer = self._trusted(key)
        return self._passed_on(peer, context) if peer.is_gateway else peer

    def _passed_on(self, gateway: TrustedPeer, context: grpc.ServicerContext) -> TrustedPeer:
        """Return who has proven its key to a gateway."""
        shown = [v for k, v in context.invocation_metadata() if k == CLIENT_CERTIFICATE_KEY]
        content = shown[0] if len(shown) == 1 else None
        if not isinstance(content, str):
            raise LinkError(f"{gateway.name} does not say whose call it passes on")
        try:
            key = fingerprint_of(_der(unquote(content).encode("ascii", "replace")))
        except FormatError as error:
            raise LinkError(error.message, hint=error.hint) from error
        peer = self._trusted(key)
        if peer.is_gateway:
            raise LinkError(f"{gateway.name} passes on a call of the gateway {peer.name}")
        return peer

    def _trusted(self, key: str) -> TrustedPeer:
        if key not in self._peers:
            raise LinkError(
                f"key {key} is not trusted",
                hint="edgert keys trust NAME CERTIFICATE.pem, if that host is to be let in",
            )
        return self._peers[key]


def greet(context: grpc.ServicerContext) -> None:
    """Tell a caller that it is let in, and by which version."""
    context.send_initial_metadata(own_versions())


def _der(certificate_pem: bytes) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(certificate_pem.decode("ascii"))
    except ValueError as error:
        raise LinkError("its certificate cannot be read") from error


def _ascii(text: str) -> str:
    return clean(text).encode("ascii", "replace").decode()
