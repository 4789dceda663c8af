"""The profile of this host for commands: child processes, the store and the model put together."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from devices.bounds import MOST_SPREAD
from devices.child_process import ChildProbe, run_child
from devices.discover import Probes, Wish, discover, fingerprint, measure
from devices.flash_behind import storage_behind
from devices.host import available_bytes, n_usable_cpus
from devices.plausible import check
from devices.profile import Absence, Figure, FileModel, HostProfile, ProcessorReport, Runtime
from devices.scratch import remove_stale
from devices.store import ProfileStore
from edgert.config import Directories
from edgert.errors import ConfigError, MeasurementError
from edgert.llama.build import kernel_build
from quant.formats import NestedType, TensorType, format_of
from quant.model_spec import ModelSpec
from quant.nested.blocks import block_form
from quant.tensor_file import TensorFile

logger = logging.getLogger(__name__)

Result = TypeVar("Result", bound=FileModel)

_PROCESSOR_S = 180.0
_RUNTIME_S = 30.0
_LEAST_WEIGHT_BYTES, _MOST_WEIGHT_BYTES = 32 << 20, 384 << 20
_MEMORY_SHARE = 4
_LEAST_DIMENSIONS = 2
_DISTURBED_HINT = "measure again while nothing else runs, or plan with --no-measure"


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's attention: heads that ask, heads that are cached, elements of each."""

    n_head: int
    n_head_kv: int
    head_length: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command wants to know.

    Attributes:
        place: The model, or the folder where models would lie.
        types: Weight types to measure; empty for the usual ones.
        n_threads: Threads that compute; None for every core.
        measure: Measure now instead of taking what is known.
        list_runtimes: Also list what each runtime could compute with, in processes of their own.
        heads: Shape of the model's attention; None measures a usual one.
    """

    place: Path
    types: tuple[str, ...] = ()
    n_threads: int | None = None
    measure: bool = False
    list_runtimes: bool = True
    heads: Heads | None = None


def this_host(asked: Asked, folders: Directories, env: Mapping[str, str]) -> HostProfile:
    """Return the profile of this host: measured now, remembered, or assumed.

    Raises:
        ConfigError: the remembered profile is damaged or of another machine.
        DeviceError: another process is measuring, or the cache's folder cannot be locked.
        MeasurementError: figures contradict one another, or spread too far.
    """
    n_threads, build = asked.n_threads or n_usable_cpus(), kernel_build()
    store = ProfileStore(folders.cache / "devices", fingerprint(build, n_threads))
    wish = Wish(asked.place, folders.cache, n_threads, build, types=asked.types)
    probes = _probes(asked, n_threads, env)
    storage = storage_behind(asked.place).name
    if asked.measure:
        with store.locked():
            remove_stale(folders.cache)
            return store.save_or_warn(_measured(wish, probes), storage)
    stored = store.load(storage)
    return discover(wish, probes, stored.profile if stored is not None else None)


def _measured(wish: Wish, probes: Probes) -> HostProfile:
    """Measure, and once more where the figures show that something else ran meanwhile."""
    try:
        return _plausible(measure(wish, probes))
    except MeasurementError as error:
        logger.warning("%s; measuring once more", error.message)
    return _plausible(measure(wish, probes))


def _plausible(host: HostProfile) -> HostProfile:
    """Refuse figures that contradict one another or spread: something else ran meanwhile."""
    try:
        check(host)
    except ConfigError as error:
        raise MeasurementError(
            f"measured figures cannot be: {error.message}", hint=_DISTURBED_HINT
        ) from error
    for path, figure in _steady_figures(host):
        if figure.disturbed:
            raise MeasurementError(
                f"{path}: something else had the processors while it was measured",
                hint=_DISTURBED_HINT,
            )
        if (figure.spread or 0.0) > MOST_SPREAD:
            raise MeasurementError(
                f"{path}: repetitions spread by {figure.spread:.3g} of their median, "
                f"wanted {MOST_SPREAD:g} at most",
                hint=_DISTURBED_HINT,
            )
    return host


def _steady_figures(host: HostProfile) -> Iterator[tuple[str, Figure]]:
    """List what decides how fast a plan decodes."""
    for i, device in enumerate(host.devices):
        yield f"$.devices[{i}].node_s", device.node_s
        for j, kernel in enumerate(device.kernels):
            yield f"$.devices[{i}].kernels[{j}].matvec_bytes_per_s", kernel.matvec_bytes_per_s


def has_measured(asked: Asked, folders: Directories) -> bool:
    """Whether everything that a plan needs was measured on this host before.

    Rates of all the types, of attention over such heads and of the storage behind the model. A
    storage that could not be measured counts: trying every time would change nothing.
    """
    n_threads = asked.n_threads or n_usable_cpus()
    folder = folders.cache / "devices"
    stored = ProfileStore(folder, fingerprint(kernel_build(), n_threads)).load(
        storage_behind(asked.place).name
    )
    if stored is None or stored.profile.flash is None:
        return False
    devices = stored.profile.devices
    known = {
        kernel.ggml_type
        for device in devices
        for kernel in device.kernels
        if kernel.matvec_bytes_per_s.origin == "measured"
    }
    lengths = {rate.head_length for device in devices for rate in device.attention}
    is_known = asked.heads is None or asked.heads.head_length in lengths
    return is_known and known.issuperset(asked.types)


def types_of(file: TensorFile) -> tuple[str, ...]:
    """Return the types that a model's matrices are computed in, the one with most bytes first.

    Nested experts are computed in the type of any of their widths.
    """
    sizes: dict[str, int] = {}
    for tensor in file.tensors:
        if len(tensor.shape) >= _LEAST_DIMENSIONS:
            for name in _computed_types(tensor.ggml_type):
                sizes[name] = sizes.get(name, 0) + tensor.size_bytes
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))


def _computed_types(kind: TensorType) -> Iterator[str]:
    if not isinstance(kind, NestedType):
        yield format_of(kind).name
        return
    forms = (block_form(width, kind.top).name for width in range(kind.top, kind.base - 1, -1))
    yield from dict.fromkeys(forms)


def heads_of(spec: ModelSpec) -> Heads | None:
    """Return the shape of a model's attention, None where it has none or it differs by layer."""
    cached = {n_head_kv for n_head_kv in spec.n_head_kv_per_layer if n_head_kv}
    if len(cached) != 1 or spec.n_head % min(cached) or not spec.key_length:
        return None
    return Heads(spec.n_head, min(cached), spec.key_length)


