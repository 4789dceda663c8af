"""Opens models as engines: options, the models inside edgert, draft models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from devices.host import default_memory_budget
from edgert.config import directories
from edgert.deployment import Deployment, deploy
from edgert.embedded import EMBEDDED_DRAFT, EMBEDDED_MODEL, embedded_path, named_path
from edgert.engine import Engine, EngineSettings
from edgert.errors import ConfigError
from edgert.events import Listener, Notice, ignore
from edgert.experts.proving import prove_nested
from edgert.experts.qualities import asked_bits
from edgert.generation import Overflow
from edgert.host_deployment import HostsAsk, known_addresses
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import DEFAULT_CONTEXT, LoadOptions
from edgert.model_files import FileHashes
from edgert.observer import UNOBSERVED
from edgert.sessions import ModelIdentity
from edgert.signing import trusted_keys as keys_of
from edgert.signing import verify
from edgert.speculative import Drafter, ModelDrafter, NgramDrafter
from edgert.trace_file import record_to
from edgert.units import parse_bytes
from partition.manifest import Manifest
from partition.manifest_file import read_manifest
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

__all__ = ["EMBEDDED_DRAFT", "EMBEDDED_MODEL", "EngineOptions", "load", "open_engine"]

_DEFAULT_BATCH = 512
_N_LOGITS = 33  # embeddings of a text take a pass for as many tokens


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All options of `load`; see there."""

    model: str | Path | None = None
    memory: str | int | None = None
    context: int | None = None
    batch: int | None = None
    ubatch: int | None = None
    threads: int | None = None
    threads_batch: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    packed: Literal["off", "auto", "only"] = "off"
    draft: str | Path | None = None
    draft_max: int = 16
    overflow: Overflow = "error"
    expert_bits: str | None = None
    quality: float | None = None
    load_anyway: bool = False
    seed: int | None = None
    trace: str | Path | None = None
    trusted_keys: Sequence[str] = ()


def load(  # many parameters: the one place where every option has a name
    model: str | Path | None = None,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    batch: int | None = None,
    ubatch: int | None = None,
    threads: int | None = None,
    threads_batch: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    packed: Literal["off", "auto", "only"] = "off",
    draft: str | Path | None = None,
    draft_max: int = 16,
    overflow: Overflow = "error",
    expert_bits: str | None = None,
    quality: float | None = None,
    load_anyway: bool = False,
    seed: int | None = None,
    trace: str | Path | None = None,
    trusted_keys: Sequence[str] = (),
    listener: Listener = ignore,
) -> Engine:
    """Open a model, or execute a manifest.

    Args:
        model: A GGUF file or the first of a split one, or a manifest (.json), which is executed
            exactly or refused; None is the small model inside edgert, "tiny-moe" the mixture of
            experts inside it, unless a file has that name.
        memory: Bound on the whole process, such as "2000M"; None is what is available now.
        context: Positions of the KV cache; None is what the model was trained on, at most 4096.
        batch: Most tokens of one pass, 512 by default.
        ubatch: Tokens computed at once; None is `batch`.
        threads: Threads for single tokens; None is every core.
        threads_batch: Threads for batches; None is `threads`.
        cache_type_k: Type of cached keys: f16, q8_0 or q4_0.
        cache_type_v: Type of cached values.
        packed: Use the packed layout: "off", "auto" writes it once, "only" wants it to be there.
        draft: Speculation: None is off, "ngram" looks up the prompt, "embedded" the small draft
            model inside edgert, anything else a GGUF file with the same vocabulary.
        draft_max: Most tokens of a draft.
        overflow: When the context is full: "error" ends the answer, "shift" drops the oldest half.
        expert_bits: Bits of a nested model's experts: "4", or "4,8@0.25" for 8 where less than a
            quarter of the routing weight stands before an expert; None is the widest width.
        quality: The fewest expert bits that keep this share of the quality, as measured by
            `edgert eval --calibrate-bits`.
        load_anyway: Try although the estimate says it cannot fit.
        seed: Seed of generations that name none; None draws one each time.
        trace: File for a trace of the run in the Trace Event Format (Perfetto reads it), written
            when the engine is closed.
        trusted_keys: Public keys, or files with them, one of which must have signed the manifest.
        listener: Gets events: load and prefill progress, notices.

    Returns:
        An engine; close it, or use it as a context manager.

    Raises:
        ConfigError: an option is wrong, a file is missing, the draft's vocabulary differs, the
            trace cannot be written.
        FormatError: the model file is damaged or of an unknown kind.
        CapacityError: the memory cannot be enough.
        PlanError: the manifest needs what this runtime or host does not have.
        BackendError: llama.cpp cannot be used, or refused the model.

    Example:
        >>> with edgert.load() as engine:
        ...     print(engine.chat([{"role": "user", "content": "Hello!"}]).text)
    """
    options = EngineOptions(
        model=model,
        memory=memory,
        context=context,
        batch=batch,
        ubatch=ubatch,
        threads=threads,
        threads_batch=threads_batch,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        packed=packed,
        draft=draft,
        draft_max=draft_max,
        overflow=overflow,
        expert_bits=expert_bits,
        quality=quality,
        load_anyway=load_anyway,
        seed=seed,
        trace=trace,
        trusted_keys=trusted_keys,
    )
    return open_engine(options, listener)


