"""From a manifest to what llama.cpp is asked for: checked against this host, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from devices.discover import fingerprint
from devices.host import available_bytes
from edgert.embedded import EMBEDDED, embedded_path
from edgert.errors import CapacityError, ConfigError, FormatError, PlanError
from edgert.events import Listener, ignore
from edgert.experts.routing import RoutingListener
from edgert.fallback_manifest import read_fallback
from edgert.host_deployment import HostsAsk, HostsDeployment, deploy_hosts
from edgert.hosts.fallback import FallbackBackend
from edgert.hosts.stage_parts import stage_bytes
from edgert.llama.backend import Backend
from edgert.llama.build import kernel_build
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions, Placement
from edgert.model_files import FileHashes, locate, paths_of
from edgert.model_match import check_model
from edgert.observer import UNOBSERVED, RunObserver
from partition.manifest import RUNTIME_ABILITIES, Device, Manifest, Stage
from quant.tensor_file import TensorFile, open_tensor_file

_REPLAN = "make a new one for this host: --replan, or edgert plan"


@dataclass(frozen=True, slots=True)
class Deployment:
    """A manifest that this host can execute.

    Attributes:
        manifest: What was decided.
        model: First file of the model.
        options: For `edgert.llama.open`; of several hosts, those of home.
        hosts: Where several hosts run it.
        fallback: Of home alone, where the manifest has one for when another host is gone.
    """

    manifest: Manifest
    model: Path
    options: LoadOptions
    hosts: HostsDeployment | None = None
    fallback: Deployment | None = None

    def open(
        self,
        listener: Listener = ignore,
        file: TensorFile | None = None,
        observer: RunObserver = UNOBSERVED,
        routing: RoutingListener | None = None,
    ) -> Backend:
        """Open the model as the manifest says; see `open_backend`.

        Raises:
            LinkError: another host cannot be reached, or refuses.
        """
        if self.hosts is None:
            return open_backend(self.options, listener, file, observer, routing)
        if routing is not None:
            raise ConfigError(
                "what routers choose is recorded on one host only", hint="leave it out"
            )
        backend = self.hosts.open(listener)
        if self.fallback is None:
            return observer.opened(backend)
        alone = partial(self.fallback.open, listener)
        return observer.opened(FallbackBackend(backend, alone, listener))


def deploy(
    manifest: Manifest,
    path: Path,
    model: Path | None = None,
    hashes: FileHashes | None = None,
    packed_folder: Path | None = None,
    hosts: HostsAsk | None = None,
) -> Deployment:
    """Check everything that a manifest promises against this host and the model's bytes.

    Args:
        manifest: Read from `path`, its rules and signature checked.
        path: Its file; the model's paths are relative to its folder.
        model: Where the model is instead.
        hashes: Remembered hashes of files.
        packed_folder: Where packed copies are kept.
        hosts: How the other hosts of a manifest are reached; None where it may have none.

    Raises:
        PlanError: it needs what this runtime cannot do, or was made for other hardware.
        ConfigError: the model is not there.
        FormatError: the model is another one.
        CapacityError: this host has less memory left than the plan takes.
    """
    check_abilities(manifest)
    if len(manifest.stages) > 1 or len(manifest.hosts) > 1:
        return _deploy_hosts((manifest, path), model, hashes, packed_folder, hosts)
    stage = manifest.stages[0]
    device = check_fingerprint(manifest, stage)
    files = locate(manifest, path, model or embedded_model(manifest, path), hashes)
    file = open_shards(files)
    check_model(manifest, file)
    limit_bytes = manifest.pool_of(stage).limit_bytes
    pinned_bytes = sum(file.by_name[name].size_bytes for name in stage.tiers.pinned)
    check_memory(manifest, limit_bytes, pinned_bytes)
    experts = stage.tiers.experts if stage.is_nested else None
    options = LoadOptions(
        model=files[0],
        memory_bytes=limit_bytes,
        n_ctx=manifest.run.n_ctx,
        n_batch=manifest.run.n_batch,
        n_ubatch=manifest.run.n_ubatch,
        n_logits_max=manifest.run.n_logits_max,
        n_threads=device.n_threads,
        n_threads_batch=device.n_threads_batch,
        type_k=manifest.run.cache_type_k,
        type_v=manifest.run.cache_type_v,
        placement=placement_of(stage),
        expert_bits=() if experts is None else experts.bits,
        expert_cuts=() if experts is None else experts.cuts,
        packed_folder=packed_folder,
        policy_folder=None if packed_folder is None else packed_folder.parent / "experts",
    )
    return Deployment(manifest, files[0], options)


def _deploy_hosts(
    read: tuple[Manifest, Path],
    model: Path | None,
    hashes: FileHashes | None,
    packed_folder: Path | None,
    ask: HostsAsk | None,
) -> Deployment:
    """Check home's part of a manifest of several hosts, and prepare the others'."""
    manifest, path = read
    if ask is None:
        raise PlanError(
            "the manifest has several hosts, and none may be reached from here",
            hint="run it with edgert chat, run or bench --manifest",
        )
    for stage in manifest.stages:
        if stage.host_id == manifest.policies.home:
            check_stage(manifest, stage)
    files = locate(manifest, path, model or embedded_model(manifest, path), hashes)
    variants = [
        open_shards(paths_of(manifest, files, index)) for index in range(len(manifest.variants))
    ]
    check_model(manifest, open_shards(paths_of(manifest, files)), variants)
    prepared = deploy_hosts(manifest, files, ask)
    _check_kept(manifest, prepared.kept_bytes)
    named = read_fallback(manifest, path)
    # Its memory is home's part's, which is given back before.
    fallback = None if named is None else deploy(*named, model, hashes, packed_folder)
    return Deployment(manifest, files[0], LoadOptions(files[0]), prepared, fallback)


def check_stage(manifest: Manifest, stage: Stage) -> None:
    """Refuse a stage that was planned for other hardware than this host, or more memory.

    Raises:
        PlanError: other hardware, kernels or threads.
        CapacityError: this host has less memory left than the stage takes.
    """
    check_fingerprint(manifest, stage)
    free_bytes, reason = available_bytes()
    mine = free_bytes + int(psutil.Process().memory_info().rss)
    needed = stage_bytes(stage)
    if mine < needed:
        raise CapacityError(
            f"stage {stage.stage_id} takes {needed:,} bytes, {mine:,} are left ({reason})",
            needed_bytes=needed,
            available_bytes=mine,
            hint=f"close other programs, or {_REPLAN}",
        )


def _check_kept(manifest: Manifest, kept_bytes: int) -> None:
    """Refuse where home's stages fit, and what it keeps of what it sent does not beside them."""
    free_bytes, reason = available_bytes()
    mine = free_bytes + int(psutil.Process().memory_info().rss)
    home = manifest.policies.home
    needed = kept_bytes + sum(stage_bytes(s) for s in manifest.stages if s.host_id == home)
    if mine < needed:
        raise CapacityError(
            f"home takes {needed:,} bytes, {kept_bytes:,} of them to fill the cache of a host "
            f"that was lost; {mine:,} are left ({reason})",
            needed_bytes=needed,
            available_bytes=mine,
            hint="close other programs, or plan with a smaller -c",
        )


