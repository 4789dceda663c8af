"""What a reply was made with: which hosts, in which precision, and the bytes that went and came."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgert.units import format_bytes


@dataclass(frozen=True, slots=True)
class HostUse:
    """What a host other than home computed, and what went over the links to it.

    Attributes:
        host: Its name.
        has: Which part of the model.
        precision: Formats of its weights, most bytes first.
        codec_there: How hidden states went there.
        codec_back: How they came back; "logits" where these came.
        sent_bytes: To it, frames counted whole.
        received_bytes: From it.
    """

    host: str
    has: str
    precision: tuple[str, ...] = ()
    codec_there: str = "f32"
    codec_back: str = "f32"
    sent_bytes: int = 0
    received_bytes: int = 0

    def plus(self, sent_bytes: int, received_bytes: int) -> HostUse:
        """Return it with more bytes; less where they are negative."""
        return replace(
            self,
            sent_bytes=self.sent_bytes + sent_bytes,
            received_bytes=self.received_bytes + received_bytes,
        )


@dataclass(frozen=True, slots=True)
class Receipt:
    """Of one reply; of all of them so far in a backend's counters.

    Attributes:
        cache_types: Of keys and values.
        hosts: Other hosts that were used, a part each.
        fallback: Why home went on alone, None where it did not.
    """

    cache_types: str = "f16/f16"
    hosts: tuple[HostUse, ...] = ()
    fallback: str | None = None

    @property
    def sent_bytes(self) -> int:
        """To all other hosts."""
        return sum(use.sent_bytes for use in self.hosts)

    @property
    def received_bytes(self) -> int:
        """From all other hosts."""
        return sum(use.received_bytes for use in self.hosts)

    def since(self, before: Receipt | None) -> Receipt:
        """Return what was added after `before`; None is the beginning.

        Hosts that nothing went to since then are left out once home went on alone.
        """
        earlier = () if before is None else before.hosts
        hosts = [
            use.plus(-earlier[i].sent_bytes, -earlier[i].received_bytes)
            if i < len(earlier)
            else use
            for i, use in enumerate(self.hosts)
        ]
        if self.fallback is not None:
            hosts = [use for use in hosts if use.sent_bytes or use.received_bytes]
        return replace(self, hosts=tuple(hosts))

    def describe(self) -> str | None:
        """Return it in words for a person; None where nothing left home."""
        parts = []
        for use in self.hosts:
            codecs = use.codec_there
            codecs += "" if use.codec_back == use.codec_there else f", back {use.codec_back}"
            parts.append(
                f"{use.host}: {use.has}, sent {format_bytes(use.sent_bytes)}, received "
                f"{format_bytes(use.received_bytes)} ({codecs})"
            )
        parts += [] if self.fallback is None else ["went on at home alone"]
        return "; ".join(parts) if parts else None


def as_row(receipt: Receipt | None) -> dict[str, object]:
    """Return a receipt for JSON."""
    found = receipt or Receipt()
    return {
        "sent_bytes": found.sent_bytes,
        "received_bytes": found.received_bytes,
        "cache_types": found.cache_types,
        "fallback": found.fallback,
        "hosts": [
            {
                "host": use.host, "has": use.has, "precision": list(use.precision),
                "codec_there": use.codec_there, "codec_back": use.codec_back,
                "sent_bytes": use.sent_bytes, "received_bytes": use.received_bytes,
            }
            for use in found.hosts
        ],
    }  # fmt: skip
