"""Settings of the commands that work with other hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from edgert.cli.flags import count_flag, real_flag, switch_flag, text_flag
from edgert.cli.options import OutputFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """`edgert worker`."""

    listen: Annotated[
        str,
        text_flag(
            "--listen", metavar="ADDRESS:PORT",
            text="Where trusted hosts connect; exchange links use the next port.",
        ),
    ] = "127.0.0.1:7411"  # fmt: skip
    memory: Annotated[
        str | None,
        text_flag(
            "--memory", metavar="SIZE",
            text="Most memory for other hosts' models (default: what is free, minus a margin).",
        ),
    ] = None  # fmt: skip
    manifest: Annotated[
        str | None,
        text_flag("--manifest", metavar="FILE", text="Run this manifest only."),
    ] = None
    host: Annotated[
        str | None,
        text_flag("--host", metavar="NAME", text="This host's name, as keys host made it."),
    ] = None
    sessions: Annotated[int, count_flag("--sessions", text="Most models at a time.")] = 4
    announce: Annotated[
        bool,
        switch_flag("--announce", text="Tell the local network of this worker (multicast DNS)."),
    ] = False
    grace: Annotated[
        float,
        real_flag("--grace", text="Seconds that running work has to end once the worker stops."),
    ] = 10.0
    deadline: Annotated[
        float,
        real_flag(
            "--deadline", least=0.1, most=86400,
            text="Seconds in which home must get on with a step before it counts as gone.",
        ),
    ] = 30.0  # fmt: skip
    keep_session: Annotated[
        float,
        real_flag("--keep-session", text="Seconds that a session stays when its home is gone."),
    ] = 10.0
    shared: Annotated[
        int | None,
        count_flag(
            "--shared", most=63,
            text="Load each part once for so many sessions, whose tokens are computed together "
            "(default: each session has its own copy).",
        ),
    ] = None  # fmt: skip
    positions: Annotated[
        int | None,
        count_flag(
            "--positions",
            text="In the KV cache of a shared part (default: a whole context for each session).",
        ),
    ] = None  # fmt: skip
    key_sessions: Annotated[
        int | None,
        count_flag("--key-sessions", text="Of one key in a shared part (default: no limit)."),
    ] = None
    key_positions: Annotated[
        int | None,
        count_flag(
            "--key-positions", text="Of one key in KV caches of shared parts (default: no limit)."
        ),
    ] = None  # fmt: skip
    key_tokens: Annotated[
        int | None,
        count_flag("--key-tokens", text="Of one key that wait or compute (default: no limit)."),
    ] = None
    gateway: Annotated[
        str | None,
        text_flag(
            "--gateway", metavar="NAME",
            text="A trusted host that passes on calls of others and says whose they are.",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PsOptions:
    """`edgert ps`."""

    hosts: Annotated[
        tuple[str, ...],
        text_flag(
            "--host", metavar="NAME=ADDRESS:PORT",
            text="A host to ask; may be repeated (default: EDGERT_HOSTS).",
        ),
    ] = ()  # fmt: skip
    output: OutputFlags
