"""Where experts lie in memory: slots of equal stride that ggml's routed products index.

`mul_mat_id` finds expert i of a stack at `data + i * nb[2]` (ggml/src/ggml-cpu/ggml-cpu.c). So a
tensor whose data is the first slot, whose `nb[2]` is the distance of slots, and whose ids are slots
reads experts of any layer wherever they were put, with the stock kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from edgert.errors import CapacityError
from edgert.experts.loads import Load
from edgert.experts.routed import Stack
from edgert.experts.slots import SlotPool
from edgert.llama.lib import LlamaLibrary, tensor_at
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, page_end
from edgert.weights.memory import Region
from edgert.weights.source import Place, WeightSource
from partition.expert_slots import SlotUse, share_slots, slot_stride

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Form:
    """How the experts of one stack lie in the file and in memory.

    Attributes:
        stack: The stack.
        place: All of it in the file.
        memory_bytes: One expert in memory.
        buft: The repacking buffer type whose kernels will read it; None for plain ones.
        repack: Whether its bytes are repacked on the way in, or lie in the file as they should.
    """

    stack: Stack
    place: Place
    memory_bytes: int
    buft: int | None = None
    repack: bool = False

    @property
    def file_bytes(self) -> int:
        """One expert in the file."""
        return self.place.size_bytes // self.stack.n_experts

    @property
    def aligned(self) -> bool:
        """Whether all experts begin at the same offset within a page."""
        return not self.repack and self.file_bytes % PAGE_BYTES == 0

    @property
    def skew_bytes(self) -> int:
        """Where in its slot an expert begins."""
        return self.place.offset_bytes % PAGE_BYTES if self.aligned else 0

    @property
    def stride_bytes(self) -> int:
        """Length of a slot; an expert is read with the pages around it."""
        size = self.memory_bytes if self.repack else self.file_bytes
        return slot_stride(size, repacked=self.repack, page_bytes=PAGE_BYTES)

    @property
    def slot_use(self) -> SlotUse:
        """What the stack wants of the cache."""
        return SlotUse(self.stack.turn, self.stack.n_experts, self.stride_bytes)

    def extent(self, expert: int, address: int) -> Extent:
        """Return one expert's bytes for `address`, which is congruent to their offset."""
        place = self.place
        offset = place.offset_bytes + expert * self.file_bytes
        return Extent(place.file_index, offset, self.file_bytes, address, place.name)


def forms_of(
    library: LlamaLibrary,
    source: WeightSource,
    stacks: Sequence[Stack],
    chosen: Mapping[str, int],
    *,
    repack: bool,
) -> tuple[Form, ...]:
    """Return how each stack lies; `chosen` are the repacking buffer types by name.

    Args:
        library: The checked libraries.
        source: Where the bytes are; a packed one has them repacked already.
        stacks: Every stack.
        chosen: Buffer types for the weights that have repacked kernels.
        repack: Whether plain bytes are to be repacked on the way in.
    """
    forms = []
    for stack in stacks:
        place = source.place(stack.name)
        in_file = place != source.original(stack.name)
        buft = chosen.get(stack.name) if repack or in_file else None
        size = place.size_bytes // stack.n_experts
        if buft is not None and not in_file:
            whole = library.base.ggml_backend_buft_get_alloc_size(buft, min(stack.addresses))
            size = whole // stack.n_experts
        forms.append(Form(stack, place, size, buft, repack=buft is not None and not in_file))
    return tuple(forms)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Slots of one stride, and the stacks whose experts they hold."""

    stride_bytes: int
    n_slots: int
    stacks: tuple[int, ...]


def plan_pools(forms: Sequence[Form], n_used: int, budget_bytes: int) -> tuple[PoolPlan, ...]:
    """Share a budget among pools by what their stacks weigh.

    Args:
        forms: Of every stack.
        n_used: Experts that one token chooses.
        budget_bytes: For all pools together, never exceeded.

    Raises:
        CapacityError: a pool would not hold one token's experts of one layer.
    """
    slots = share_slots([form.slot_use for form in forms], n_used, budget_bytes)
    return tuple(
        PoolPlan(stride, n, tuple(f.stack.index for f in forms if f.stride_bytes == stride))
        for stride, n in slots.items()
    )


class Arena:
    """The memory of every pool, the tensors that read it, and what fills it.

    Args:
        library: The checked libraries.
        reader: Reads the files.
        forms: Of every stack, in order.
        plans: Of every pool.
        n_loaders: Threads that call `bring`, each with its number.
    """

    def __init__(
        self,
        library: LlamaLibrary,
        reader: FlashReader,
        forms: Sequence[Form],
        plans: Sequence[PoolPlan],
        n_loaders: int,
    ) -> None:
        self._reader = reader
        self.forms = forms
        self.pools = [SlotPool(plan.n_slots) for plan in plans]
        self.pool_of = {index: n for n, plan in enumerate(plans) for index in plan.stacks}
        self._strides = [plan.stride_bytes for plan in plans]
        with ExitStack() as stack:
            self._addresses = []
            for plan in plans:
                region = Region(library.libc, plan.n_slots * plan.stride_bytes, huge=True)
                stack.callback(region.close)
                self._addresses.append(region.address)
            self._tensors = _Tensors(library, forms, n_loaders)
            stack.callback(self._tensors.close)
            self._bind()
            staging = max((page_end(f.file_bytes) for f in forms if f.repack), default=0)
            self._staging = [Region(library.libc, staging + PAGE_BYTES, huge=False)
                             for _ in range(n_loaders if staging else 0)]  # fmt: skip
            for region in self._staging:
                stack.callback(region.close)
            self._resources = stack.pop_all()

    @property
    def slot_bytes(self) -> int:
        """Memory of every slot."""
        pairs = zip(self.pools, self._strides, strict=True)
        return sum(pool.n_slots * stride for pool, stride in pairs)

    def tensor_of(self, stack: int) -> int:
        """Return the tensor that reads a stack's experts by slot."""
        return self._tensors.stacks[stack]

    def bring(self, load: Load, number: int) -> None:
        """Read one expert into its slot; for the loader's threads.

        Raises:
            FormatError: it cannot be read.
        """
        form = self.forms[load.stack]
        pool = self.pool_of[load.stack]
        slot = self._addresses[pool] + load.slot * self._strides[pool]
        skew = (form.place.offset_bytes + load.expert * form.file_bytes) % PAGE_BYTES
        if form.repack:
            source = self._staging[number].address + skew
            self._reader.read_here(form.extent(load.expert, source))
            self._tensors.repack(load.stack, number, source, slot)
            return
        self._reader.read_here(form.extent(load.expert, slot + skew))
        if not form.aligned and skew:
            ctypes.memmove(slot, slot + skew, form.file_bytes)

    def close(self) -> None:
        """Give everything back; nothing may be loading or computing."""
        self._resources.close()

    def _bind(self) -> None:
        for form in self.forms:
            pool = self.pool_of[form.stack.index]
            tensor = tensor_at(self._tensors.stacks[form.stack.index])
            tensor.data = self._addresses[pool] + form.skew_bytes
            tensor.ne[2] = self.pools[pool].n_slots
            tensor.nb[2] = self._strides[pool]
            tensor.nb[3] = self._strides[pool] * self.pools[pool].n_slots