def check_abilities(manifest: Manifest) -> None:
    """Refuse what this runtime cannot do; PlanError names it and the stages that want it."""
    missing = sorted(set(manifest.requires) - RUNTIME_ABILITIES)
    if missing:
        stages = ", ".join(_describe(stage) for stage in manifest.stages)
        wanted = ", ".join(missing)
        raise PlanError(
            f"this runtime cannot execute the manifest: it needs {wanted} ({stages})",
            hint="plan for this host alone: edgert plan MODEL",
        )


def check_fingerprint(manifest: Manifest, stage: Stage) -> Device:
    """Refuse a stage planned for other hardware, kernels or threads; return its device."""
    host = manifest.host_of(stage)
    device = manifest.device_of(stage)
    here = fingerprint(kernel_build(), device.n_threads)
    path = f"$.hosts[{manifest.hosts.index(host)}].fingerprint"
    if host.fingerprint is None:
        raise PlanError(
            f"{path}: none, the manifest was made for {host.name}, which was "
            "described and not measured",
            hint=_REPLAN,
        )
    if host.fingerprint != here:
        raise PlanError(
            f"{path}: {host.fingerprint}, this host is {here}: other hardware, "
            "other kernels or another number of threads than the plan was made for",
            hint=_REPLAN,
        )
    return device


def check_memory(manifest: Manifest, limit_bytes: int, pinned_bytes: int) -> None:
    """Refuse a plan that takes more memory than this process may still have.

    Args:
        manifest: What is to be executed.
        limit_bytes: The bound on the process that it names.
        pinned_bytes: Weights of the model that it pins.
    """
    free_bytes, reason = available_bytes()
    mine = free_bytes + int(psutil.Process().memory_info().rss)
    stage = manifest.stages[0]
    moving = stage.tiers.window_bytes
    moving += stage.tiers.experts.cache_bytes if stage.tiers.experts is not None else 0
    parts = stage.kv_bytes + stage.buffer_bytes + moving + pinned_bytes
    needed = max(parts, min(int(manifest.predicted.peak_memory_bytes.value), limit_bytes))
    if mine < needed:
        raise CapacityError(
            f"the plan takes {needed:,} bytes, {mine:,} are left ({reason})",
            needed_bytes=needed,
            available_bytes=mine,
            hint=f"close other programs, or {_REPLAN}",
        )


def placement_of(stage: Stage) -> Placement:
    """Return where the manifest wants each weight."""
    tiers = stage.tiers
    return Placement(
        layout=tiers.layout,
        pinned=frozenset(tiers.pinned),
        streamed=frozenset(tiers.streamed),
        looked_up=frozenset(tiers.looked_up),
        cached=frozenset(tiers.cached),
        window_bytes=tiers.window_bytes,
        cache_bytes=tiers.experts.cache_bytes if tiers.experts is not None else 0,
        buffer_bytes=stage.buffer_bytes,
    )


def embedded_model(manifest: Manifest, path: Path) -> Path | None:
    """Return the model inside edgert where the manifest names it and it is not beside it."""
    name = manifest.model.files[0].path
    if name in EMBEDDED and not (path.parent / name).exists():
        return embedded_path(name)
    return None


def open_shards(files: Sequence[Path]) -> TensorFile:
    """Open a model of which every file was hashed; FormatError when it reads another one."""
    file = open_tensor_file(files[0])
    found = [shard.path for shard in file.shards]
    if found != list(files):
        raise FormatError(
            f"the model is read from {', '.join(map(str, found))}; the manifest names "
            f"{', '.join(map(str, files))}",
            hint="make a new one: edgert plan MODEL -o FILE",
        )
    return file


def _describe(stage: Stage) -> str:
    tiers = stage.tiers
    where = f"{stage.host_id}/{stage.device_id} layers {stage.first_layer}..{stage.end_layer}"
    counts = f"{len(tiers.pinned)} pinned, {len(tiers.streamed)} streamed"
    counts += f", {len(tiers.cached)} cached" if tiers.cached else ""
    return f"{where}: {counts}, layout {tiers.layout}"
