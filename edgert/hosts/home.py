"""Opens a model over several hosts from home: sends parts, opens sessions, joins the links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import PlanError
from edgert.events import Listener, Notice
from edgert.hosts.allreduce import Exchange, sums_at_hub
from edgert.hosts.backend import HostsBackend, Sizes
from edgert.hosts.entrance import Entrance
from edgert.hosts.host_session import HostSession, PartReach, Peer
from edgert.hosts.lasting_part import LastingPart
from edgert.hosts.remote_part import RemotePart
from edgert.hosts.route import Route, SharedLayers
from edgert.hosts.stage_parts import StagePart, n_embd
from edgert.hosts.stages import Stages
from edgert.llama.lib import load_library
from edgert.llama.part import PartRunner
from edgert.receipt import HostUse, Receipt
from partition.manifest import Manifest
from quant.activations.settings import CodecSettings
from quant.tensor_file import open_tensor_file


@dataclass(frozen=True, slots=True)
class HomeParts:
    """What home has prepared.

    Attributes:
        manifest: Valid; home is among its hosts.
        entrance: File with embeddings and tokenizer: the model, or its entrance part.
        parts: Of every stage, in the order in which a token passes them, with its host.
    """

    manifest: Manifest
    entrance: Path
    parts: Sequence[tuple[str, StagePart]]


def open_home(
    prepared: HomeParts,
    peers: Mapping[str, Peer],
    listener: Listener,
) -> HostsBackend:
    """Open a model over this host and others.

    Args:
        prepared: Files and stages.
        peers: The other hosts, by id.
        listener: Hears what happens.

    Raises:
        LinkError: a host cannot be reached or refuses, with its name and cause.
        PlanError: the manifest's stages cannot be joined.
        CapacityError: home has too little memory.
    """
    home = prepared.manifest.policies.home
    with ExitStack() as stack:
        sessions = {name: HostSession(peer, name, listener) for name, peer in peers.items()}
        for session in sessions.values():
            stack.callback(session.close)
        exchange = Exchange()
        here: dict[int, PartRunner] = {}
        # Others read their parts while home reads its own.
        with ThreadPoolExecutor(max(1, len(peers))) as pool:
            opening = [pool.submit(session.open) for session in sessions.values()]
            for index, (host_id, part) in enumerate(prepared.parts):
                if host_id == home:
                    here[index] = part.open(exchange)
                    stack.callback(here[index].close)
            for future in opening:
                future.result()
        away = {
            index: _attach(sessions[host_id], prepared, part, stack)
            for index, (host_id, part) in enumerate(prepared.parts)
            if host_id != home
        }
        entrance = Entrance(load_library(), open_tensor_file(prepared.entrance))
        stack.callback(entrance.close)
        route = _route(prepared, here, away, exchange)
        listener(Notice(_describe(prepared)))
        resources = stack.pop_all()
    run = prepared.manifest.run
    sizes = Sizes(run.n_ctx, run.n_batch, run.n_logits_max)
    shown = {"hosts": _describe(prepared)}
    return HostsBackend(entrance, route, sizes, shown, _receipt(prepared), resources)


def _receipt(prepared: HomeParts) -> Receipt:
    """Say what the other hosts are used for, before anything went to them."""
    manifest = prepared.manifest
    return Receipt(
        f"{manifest.run.cache_type_k}/{manifest.run.cache_type_v}",
        tuple(
            HostUse(
                host_id,
                part.part.spec.describe(),
                tuple(sorted(part.stage.precision, key=lambda name: -part.stage.precision[name])),
                _named(part.codecs.there),
                _named(part.codecs.back) if part.to_hidden else "logits",
            )
            for host_id, part in prepared.parts
            if host_id != manifest.policies.home
        ),
    )


def _named(codec: CodecSettings) -> str:
    return f"adaptive:{codec.bound:g}" if codec.kind == "adaptive" else codec.kind


def _attach(
    session: HostSession, prepared: HomeParts, part: StagePart, stack: ExitStack
) -> RemotePart | LastingPart:
    name = part.stage.stage_id + ("/exit" if part.part.spec.is_exit else "")
    link, _ = session.attach(name)
    remote = RemotePart(link, part.width, to_hidden=part.to_hidden, codecs=part.codecs)
    if part.stage.share is not None:
        stack.callback(link.close)
        return remote
    lasting = LastingPart(
        remote,
        n_embd(part.part.file),
        prepared.manifest.run.n_ubatch,
        PartReach(session, name),
        listener=session.listener,
    )
    stack.callback(lasting.close)
    return lasting


def _route(
    prepared: HomeParts,
    here: Mapping[int, PartRunner],
    away: Mapping[int, RemotePart | LastingPart],
    exchange: Exchange,
) -> Route:
    stages = prepared.manifest.stages
    parts = [here.get(i) or away[i] for i in range(len(prepared.parts))]
    if all(stage.share is None for stage in stages):
        _, last = prepared.parts[-1]
        exits = last.part.spec.is_exit and isinstance(parts[-1], PartRunner)
        return Stages(parts, prepared.manifest.run.n_ubatch, exits=exits)
    first = parts[0]
    if not isinstance(first, PartRunner) or len(here) != 1 or len(stages) != len(parts):
        raise PlanError(
            "where layers are shared, home has the first share of all layers and is the hub",
            hint="plan again: edgert plan MODEL --topology FILE",
        )
    others = [part for part in parts[1:] if isinstance(part, RemotePart)]
    exchange.join(sums_at_hub([part.link for part in others]))
    return SharedLayers(first, others, prepared.parts[0][1].part.n_vocab)


def _describe(prepared: HomeParts) -> str:
    lines = [f"{host_id}: {part.part.spec.describe()}" for host_id, part in prepared.parts]
    return "; ".join(lines)