def open_engine(
    options: EngineOptions, listener: Listener = ignore, deployed: Deployment | None = None
) -> Engine:
    """Open a model from bundled options, see `load`; of `deployed` where that is done already."""
    _check_kinds(options)
    if deployed is None and options.model is not None and str(options.model).endswith(".json"):
        deployed = _deployed(options, Path(options.model), listener)
    path = model_path(options.model) if deployed is None else deployed.model
    EngineSettings("", overflow=options.overflow, draft_max=options.draft_max,
                   seed=options.seed).checked()  # fmt: skip
    if deployed is not None:
        options = _decided(options, deployed.manifest)
    load_options = (deployed.options if deployed else _load_options(options, path)).checked()
    recorder = None if options.trace is None else record_to(Path(options.trace))
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    prove_nested(file, directories(os.environ).cache / "experts", listener)
    settings = EngineSettings(
        model_name=spec.name or path.stem,
        identity=ModelIdentity.of(
            file, spec.name or path.stem, f"{options.cache_type_k}/{options.cache_type_v}"
        ),
        chat_template=spec.chat_template,
        overflow=options.overflow,
        draft_max=options.draft_max,
        draft_name=str(options.draft) if options.draft is not None else None,
        seed=options.seed,
    )
    with ExitStack() as stack:
        small = None
        if options.draft not in (None, "ngram"):
            # the draft model first: what it takes then counts when the budget is divided
            n_ctx = options.context or min(spec.n_ctx_train, DEFAULT_CONTEXT)
            small = open_backend(
                _draft_options(options.draft, load_options, n_ctx), listener,
                observer=recorder.beside("draft") if recorder else UNOBSERVED,
            )  # fmt: skip
            stack.callback(small.close)
        watch = recorder or UNOBSERVED
        if deployed is not None:
            backend = deployed.open(listener, file, watch)
        else:
            backend = open_backend(load_options, listener, file, watch)
        stack.callback(backend.close)
        if options.context is not None and backend.n_ctx != options.context:
            listener(Notice(f"the context holds {backend.n_ctx} positions, not {options.context}"))
        engine = Engine(backend, settings, _drafter(options, small, backend), listener)
        stack.pop_all()
    return engine


