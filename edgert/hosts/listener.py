"""Waits for trusted hosts: handshakes in threads of their own, bounded, none blocking another."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from edgert.errors import ConfigError, EdgertError, LinkError, LinkTimeout
from edgert.hosts.address import Address, parse_address
from edgert.hosts.certificates import check_time
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.hello import Terms, own_hello
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.link import DEFAULT_LIMITS, LinkLimits
from edgert.hosts.tls_channel import TlsChannel, set_up_socket, wake
from edgert.hosts.tls_context import claimed_key, proven_key, server_context
from edgert.hosts.tls_link import Greeted, as_link_error, greet_client, left, time_problem

logger = logging.getLogger(__name__)

_MOST_STRANGERS = 16
_MOST_WAITING = 64
_MOST_REFUSALS = 16
_BACKLOG = 64
_PAUSE_S = 0.1


def listen(
    address: str,
    identity: HostIdentity,
    trusted: Sequence[TrustedPeer],
    terms: Terms,
    limits: LinkLimits = DEFAULT_LIMITS,
) -> Listener:
    """Listen for trusted hosts.

    Args:
        address: HOST:PORT; port 0 lets the system choose.
        identity: This host's.
        trusted: Who is let in; at least one.
        terms: What this host is, and wants of those who connect.
        limits: Of their links.

    Raises:
        ConfigError: no address, nobody is trusted, this host's certificate is not valid by its
            clock, or the address cannot be listened on.
    """
    place = parse_address(address)
    if not trusted:
        raise ConfigError(
            f"{place}: nobody is trusted, so nobody could connect",
            hint="edgert keys trust NAME CERTIFICATE.pem",
        )
    check_time(identity.certificate_pem, "this host")
    welcome = _Welcome(identity, trusted, terms, limits)
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        server = socket.create_server(place, family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise ConfigError(
            f"{place}: cannot listen: {reason}", hint="choose an address of this host, a free port"
        ) from error
    return Listener(server, welcome)


class _Welcome:
    """What becomes of one connection; knows whom to let in, keeps nothing of the others."""

    def __init__(
        self,
        identity: HostIdentity,
        trusted: Sequence[TrustedPeer],
        terms: Terms,
        limits: LinkLimits,
    ) -> None:
        self.limits = limits
        self._peers = {peer.fingerprint: peer for peer in trusted}
        self._terms = terms
        self._own = own_hello(terms, identity.name)
        self._context = server_context(identity, [peer.certificate_pem for peer in trusted])
        self._claims: dict[int, str | None] = {}
        self._context.sni_callback = self._note_claim

    def wrap(self, link: socket.socket) -> ssl.SSLSocket:
        """Prepare a connection for its handshake."""
        set_up_socket(link, self.limits.deadline_s)
        return self._context.wrap_socket(link, server_side=True, do_handshake_on_connect=False)

    def greet(self, link: ssl.SSLSocket, origin: str) -> Greeted:
        """Do the handshake and the greeting.

        Raises:
            LinkError: refused, for the reason it names.
            LinkTimeout: not done in time.
        """
        until_s = time.monotonic() + self.limits.handshake_s
        try:
            link.settimeout(left(until_s))
            link.do_handshake()
            key = proven_key(link)
        except (OSError, ValueError, EdgertError) as error:
            link.close()
            raise self._refusal(error, origin, self._claims.get(id(link))) from error
        finally:
            self._claims.pop(id(link), None)
        peer = self._peers.get(key)
        name = origin if peer is None else f"{peer.name} ({origin})"
        framed = FramedLink(TlsChannel(link), name, self.limits)
        if peer is None:  # a trusted key has signed its certificate
            framed.fail(LinkError(f"key {key} is not trusted"))
            raise LinkError(f"{origin}: key {key} is not trusted", hint=_trust_hint())
        hello = greet_client(framed, peer, self._own, self._terms, until_s)
        return Greeted(framed, peer, hello)

    def _note_claim(
        self, link: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext
    ) -> None:
        self._claims[id(link)] = claimed_key(name)

    def _refusal(self, error: Exception, origin: str, claim: str | None) -> LinkError:
        if not isinstance(error, ssl.SSLCertVerificationError):
            return as_link_error(error, origin)
        known = self._peers.get(claim or "")
        problem = time_problem(error, known.certificate_pem, known.name) if known else ""
        if problem:
            return LinkError(f"{origin}: {problem}", hint="compare the clocks of both hosts")
        key = "its key" if claim is None else f"key {claim}, as it says,"
        return LinkError(
            f"{origin}: {key} is not trusted ({error.verify_message})", hint=_trust_hint()
        )


class Listener:
    """Lets trusted hosts in; made by `listen`."""

    def __init__(self, server: socket.socket, welcome: _Welcome) -> None:
        self._server = server
        self._welcome = welcome
        self._lock = threading.Lock()
        self._strangers: dict[int, ssl.SSLSocket] = {}
        self._refusals: deque[LinkError] = deque(maxlen=_MOST_REFUSALS)
        self._ready: queue.Queue[Greeted | None] = queue.Queue(_MOST_WAITING)
        self._closed = threading.Event()
        host, port = server.getsockname()[:2]
        self.address = str(Address(host, port))
        self._thread = threading.Thread(target=self._take, name="link-listener", daemon=True)
        self._thread.start()

    @property
    def refusals(self) -> tuple[LinkError, ...]:
        """Why the last peers were refused, oldest first."""
        with self._lock:
            return tuple(self._refusals)

    def accept(self, deadline_s: float | None = None) -> Greeted:
        """Wait for the next trusted host.

        Args:
            deadline_s: Seconds (default: the links').

        Raises:
            LinkError: the listener is closed.
            LinkTimeout: none came; names the last refusal.
        """
        wait_s = self._welcome.limits.deadline_s if deadline_s is None else deadline_s
        try:
            greeted = self._ready.get(timeout=min(wait_s, threading.TIMEOUT_MAX))
        except queue.Empty:
            last = self.refusals[-1:]
            refused = f"; refused last: {last[0].message}" if last else ""
            raise LinkTimeout(
                f"{self.address}: no host within {wait_s:g} s{refused}",
                hint=last[0].hint if last else "start edgert on the other host",
            ) from None
        if greeted is None:
            self._pass_on()
            raise LinkError(f"{self.address}: the listener is closed")
        return greeted

    def close(self) -> None:
        """Let nobody in any more; accepted links stay."""
        if self._closed.is_set():
            return
        self._closed.set()
        wake(self._server)
        self._thread.join()
        self._server.close()
        with self._lock:
            for stranger in self._strangers.values():
                wake(stranger)
        with suppress(queue.Empty):
            while True:
                waiting = self._ready.get_nowait()
                if waiting is not None:
                    waiting.link.close()
        self._pass_on()

    def _pass_on(self) -> None:
        """Wake the next one who waits in `accept`, after the listener was closed."""
        with suppress(queue.Full):
            self._ready.put_nowait(None)

    def _take(self) -> None:
        """Take connections; each has a thread until it is known."""
        while not self._closed.is_set():
            try:
                plain, origin = self._server.accept()
            except OSError as error:
                if not self._closed.wait(_PAUSE_S):
                    logger.warning("%s: cannot accept: %s", self.address, error)
                continue
            try:
                link = self._welcome.wrap(plain)
            except (OSError, ValueError) as error:  # it left already
                plain.close()
                logger.debug("%s: %s", origin[0], error)
                continue
            self._make_room()
            with self._lock:
                self._strangers[id(link)] = link
            name = str(Address(*origin[:2]))
            thread = threading.Thread(
                target=self._meet, args=(link, name), name="link-handshake", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # the system gives no more threads
                logger.warning("%s: refused: %s: %s", self.address, name, error)
                with self._lock:
                    self._strangers.pop(id(link), None)
                link.close()

    def _make_room(self) -> None:
        """End the handshake that takes longest, where strangers are too many."""
        with self._lock:
            if len(self._strangers) >= _MOST_STRANGERS:
                wake(self._strangers.pop(next(iter(self._strangers))))

    def _meet(self, link: ssl.SSLSocket, origin: str) -> None:
        try:
            greeted = self._welcome.greet(link, origin)
        except LinkError as error:
            logger.warning("%s: refused: %s", self.address, error.message)
            with self._lock:
                self._refusals.append(error)
            return
        finally:
            with self._lock:
                self._strangers.pop(id(link), None)
        if self._closed.is_set():
            greeted.link.close()
            return
        try:
            self._ready.put_nowait(greeted)
        except queue.Full:
            greeted.link.fail(LinkError("too many hosts wait to be let in"))


def _trust_hint() -> str:
    return "edgert keys trust NAME CERTIFICATE.pem, if that host is to be let in"
