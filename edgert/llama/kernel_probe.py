"""How fast ggml multiplies here, by weight type and layout, and what a graph node costs.

Weights are many distinct matrices, more than caches hold, because real ones stream from memory.
Only `probe_child` runs this: kernels that crash must not take the program with them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from devices.profile import Absence, AttentionRate, Figure, KernelRate, Rate, WeightLayout
from edgert.errors import ConfigError
from edgert.llama.attention_probe import AttentionShape, attention_rate
from edgert.llama.ggml_graph import Processor, Tensors
from edgert.llama.lib import LlamaLibrary, tensor_at
from edgert.llama.repetition import Clock, Repetitions, Reserve, Timed
from edgert.weights.memory import Region
from edgert.weights.repack import Repacker
from edgert.weights.uses import WeightUse
from quant.formats import FORMATS, GgmlFormat, GgmlType

N_COLUMNS = N_ROWS = 4096
DEFAULT_TYPES = ("q4_0", "q8_0", "q4_K", "q6_K", "f16", "f32")
LAYOUTS: tuple[WeightLayout, ...] = ("file", "repacked")
_F32 = 0
_F32_BYTES = 4
_QUANTIZED_ROWS = 64  # the rest of a matrix repeats them: values do not change the speed
_BATCH_MATRICES = 2
_TINY_LENGTH = 16
_TINY_NODES = 1000
_ALIGNMENT = 128
# Types that no weights have; asking ggml to make rows of them aborts the process.
_NO_WEIGHTS = frozenset(
    {GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64, GgmlType.F64}
    | {GgmlType.Q8_1, GgmlType.Q8_K}
)
_DISTURBED = "other processes used the processors while it was measured: the figures are too low"


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What to measure.

    Attributes:
        types: Names of ggml types, as in `quant.formats`.
        n_threads: Threads that compute.
        layouts: Rows as in the file, interleaved, or both.
        weight_bytes: Distinct weight bytes that one repetition streams.
        n_tokens: Size of the batch.
        n_repetitions: Of each measurement; the median counts.
        most_s: Seconds for each type and layout after which repetitions stop, not before three of
            each of its two measurements.
        reserve_s: Seconds more that disturbed measurements may take, all together.
        attention: Heads of the model's attention.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    n_threads: int = 1
    layouts: tuple[WeightLayout, ...] = LAYOUTS
    weight_bytes: int = 384 << 20
    n_tokens: int = 512
    n_repetitions: int = 7
    most_s: float = 6.0
    reserve_s: float = 20.0
    attention: AttentionShape = field(default_factory=AttentionShape)

    def formats(self) -> tuple[tuple[GgmlType, GgmlFormat], ...]:
        """Return the types by number; ConfigError names one that is unknown."""
        by_name = {known.name.lower(): (number, known) for number, known in FORMATS.items()}
        unknown = [name for name in self.types if name.lower() not in by_name]
        if unknown:
            raise ConfigError(f"ggml type {unknown[0]!r} is unknown")
        return tuple(by_name[name.lower()] for name in self.types)


@dataclass(slots=True)
class KernelProbe:
    """Measures kernels of one library.

    Attributes:
        library: The checked libraries.
        request: What to measure.
        clock: Seconds from anywhere.
        processor_clock: Seconds of processor time, all threads together.
        skipped: Filled while measuring: what has no kernels here, or was disturbed, and why.
    """

    library: LlamaLibrary
    request: KernelRequest
    clock: Clock
    processor_clock: Clock
    skipped: list[Absence] = field(default_factory=list)
    _reserve: Reserve = field(init=False)

    def __post_init__(self) -> None:
        self._reserve = Reserve(self.request.reserve_s)

    def rates(self) -> Iterator[KernelRate]:
        """Measure each type in each layout; those without kernels go to `skipped`.

        The first that something else had the processors for is the last: it will not be used.
        """
        for ggml_type, known in self.request.formats():
            for layout in self.request.layouts:
                with ExitStack() as stack:
                    rate = self._rate(ggml_type, known, layout, stack)
                if rate is not None:
                    yield rate
                    if rate.matvec_bytes_per_s.disturbed:
                        return

    def node_s(self) -> tuple[Figure, Figure]:
        """Measure what a node costs inside a graph, and what a graph of one node costs."""
        with ExitStack() as stack:
            processor = stack.enter_context(Processor(self.library, self.request.n_threads))
            tensors = stack.enter_context(Tensors(self.library, 2 * _TINY_NODES))
            single = stack.enter_context(Tensors(self.library, 8))
            region = Region(self.library.libc, 1 << 20, huge=False)
            stack.callback(region.close)
            graphs = [_tiny(tensors, region.address, _TINY_NODES), _tiny(single, region.address, 1)]
            many, one = (self._repetitions().time(processor, graph) for graph in graphs)
        node_s = many.middle_s / _TINY_NODES
        return (
            Figure(value=node_s, origin="measured", spread=many.spread, disturbed=many.disturbed),
            Figure(value=one.middle_s, origin="measured", spread=one.spread),
        )

    def attention(self) -> AttentionRate:
        """Measure attention over the cache."""
        n_threads, n_tokens = self.request.n_threads, self.request.n_tokens
        rate, disturbed = attention_rate(
            self.library, n_threads, self._repetitions(), self.request.attention, n_tokens
        )
        if disturbed:
            length = self.request.attention.head_length
            self._skip(f"undisturbed attention over heads of {length}", _DISTURBED)
        return rate

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.append(Absence(what=what, reason=reason, about="figure"))

    def _repetitions(self) -> Repetitions:
        request = self.request
        return Repetitions(
            self.clock,
            self.processor_clock,
            request.n_repetitions,
            request.most_s / 2,
            self._reserve,
        )

    def _rate(
        self, ggml_type: GgmlType, known: GgmlFormat, layout: WeightLayout, stack: ExitStack
    ) -> KernelRate | None:
        weights = _Weights(self.library, ggml_type, known, self.request.weight_bytes, stack)
        reason = weights.place(layout)
        if reason is not None:
            self._skip(f"{known.name} {layout}", reason)
            return None
        processor = stack.enter_context(Processor(self.library, self.request.n_threads))
        if not weights.computable(processor):
            reason = "ggml's CPU backend does not multiply by this type"
            self._skip(f"{known.name} {layout}", reason)
            return None
        repetitions = self._repetitions()
        single = repetitions.time(processor, weights.graph(1, weights.n_matrices))
        n_batch = min(_BATCH_MATRICES, weights.n_matrices)
        batch = repetitions.time(processor, weights.graph(self.request.n_tokens, n_batch))
        if batch.disturbed:
            self._skip(f"undisturbed batches of {known.name} {layout}", _DISTURBED)
        streamed_bytes = weights.n_matrices * weights.file_bytes
        operations = 2 * N_ROWS * N_COLUMNS * n_batch * self.request.n_tokens
        return KernelRate(
            ggml_type=known.name,
            layout=layout,
            n_threads=self.request.n_threads,
            matvec_bytes_per_s=_rate(streamed_bytes, single),
            matmat_flops=_rate(operations, batch),
            matmat_tokens=self.request.n_tokens,
        )


class _Weights:
    """Distinct matrices of one type in memory, and graphs that multiply by them."""

    def __init__(
        self,
        library: LlamaLibrary,
        ggml_type: GgmlType,
        known: GgmlFormat,
        weight_bytes: int,
        stack: ExitStack,
    ) -> None:
        self._library, self._type, self._stack = library, ggml_type, stack
        self._known = known
        self.file_bytes = N_ROWS * N_COLUMNS // known.block_length * known.block_bytes
        self.n_matrices = max(1, -(-weight_bytes // self.file_bytes))
        self._tensors = stack.enter_context(Tensors(library, self.n_matrices))
        self._weights = [
            self._tensors.matrix(ggml_type, N_COLUMNS, N_ROWS, None) for _ in range(self.n_matrices)
        ]

    def place(self, layout: WeightLayout) -> str | None:
        """Put the bytes in place; return why that is impossible, None if it is done."""
        content = _quantized(self._library, self._type, self._known)
        if content is None:
            return "ggml has no way to make weights of this type"
        step, packed = self.file_bytes, None
        if layout == "repacked":
            packed = self._packed(content)
            if packed is None:
                return "this processor has no repacked kernels for it"
            step = len(packed)
        step = -(-step // _ALIGNMENT) * _ALIGNMENT
        address = self._reserve(step * self.n_matrices)
        source = packed if packed is not None else content
        for index, weight in enumerate(self._weights):
            place = address + index * step
            for offset in range(0, self.file_bytes if packed is None else len(source), len(source)):
                ctypes.memmove(place + offset, source, len(source))
            tensor_at(weight).data = place
        return None

    def computable(self, processor: Processor) -> bool:
        """Say whether the backend multiplies by these weights."""
        with Tensors(self._library, 2) as tensors:
            single = tensors.matrix(_F32, N_COLUMNS, 1, None)
            return processor.supports(tensors.product(self._weights[0], single, 0))

    def graph(self, n_tokens: int, n_matrices: int) -> int:
        """Return the graph that multiplies a batch by each of the first matrices."""
        n_bytes = (N_COLUMNS + N_ROWS) * n_tokens * _F32_BYTES
        address = self._reserve(n_bytes)
        values = np.random.default_rng(1).standard_normal(N_COLUMNS * n_tokens, np.float32)
        ctypes.memmove(address, values.tobytes(), values.nbytes)
        tensors = self._stack.enter_context(Tensors(self._library, n_matrices + 1))
        activations = tensors.matrix(_F32, N_COLUMNS, n_tokens, address)
        result = address + values.nbytes
        return tensors.graph(
            [tensors.product(weight, activations, result) for weight in self._weights[:n_matrices]]
        )

    def _packed(self, content: bytes) -> bytes | None:
        repacker = Repacker(self._library)
        self._stack.callback(repacker.close)
        uses = {
            str(index): WeightUse(str(index), index, {weight}, operation=b"MUL_MAT")
            for index, weight in enumerate(self._weights)
        }
        chosen = repacker.choose({"0": uses["0"]})
        if not chosen:
            return None
        repacker.mark(uses, dict.fromkeys(uses, chosen["0"]))
        size = repacker.packed_bytes(uses["0"], chosen["0"])
        whole = content * (self.file_bytes // len(content))
        target = ctypes.create_string_buffer(size + _ALIGNMENT)
        address = -(-ctypes.addressof(target) // _ALIGNMENT) * _ALIGNMENT
        source = ctypes.create_string_buffer(whole, len(whole))
        repacker.repack(uses["0"], ctypes.addressof(source), address)
        return ctypes.string_at(address, size)

    def _reserve(self, size_bytes: int) -> int:
        region = Region(self._library.libc, size_bytes, huge=True)
        self._stack.callback(region.close)
        return region.address


def _quantized(library: LlamaLibrary, ggml_type: GgmlType, known: GgmlFormat) -> bytes | None:
    """Return some rows of the type; None where ggml cannot make any."""
    if ggml_type in _NO_WEIGHTS:
        return None
    base = library.base
    values = np.random.default_rng(0).standard_normal((_QUANTIZED_ROWS, N_COLUMNS), np.float32)
    if ggml_type == GgmlType.F32:
        return values.tobytes()
    importance = np.ones(N_COLUMNS, np.float32)
    needs = base.ggml_quantize_requires_imatrix(ggml_type)
    n_bytes = _QUANTIZED_ROWS * N_COLUMNS // known.block_length * known.block_bytes
    target = ctypes.create_string_buffer(n_bytes)
    written = base.ggml_quantize_chunk(
        ggml_type, values.ctypes.data, target, 0, _QUANTIZED_ROWS, N_COLUMNS,
        importance.ctypes.data if needs else None,
    )  # fmt: skip
    return target.raw if written == n_bytes else None


def _tiny(tensors: Tensors, address: int, n_nodes: int) -> int:
    """Return a graph whose nodes add a few numbers one after the other."""
    node = tensors.matrix(_F32, _TINY_LENGTH, 1, address)
    nodes = []
    for _ in range(n_nodes):
        node = tensors.sum(node, node, address)
        nodes.append(node)
    return tensors.graph(nodes)


def _rate(amount: int, timed: Timed) -> Rate:
    return Rate(
        value=amount / timed.middle_s, origin="measured", spread=timed.spread,
        disturbed=timed.disturbed,
    )  # fmt: skip