def _probes(asked: Asked, n_threads: int, env: Mapping[str, str]) -> Probes:
    free_bytes, _ = available_bytes()
    weight_bytes = min(_MOST_WEIGHT_BYTES, free_bytes // _MEMORY_SHARE)
    request: dict[str, object] = {
        "n_threads": n_threads,
        "weight_bytes": max(_LEAST_WEIGHT_BYTES, weight_bytes),
    }
    if asked.types:
        request["types"] = asked.types
    if asked.heads is not None:
        request.update(asdict(asked.heads))

    def processor() -> ProcessorReport:
        probe = ChildProbe("kernels", "edgert.llama.probe_child", json.dumps(request), _PROCESSOR_S)
        return _with_program(_parsed(ProcessorReport, probe, env), env)

    def backends() -> Runtime:
        probe = ChildProbe("llama.cpp", "edgert.llama.backend_child", most_s=_RUNTIME_S)
        return _parsed(Runtime, probe, env)

    def providers() -> Runtime:
        probe = ChildProbe("ONNX Runtime", "edgert.onnx.provider_child", most_s=_RUNTIME_S)
        return _parsed(Runtime, probe, env)

    runtimes = (("llama.cpp", backends), ("ONNX Runtime", providers))
    return Probes(processor, runtimes if asked.list_runtimes else ())


def _with_program(found: ProcessorReport, env: Mapping[str, str]) -> ProcessorReport:
    """Put the program's memory in place of the library's; say so where only that is known."""
    program = ChildProbe("program", "edgert.cli.program_child", most_s=_RUNTIME_S)
    try:
        return found.model_copy(update={"process_bytes": _parsed(Figure, program, env)})
    except MeasurementError as error:
        logger.warning("%s; its memory is that of the library alone", error.message)
        reason = f"{error.message}; only the library's memory is counted, which is less"
        lacking = Absence(what="measured program memory", reason=reason, about="figure")
        return found.model_copy(update={"skipped": (*found.skipped, lacking)})


def _parsed(kind: type[Result], probe: ChildProbe, env: Mapping[str, str]) -> Result:
    line = run_child(probe, env)
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise MeasurementError(f"{probe.what}: the probe said what is no result") from error
