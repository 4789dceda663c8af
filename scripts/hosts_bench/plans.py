"""Manifests of hosts that share every layer: their groups as wanted, the rest as planned."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import edgert
from devices.discover import fingerprint
from devices.profile import Figure, HostProfile, KernelRate, Rate
from devices.topology import LinkProfile, Topology
from edgert.cli.this_host import Asked, heads_of, this_host, types_of
from edgert.config import directories
from edgert.llama.build import kernel_build
from edgert.model_files import FileHashes
from partition.bind import bind
from partition.goal import ALL_ABILITIES, Goal
from partition.language_workload import describe_language
from partition.manifest import Manifest, ModelFile, ModelIdentity
from partition.plan import Plan
from partition.popularity import Popularity
from partition.reasons import what_binds
from partition.tensor_candidates import tensor_candidates
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

N_CTX = 512
_N_PROMPT = 16
_N_UBATCH = 128
_LOOPBACK = (60e-6, 1.5e9)  # of a link that nobody measured: seconds there and back, bytes a second


@dataclass(frozen=True, slots=True)
class Wanted:
    """A split.

    Attributes:
        model: File.
        shares: How the groups of KV heads are shared out, in proportion; home's first.
        memory_bytes: Of each host.
        by_rows: Whether the output is shared out too.
        link: Round trip in seconds and bytes a second between home and each host, if measured.
    """

    model: Path
    shares: tuple[int, ...]
    memory_bytes: int
    by_rows: bool = False
    link: tuple[float, float] = _LOOPBACK


def host_ids(n_hosts: int) -> list[str]:
    """Name hosts; home is the first."""
    return [f"h{index}" for index in range(n_hosts)]


def known_profile(model: Path, home: Path) -> HostProfile:
    """Return this host with one thread: as measured with EDGERT_HOME `home`, or assumed."""
    file = open_tensor_file(model)
    heads = heads_of(read_model_spec(file))
    env = {**os.environ, "EDGERT_HOME": str(home)}
    asked = Asked(file.path, types_of(file), 1, list_runtimes=False, heads=heads)
    found = this_host(asked, directories(env), env)
    return found.model_copy(update={"fingerprint": fingerprint(kernel_build(), 1)})


def split_manifest(wanted: Wanted, profile: HostProfile, hashes: FileHashes) -> Manifest:
    """Plan a model over equal hosts with the groups that are wanted.

    Shares that are not equal are got by telling the planner of hosts as unequal; what it predicts
    counts for equal ones only.

    Raises:
        SystemExit: the planner finds no such way.
    """
    file = open_tensor_file(wanted.model)
    workload = describe_language(file, read_model_spec(file))
    may_leave = ("hidden_states", "logits") if wanted.by_rows else ("hidden_states",)
    goal = Goal(
        n_prompt=_N_PROMPT, n_ctx=N_CTX, ubatches=(_N_UBATCH,), abilities=ALL_ABILITIES,
        may_leave=may_leave,
    )  # fmt: skip
    topology = _topology(wanted, profile)
    found, rejected = tensor_candidates(workload, topology, goal, Popularity())
    for candidate in found:
        shares = [stage.share for stage in candidate.stages if stage.share is not None]
        groups = [share.end_group - share.first_group for share in shares]
        n_groups = shares[0].n_groups
        is_wanted = groups == [part * n_groups // sum(wanted.shares) for part in wanted.shares]
        if is_wanted and (candidate.heads > 1) == wanted.by_rows:
            break
    else:
        ways = [candidate.name for candidate in found]
        raise SystemExit(f"no plan shares {wanted.shares}: {ways}, {[r.reason for r in rejected]}")
    plan = Plan(
        goal=goal, topology=topology, chosen=candidate, others=(), plain=(),
        binds=what_binds(candidate), reasons=(), rejected=(), warnings=(),
    )  # fmt: skip
    spec = workload.spec
    model = ModelIdentity(
        format="gguf", name=spec.name, architecture=spec.architecture,
        n_layer=len(workload.run_layers), weight_bytes=spec.weight_bytes,
        files=(
            ModelFile(
                path=wanted.model.name, size_bytes=wanted.model.stat().st_size,
                sha256=hashes.of(wanted.model),
            ),
        ),
    )  # fmt: skip
    return bind(plan, model, edgert.__version__)


def groups_of(manifest: Manifest) -> str:
    """Describe the shares of a manifest."""
    shares = [stage.share for stage in manifest.stages if stage.share is not None]
    return ":".join(str(s.end_group - s.first_group) for s in shares) + " groups"


def _topology(wanted: Wanted, profile: HostProfile) -> Topology:
    names = host_ids(len(wanted.shares))
    most = max(wanted.shares)
    hosts = tuple(
        _host(name, profile, share / most, wanted.memory_bytes)
        for name, share in zip(names, wanted.shares, strict=True)
    )
    pairs = [(a, b) for name in names[1:] for a, b in ((names[0], name), (name, names[0]))]
    return Topology(home=names[0], hosts=hosts, links=_links(pairs, wanted.link))


def _links(pairs: Sequence[tuple[str, str]], link: tuple[float, float]) -> tuple[LinkProfile, ...]:
    return tuple(
        LinkProfile(
            source=source, target=target, kind="loopback",
            round_trip_s=Figure(value=link[0], origin="measured"),
            bytes_per_s=Rate(value=link[1], origin="measured"),
        )
        for source, target in pairs
    )  # fmt: skip


def _host(name: str, profile: HostProfile, speed: float, memory_bytes: int) -> HostProfile:
    cpu = next(device for device in profile.devices if device.kind == "cpu")
    kernels = tuple(_slowed(kernel, speed) for kernel in cpu.kernels)
    pools = tuple(
        pool.model_copy(update={"available_bytes": memory_bytes})
        for pool in profile.pools
        if pool.pool_id == cpu.pool_id
    )
    devices = (cpu.model_copy(update={"kernels": kernels}),)
    return profile.model_copy(
        update={"host_id": name, "name": name, "devices": devices, "pools": pools}
    )


def _slowed(kernel: KernelRate, speed: float) -> KernelRate:
    rate = kernel.matvec_bytes_per_s
    slow = rate.model_copy(update={"value": speed * rate.value})
    return kernel.model_copy(update={"matvec_bytes_per_s": slow})
