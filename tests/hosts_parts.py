"""Models of several hosts within one process: their parts, joined by links in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgert.errors import EdgertError
from edgert.hosts.allreduce import Exchange, Ring, sums_at_hub, sums_at_spoke
from edgert.hosts.backend import HostsBackend, Sizes
from edgert.hosts.entrance import Entrance
from edgert.hosts.link import Link
from edgert.hosts.memory_link import memory_pair
from edgert.hosts.part_server import PartServer
from edgert.hosts.remote_part import PLAIN, Codecs, RemotePart
from edgert.hosts.route import SharedLayers
from edgert.hosts.stages import Stages
from edgert.llama.lib import load_library
from edgert.llama.open import open_part
from edgert.llama.options import LoadOptions
from edgert.llama.part import PartRunner
from edgert.llama.part_graph import PartRun
from part_models import make_part
from quant.model_spec import ModelSpec, read_model_spec
from quant.parts.cuts import vocabulary_rows
from quant.parts.spec import HeadRows, PartSpec, Share
from quant.tensor_file import open_tensor_file

N_CTX = 256
SIZES = Sizes(N_CTX, 64, 33)


@dataclass
class Hosts:
    """What a test opened, and what went wrong elsewhere."""

    backend: HostsBackend
    links: list[Link]
    runners: list[PartRunner]
    errors: list[EdgertError] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def close(self) -> None:
        """Close everything; the other hosts end by themselves."""
        self.backend.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        for runner in self.runners:
            runner.close()


def options(path: Path, *, to_hidden: bool = False, **others: int) -> LoadOptions:
    """Return the options of a part."""
    return LoadOptions(
        path, n_ctx=N_CTX, n_batch=64, n_ubatch=32, n_threads=1,
        n_logits_max=64 if to_hidden else 33, **others,
    )  # fmt: skip


def shared_layers(
    model: Path, sizes: Sequence[int], folder: Path, *, by_rows: bool = False, ring: bool = False
) -> Hosts:
    """Open a model whose layers are shared out; the first host is home."""
    spec = _spec(model)
    parts = []
    first, n_groups = 0, sum(sizes)
    for index, size in enumerate(sizes):
        share = Share(first, first + size, n_groups)
        rows = HeadRows(*vocabulary_rows(spec.n_vocab, share)) if by_rows else None
        head = rows or ("none" if index else "whole")
        part = PartSpec(0, spec.n_layer, embedding=False, head=head, share=share)
        parts.append(make_part(model, part, folder / f"share-{index}.gguf"))
        first += size
    exchanges = [Exchange() for _ in parts]
    runners = []
    for part, exchange in zip(parts, exchanges, strict=True):
        to_hidden = part.spec.head == "none"
        opened = open_part(
            options(part.file.path, to_hidden=to_hidden),
            PartRun(to_hidden=to_hidden, sum_over_hosts=exchange),
        )
        runners.append(opened)
    pairs = [memory_pair(("home", f"h{i}")) for i in range(1, len(parts))]
    _join(exchanges, pairs, ring=ring)
    widths = [
        part.spec.head.end - part.spec.head.first if isinstance(part.spec.head, HeadRows) else 0
        for part in parts
    ]
    others = [
        RemotePart(here, width, to_hidden=not by_rows)
        for (here, _), width in zip(pairs, widths[1:], strict=True)
    ]
    route = SharedLayers(runners[0], others, spec.n_vocab)
    backend = HostsBackend(Entrance(load_library(), open_tensor_file(model)), route, SIZES, {})
    hosts = Hosts(backend, [here for here, _ in pairs], runners[1:])
    for runner, (_, there) in zip(runners[1:], pairs, strict=True):
        serve(hosts, PartServer(runner, there, spec.n_embd, answers=by_rows))
    return hosts


def stages(
    model: Path,
    parts: Sequence[tuple[PartSpec, bool]],
    folder: Path,
    codecs: Codecs = PLAIN,
) -> Hosts:
    """Open a model whose layers follow each other; each part with whether it is at home."""
    spec = _spec(model)
    route: list[PartRunner | RemotePart] = []
    links, away, servers = [], [], []
    for index, (part, at_home) in enumerate(parts):
        made = make_part(model, part, folder / f"stage-{index}.gguf")
        to_hidden = part.head == "none"
        runner = open_part(
            options(made.file.path, to_hidden=to_hidden), PartRun(to_hidden=to_hidden)
        )
        if at_home:
            route.append(runner)
            continue
        here, there = memory_pair(("home", f"h{index}"))
        width = spec.n_embd if to_hidden else spec.n_vocab
        route.append(RemotePart(here, width, to_hidden=to_hidden, codecs=codecs))
        links.append(here)
        away.append(runner)
        servers.append(
            PartServer(runner, there, spec.n_embd, answers=True, codecs=codecs, listens=True)
        )
    entrance = Entrance(load_library(), open_tensor_file(model))
    hosts = Hosts(
        HostsBackend(entrance, Stages(route, 16, exits=parts[-1][0].is_exit), SIZES, {}),
        links,
        away,
    )
    for server in servers:
        serve(hosts, server)
    return hosts


def serve(hosts: Hosts, server: PartServer) -> None:
    """Have a thread be the other host."""

    def work() -> None:
        try:
            server.serve()
        except EdgertError as error:
            hosts.errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    hosts.threads.append(thread)
    thread.start()


def _join(exchanges: Sequence[Exchange], pairs: Sequence[tuple[Link, Link]], *, ring: bool) -> None:
    if not ring:
        exchanges[0].join(sums_at_hub([here for here, _ in pairs]))
        for exchange, (_, there) in zip(exchanges[1:], pairs, strict=True):
            exchange.join(sums_at_spoke(there, len(exchanges)))
        return
    n = len(exchanges)
    around = [memory_pair((f"h{i}", f"h{(i + 1) % n}")) for i in range(n)]
    for rank, exchange in enumerate(exchanges):
        exchange.join(Ring(rank, n, around[rank - 1][1], around[rank][0]))


def _spec(model: Path) -> ModelSpec:
    return read_model_spec(open_tensor_file(model))
