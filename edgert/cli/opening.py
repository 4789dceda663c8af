"""From flags to an open engine or backend: which model, which options, with a progress bar."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from devices.host import default_memory_budget
from edgert.config import check_text, directories
from edgert.embedded import named_path
from edgert.errors import ConfigError
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from types import FrameType

    from edgert.api import Engine, EngineOptions
    from edgert.cli.command import Context
    from edgert.cli.options import ChatOptions, ModelFlags, TraceFlags
    from edgert.events import Listener
    from edgert.experts.routing import RoutingListener
    from edgert.llama.backend import Backend

T = TypeVar("T")
OpenEngine = Callable[["ChatOptions", "Context", "Listener"], "Engine"]

_LARGEST_TEXT_BYTES = 1 << 26
_LISTED = 5
_HEARD_WITHIN_S = 0.1
_DEFAULT_WINDOW = 512
_LOGIT_BYTES = 4


def model_path(flags: ModelFlags, env: Mapping[str, str]) -> Path | None:
    """Return the model the flags name (MODEL before -m), None for the embedded one.

    Raises:
        ConfigError: it is not a file.
    """
    chosen = flags.path if flags.path is not None else flags.model
    return None if chosen is None else find_model(chosen, env)


def find_model(chosen: str, env: Mapping[str, str]) -> Path:
    """Return the path of a model, a file or the name of one inside edgert.

    Raises:
        ConfigError: it is neither, naming the files there are.
    """
    if not chosen:
        raise ConfigError("the name of the model is empty", hint=_models_hint(Path(), env))
    path = user_path(chosen)
    if path.is_file():
        return path
    if (embedded := named_path(chosen)) is not None:
        return embedded
    what = "is a folder, wanted a GGUF file" if path.is_dir() else "no such file"
    raise ConfigError(f"model {chosen}: {what}", hint=_models_hint(path, env))


def user_path(text: str) -> Path:
    """Return the path a person wrote; ConfigError for ~nobody and for what no path may hold."""
    if "\0" in text:
        raise ConfigError(f"{text!r} is not a path: it has a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: there is no such user", hint="write ./~ for a file") from error


def trace_path(flags: TraceFlags) -> Path | None:
    """Return where the trace goes, None for no trace; ConfigError for what is no path."""
    return None if flags.trace is None else user_path(flags.trace)


@dataclass(frozen=True, slots=True)
class Recording:
    """What is written down about a run.

    Attributes:
        trace: Where to write a trace when the backend is closed.
        routing: Hears what routers choose.
    """

    trace: Path | None = None
    routing: RoutingListener | None = None


NOTHING = Recording()


@dataclass(frozen=True, slots=True)
class Room:
    """What is to fit into the context.

    Attributes:
        n_ctx: Positions when the flags name none; None is what suits scoring a text.
        n_sequences: Texts that share them.
    """

    n_ctx: int | None = None
    n_sequences: int = 1


ONE_TEXT = Room()


def open_engine(options: ChatOptions, context: Context, listener: Listener) -> Engine:
    """Open the engine `edgert chat` talks to."""
    from edgert import api
    from edgert.cli.deploying import open_deployment

    model = options.model
    deployment = open_deployment(model, options.deployment, context, listener)
    if deployment is not None:
        return api.open_engine(_left_to_choose(options, context), listener, deployment)
    return api.load(
        model_path(model, context.env),
        memory=memory_budget(model),
        context=model.ctx_size,
        batch=model.batch_size,
        ubatch=model.ubatch_size,
        threads=model.threads,
        threads_batch=model.threads_batch,
        cache_type_k=model.cache_type_k,
        cache_type_v=model.cache_type_v,
        packed=model.packed,  # type: ignore[arg-type]
        draft=None if options.draft.draft in (None, "none") else options.draft.draft,
        draft_max=options.draft.draft_max,
        overflow=options.prompt.overflow,  # type: ignore[arg-type]
        expert_bits=model.expert_bits,
        quality=model.quality,
        load_anyway=model.load_anyway,
        seed=options.sampling.seed,
        trace=trace_path(options.trace),
        listener=listener,
    )


def _left_to_choose(options: ChatOptions, context: Context) -> EngineOptions:
    """Return what a person may still choose beside a manifest."""
    from edgert.api import EngineOptions

    for name in ("draft", "draft_max"):
        if context.origins.get(name, "default") in ("flag", "environment"):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} is given, and the manifest decides it", hint="leave it out"
            )
    return EngineOptions(
        overflow=options.prompt.overflow,  # type: ignore[arg-type]
        seed=options.sampling.seed,
        trace=trace_path(options.trace),
    )


def open_backend(
    flags: ModelFlags,
    env: Mapping[str, str],
    listener: Listener,
    *,
    room: Room = ONE_TEXT,
    logits_bytes: int | None = None,
    recording: Recording = NOTHING,
) -> tuple[Path, Backend]:
    """Open the model without an engine, for measuring; a model must be named or embedded.

    Args:
        flags: Which model and how.
        env: Environment variables.
        listener: Told about progress.
        room: What is to fit into the context.
        logits_bytes: Room for the logits of one decode call, for scoring, which computes with
            exactly the expert bits asked for and never with more; None is one token's a text.
        recording: What is written down.
    """
    from edgert.experts.proving import prove_nested
    from edgert.experts.qualities import asked_bits
    from edgert.llama.open import open_backend as open_model
    from edgert.llama.options import LoadOptions
    from edgert.observer import UNOBSERVED
    from edgert.trace_file import record_to
    from quant.model_spec import read_model_spec
    from quant.tensor_file import open_tensor_file

    path = model_path(flags, env) or embedded_model()
    observer = UNOBSERVED if recording.trace is None else record_to(recording.trace)
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    prove_nested(file, directories(env).cache / "experts", listener)
    n_batch = flags.batch_size or LoadOptions(path).n_batch
    n_logits = room.n_sequences
    if logits_bytes is not None:
        n_logits = logits_bytes // (_LOGIT_BYTES * spec.n_vocab)
    options = LoadOptions(
        model=path,
        memory_bytes=memory_budget(flags),
        n_ctx=flags.ctx_size or room.n_ctx or min(_DEFAULT_WINDOW, spec.n_ctx_train),
        n_batch=n_batch,
        n_logits_max=min(n_batch, max(1, n_logits)),
        n_ubatch=flags.ubatch_size,
        n_threads=flags.threads,
        n_threads_batch=flags.threads_batch,
        n_sequences=room.n_sequences,
        type_k=flags.cache_type_k,
        type_v=flags.cache_type_v,
        packed=flags.packed,
        packed_folder=directories(env).cache / "packed",
        policy_folder=directories(env).cache / "experts",
        load_anyway=flags.load_anyway,
        exact_bits=logits_bytes is not None,
        **asked_bits(path, flags.expert_bits, flags.quality, directories(env).cache),
    )
    return path, open_model(options, listener, file, observer, recording.routing)


def memory_budget(flags: ModelFlags) -> int:
    """Return the bound on the process: the one asked for, or what is free minus a margin."""
    if flags.memory is not None:
        return parse_bytes(flags.memory)
    return default_memory_budget().budget_bytes


def run_interruptible(backend: Backend, work: Callable[[], T]) -> T:
    """Run `work` in a thread, then close `backend`; Ctrl-C makes its decode raise Cancelled.

    Signals are handled between two instructions of the main thread: never while that is inside
    llama.cpp, and a KeyboardInterrupt inside its callbacks would be lost.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        del number, frame
        nonlocal pressed
        pressed = True
        backend.cancel()

    before = signal.signal(signal.SIGINT, press)
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="work") as worker:
            job = worker.submit(work)
            while not wait([job], timeout=_HEARD_WITHIN_S).done:
                if pressed:  # again and again: between two decodes it would not be heard
                    backend.cancel()
            return job.result()
    finally:
        signal.signal(signal.SIGINT, before)
        backend.close()


