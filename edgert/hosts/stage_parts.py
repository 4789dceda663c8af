"""From a stage of a manifest and its part files to what llama.cpp is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import FormatError, PlanError
from edgert.hosts.allreduce import Exchange
from edgert.hosts.hidden_states import F32
from edgert.hosts.remote_part import PLAIN, Codecs
from edgert.llama.open import open_part
from edgert.llama.options import LoadOptions, Placement
from edgert.llama.part import PartRunner
from edgert.llama.part_graph import PartRun
from partition.manifest import Manifest, Stage, Transport
from quant.activations.settings import DEFAULT_BOUND, CodecSettings
from quant.parts.file import Part, read_part
from quant.parts.spec import HeadRows
from quant.tensor_file import TensorFile, open_tensor_file

_HINT = "make it again with edgert pack"


@dataclass(frozen=True, slots=True)
class StagePart:
    """A part of a stage on this host, checked against the manifest.

    Attributes:
        stage: Of the manifest.
        part: Its file, and what it has.
        options: How it is opened.
        codecs: How hidden states come to its host and leave it.
        n_shares: Hosts that share its layers.
    """

    stage: Stage
    part: Part
    options: LoadOptions
    codecs: Codecs = PLAIN
    n_shares: int = 1

    @property
    def to_hidden(self) -> bool:
        """Whether it ends with hidden states."""
        return self.part.spec.head == "none"

    @property
    def width(self) -> int:
        """Width of the rows it puts out."""
        head = self.part.spec.head
        if isinstance(head, HeadRows):
            return head.end - head.first
        return self.part.n_vocab if head == "whole" else n_embd(self.part.file)

    def open(self, exchange: Exchange) -> PartRunner:
        """Open it.

        Args:
            exchange: Adds up over the hosts of its layers, where they are shared.

        Raises:
            CapacityError: it does not fit in the memory that the manifest gives it.
            PlanError: its graph does not allow the manifest's placement.
        """
        shared = exchange if self.stage.share is not None and self.part.spec.n_layer else None
        run = PartRun(to_hidden=self.to_hidden, sum_over_hosts=shared)
        return open_part(self.options, run, file=self.part.file)


def stage_part(manifest: Manifest, stage: Stage, path: Path, source_sha256: str) -> StagePart:
    """Check a part file against its stage.

    Args:
        manifest: Valid.
        stage: Of it, on this host.
        path: The part.
        source_sha256: What parts call the model that the stage runs.

    Raises:
        FormatError: it is no part, one of another model, or another part.
    """
    file = open_tensor_file(path)
    part = read_part(file)
    if part is None:
        raise FormatError("a whole model, wanted a part of it", path=path, hint=_HINT)
    part.check_source(source_sha256)
    spec = part.spec
    is_stage = (spec.first_layer, spec.end_layer) == (stage.first_layer, stage.end_layer)
    if not (is_stage or (spec.is_exit and stage.head)):
        raise FormatError(
            f"{spec.describe()}, and stage {stage.stage_id} has layers {stage.first_layer} to "
            f"{stage.end_layer}",
            path=path,
            hint=_HINT,
        )
    layers = (stage.first_layer, stage.end_layer)
    n_shares = sum((s.first_layer, s.end_layer) == layers for s in manifest.stages)
    options, codecs = _options(manifest, stage, part), codecs_of(manifest, stage)
    return StagePart(stage, part, options, codecs, n_shares)


def codecs_of(manifest: Manifest, stage: Stage) -> Codecs:
    """Return the codecs of the transports to a stage and from it; what has none is not coded."""
    if stage.share is not None:
        return PLAIN
    there = next((t for t in manifest.transport if t.target_stage == stage.stage_id), None)
    back = next((t for t in manifest.transport if t.source_stage == stage.stage_id), None)
    return Codecs(_settings(there), _settings(back))


def _settings(transport: Transport | None) -> CodecSettings:
    if transport is None:
        return F32
    bound = DEFAULT_BOUND if transport.bound is None else transport.bound
    return CodecSettings(kind=transport.codec, bound=bound)


def stage_bytes(stage: Stage) -> int:
    """Return what a stage takes beside the program: cache, buffers, and what of it stays."""
    tiers = stage.tiers
    moving = tiers.window_bytes + (tiers.experts.cache_bytes if tiers.experts is not None else 0)
    stays = 0 if tiers.streamed or tiers.cached else sum(stage.precision.values())
    return stage.kv_bytes + stage.buffer_bytes + moving + stays


def n_embd(file: TensorFile) -> int:
    """Return the width of hidden states."""
    return file.tensor("token_embd.weight").shape[0]


def _options(manifest: Manifest, stage: Stage, part: Part) -> LoadOptions:
    run, device = manifest.run, manifest.device_of(stage)
    return LoadOptions(
        model=part.file.path,
        memory_bytes=manifest.pool_of(stage).limit_bytes,
        n_ctx=run.n_ctx,
        n_batch=run.n_batch,
        n_ubatch=run.n_ubatch,
        # What goes on to other layers does so for every token; its logits are never computed.
        n_logits_max=run.n_batch if part.spec.head == "none" else run.n_logits_max,
        n_threads=device.n_threads,
        n_threads_batch=device.n_threads_batch,
        type_k=run.cache_type_k,
        type_v=run.cache_type_v,
        placement=_placement(stage, part),
    )


def _placement(stage: Stage, part: Part) -> Placement:
    """Return where each weight lives, by its name in the part."""
    tiers = stage.tiers
    if tiers.layout == "packed":
        raise PlanError(
            f"stage {stage.stage_id} reads the packed layout, which parts do not have yet",
            hint="plan again without a packed copy",
        )
    looked_up = _names(part, tiers.looked_up)
    return Placement(
        layout=tiers.layout,
        # What belongs to no tensor of the model is a few rows of zeros.
        pinned=_names(part, tiers.pinned) | part.zeros,
        streamed=_names(part, tiers.streamed),
        looked_up=looked_up,
        cached=_names(part, tiers.cached),
        window_bytes=tiers.window_bytes,
        cache_bytes=tiers.experts.cache_bytes if tiers.experts is not None else 0,
        buffer_bytes=stage.buffer_bytes,
    )


def _names(part: Part, whole_names: Iterable[str]) -> frozenset[str]:
    names = (part.part_name(name) for name in whole_names)
    return frozenset(name for name in names if name is not None)