def _deployed(options: EngineOptions, path: Path, listener: Listener) -> Deployment:
    """Deploy a manifest; options that it decides must not be given beside it."""
    default = EngineOptions()
    for name in ("memory", "context", "batch", "ubatch", "threads", "threads_batch", "packed",
                 "cache_type_k", "cache_type_v", "draft", "draft_max", "load_anyway",
                 "expert_bits", "quality"):  # fmt: skip
        if getattr(options, name) != getattr(default, name):
            raise ConfigError(
                f"{name} is {getattr(options, name)!r}, and the manifest {path} decides it",
                hint="leave it out, or plan with it: edgert plan MODEL -o FILE",
            )
    manifest = read_manifest(path)
    verify(manifest, keys_of(options.trusted_keys), str(path))
    cache = directories(os.environ).cache
    return deploy(
        manifest, path, hashes=FileHashes(cache), packed_folder=cache / "packed",
        hosts=HostsAsk(directories(os.environ), known_addresses(os.environ), listener),
    )  # fmt: skip


def _decided(options: EngineOptions, manifest: Manifest) -> EngineOptions:
    """Return the options with what the manifest decides."""
    run = manifest.run
    return replace(
        options,
        context=run.n_ctx,
        cache_type_k=run.cache_type_k,
        cache_type_v=run.cache_type_v,
        draft=None if run.draft == "none" else run.draft,
        draft_max=run.draft_max,
    )


def _check_kinds(options: EngineOptions) -> None:
    """Refuse what would only fail deep inside; ranges are checked where they are known."""
    for name in ("context", "batch", "ubatch", "threads", "threads_batch"):
        number: object = getattr(options, name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ConfigError(f"{name} is {number!r}, wanted an integer")
    if options.expert_bits is not None and not isinstance(options.expert_bits, str):
        raise ConfigError(
            f"expert_bits is {options.expert_bits!r}, wanted text", hint='such as "4" or "4,8@0.25"'
        )
    for name, kind in (("model", "GGUF file"), ("draft", "GGUF file"), ("trace", "new file")):
        path: object = getattr(options, name)
        if path is not None and (not isinstance(path, str | Path) or str(path) == ""):
            raise ConfigError(f"{name} is {path!r}, wanted the path of a {kind}")


def model_path(model: str | Path | None) -> Path:
    """Return the path of a model; None is the one inside edgert, which has more by name.

    Raises:
        ConfigError: the embedded model is not installed.
    """
    if model is None:
        return embedded_path(EMBEDDED_MODEL)
    return named_path(str(model)) or Path(model)


def _load_options(options: EngineOptions, path: Path) -> LoadOptions:
    batch = _DEFAULT_BATCH if options.batch is None else options.batch
    return LoadOptions(
        model=path,
        memory_bytes=_memory_bytes(options.memory),
        n_ctx=options.context,
        n_batch=batch,
        n_ubatch=options.ubatch,
        n_logits_max=max(_N_LOGITS, 0 if options.draft is None else options.draft_max + 1),
        n_threads=options.threads,
        n_threads_batch=options.threads_batch,
        type_k=options.cache_type_k,
        type_v=options.cache_type_v,
        packed=options.packed,
        packed_folder=directories(os.environ).cache / "packed",
        policy_folder=directories(os.environ).cache / "experts",
        load_anyway=options.load_anyway,
        **asked_bits(path, options.expert_bits, options.quality, directories(os.environ).cache),
    )


def _memory_bytes(memory: str | int | None) -> int:
    if memory is None:
        return default_memory_budget().budget_bytes
    return parse_bytes(memory)


def _draft_options(draft: str | Path | None, main: LoadOptions, n_ctx: int) -> LoadOptions:
    """Return options for the draft model: resident, as much context as it was trained on."""
    path = embedded_path(EMBEDDED_DRAFT) if draft == "embedded" else Path(str(draft))
    spec = read_model_spec(open_tensor_file(path))
    return LoadOptions(
        model=path,
        memory_bytes=main.memory_bytes,
        n_ctx=min(n_ctx, spec.n_ctx_train),
        n_batch=main.n_batch,
        n_logits_max=1,
        n_threads=main.n_threads,
        n_threads_batch=main.n_threads_batch,
        load_anyway=main.load_anyway,
    )


def _drafter(options: EngineOptions, small: Backend | None, backend: Backend) -> Drafter | None:
    if small is not None:
        return ModelDrafter(small, backend.vocab)
    return NgramDrafter() if options.draft == "ngram" else None