def embedded_model() -> Path:
    """Return the model shipped with edgert."""
    from edgert import loading

    return loading.model_path(None)


def read_text(path: Path | str) -> str:
    """Read a UTF-8 file.

    Raises:
        ConfigError: not readable, too large, or the offset of the first byte that is not UTF-8.
    """
    try:
        with user_path(str(path)).open("rb") as file:
            return read_stream(file, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror or error}") from error


def read_stream(stream: BinaryIO, place: str) -> str:
    """Read UTF-8 text to its end; ConfigError names `place` when it is none, or has no end."""
    content = stream.read(_LARGEST_TEXT_BYTES + 1)
    if len(content) > _LARGEST_TEXT_BYTES:
        raise ConfigError(f"{place}: larger than {_LARGEST_TEXT_BYTES:,} bytes of text")
    return decode_text(content, place)


def decode_text(content: bytes, place: str) -> str:
    """Decode UTF-8 bytes; ConfigError names `place` and the offset of the first bad byte."""
    try:
        return check_text(content.decode("utf-8"), place)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{place}: byte {error.start} is not UTF-8 text (0x{content[error.start]:02x})",
            hint="convert it, for example with iconv -t UTF-8",
        ) from error


def _models_hint(path: Path, env: Mapping[str, str]) -> str:
    user = Path(env.get("HOME", "/nonexistent"))
    here = path if path.is_dir() else path.parent if path.parent.is_dir() else Path()
    found = [str(item) for item in sorted(here.glob("*.gguf"))]
    caches = [env.get("LLAMA_CACHE"), user / ".cache/llama.cpp", user / ".lmstudio/models"]
    hub = env.get("HF_HUB_CACHE") or user / ".cache/huggingface/hub"
    for folder, pattern in [(c, "*.gguf") for c in caches if c] + [
        (hub, "models--*/snapshots/*/*.gguf")
    ]:
        found += [str(item) for item in sorted(Path(folder).glob(pattern))]
    if not found:
        return "name a GGUF file, or none for the embedded model"
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"there is {', '.join(found[:_LISTED])}{more}"