class _Tensors:
    """Tensors of one ggml context: one for each stack, and one a thread to repack with."""

    def __init__(self, library: LlamaLibrary, forms: Sequence[Form], n_loaders: int) -> None:
        self._base = library.base
        self._resources = ExitStack()
        n_tensors = len(forms) * (1 + n_loaders)
        self._context = library.new_context(n_tensors)
        self._resources.callback(self._base.ggml_free, self._context)
        self._buffers: dict[int, tuple[int, int]] = {}
        self.stacks = [self._new(form) for form in forms]
        self._proxies: dict[tuple[int, int, int, int], list[int]] = {}
        for form in forms:
            if form.repack and _shape(form) not in self._proxies:
                self._proxies[_shape(form)] = [self._new(form) for _ in range(n_loaders)]
        self._shapes = [_shape(form) for form in forms]

    def repack(self, stack: int, number: int, source: int, target: int) -> None:
        """Repack one expert with the proxy of a thread."""
        proxy = self._proxies[self._shapes[stack]][number]
        tensor_at(proxy).data = target
        size = self._base.ggml_nbytes(proxy)
        self._base.ggml_backend_tensor_set(proxy, source, 0, size)

    def close(self) -> None:
        """Free them."""
        self._resources.close()

    def _new(self, form: Form) -> int:
        """Return a tensor of one expert; repacked kernels read it if the form says so."""
        stack = form.stack
        tensor: int = self._base.ggml_new_tensor_3d(
            self._context, stack.ggml_type, stack.row_length, stack.n_rows, 1
        )
        if form.buft is not None:
            buffer, start = self._buffer(form.buft, tensor)
            self._base.ggml_backend_tensor_alloc(buffer, tensor, start)
        return tensor

    def _buffer(self, buft: int, tensor: int) -> tuple[int, int]:
        """Return a buffer that marks tensors as repacked and its start; it holds nothing."""
        size = self._base.ggml_backend_buft_get_alloc_size(buft, tensor)
        known = self._buffers.get(buft)
        if known is None or self._base.ggml_backend_buffer_get_size(known[0]) < size:
            buffer = self._base.ggml_backend_buft_alloc_buffer(buft, size + _ALIGNMENT_BYTES)
            if not buffer:
                raise CapacityError(f"ggml cannot reserve {size:,} bytes for repacking")
            self._resources.callback(self._base.ggml_backend_buffer_free, buffer)
            self._buffers[buft] = known = (
                buffer,
                self._base.ggml_backend_buffer_get_base(buffer),
            )
        return known


def _shape(form: Form) -> tuple[int, int, int, int]:
    stack = form.stack
    return stack.ggml_type, stack.row_length, stack.n_rows, form.buft or 0
