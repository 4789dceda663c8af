"""Memory of nested experts: slots by width, as blocks that ggml's kernels read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.experts.routed import Stack
from edgert.experts.slots import SlotPool
from edgert.llama.lib import LlamaLibrary, tensor_at
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, page_end
from edgert.weights.memory import Region
from partition.expert_slots import SlotUse, share_level_slots
from quant.formats import GgmlType, type_named
from quant.nested.assemble import rewiden, to_ggml
from quant.nested.blocks import block_form
from quant.nested.file import NestedTensor
from quant.nested.layout import Words

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LevelForm:
    """How the experts of one stack lie at one level.

    Attributes:
        stack: The stack.
        nested: Its bytes in the file.
        level: Index into the policy's widths.
        width: Bits of this stack at this level.
    """

    stack: Stack
    nested: NestedTensor
    level: int
    width: int

    @property
    def gain(self) -> int:
        """What its values are multiplied by, in 1/1024."""
        return self.nested.gain(self.width)

    @property
    def memory_bytes(self) -> int:
        """One expert in memory."""
        layout = self.nested.layout
        return layout.n_groups * block_form(self.width, layout.top).block_bytes

    @property
    def stride_bytes(self) -> int:
        """Length of a slot."""
        return page_end(self.memory_bytes)

    @property
    def slot_use(self) -> SlotUse:
        """What the stack wants of a cache at this level."""
        return SlotUse(self.stack.turn, self.stack.n_experts, self.stride_bytes, self.level)

    @property
    def ggml_type(self) -> GgmlType:
        """The type of the kernels that read it."""
        kind = type_named(block_form(self.width, self.nested.layout.top).name)
        return GgmlType(kind)

    def extent(self, expert: int, first: int, address: int) -> Extent:
        """Return the bytes of an expert from plane `first` + 1 on (0: from its scales on).

        Args:
            expert: Which.
            first: Planes that are there already.
            address: Congruent to the offset modulo the page size.
        """
        layout = self.nested.layout
        start, size = 0, layout.prefix_bytes(self.width)
        if first:
            start, size = layout.planes_span(first, self.width)
        offset = self.nested.offset_bytes(expert) + start
        return Extent(self.nested.entry.shard_index, offset, size, address, self.nested.entry.name)


@dataclass(frozen=True, slots=True)
class LevelPool:
    """Slots of one stride, and the (stack, level) pairs they hold."""

    stride_bytes: int
    n_slots: int
    members: tuple[tuple[int, int], ...]


def plan_level_pools(
    forms: Sequence[Sequence[LevelForm]],
    shares: Sequence[float],
    n_used: int,
    budget_bytes: int | None,
) -> tuple[LevelPool, ...]:
    """Share a budget among slots of every length.

    An expert that is widened within slots of one length takes two until its planes have arrived.

    Args:
        forms: By stack, then by level.
        shares: How much of all use is at each level.
        n_used: Experts that one token chooses.
        budget_bytes: For all of them; None for the least there can be.

    Raises:
        CapacityError: one token's experts would not fit, whatever their widths.
    """
    every = [form for levels in forms for form in levels]
    slots = share_level_slots([form.slot_use for form in every], shares, n_used, budget_bytes)
    return tuple(
        LevelPool(
            stride, n_slots,
            tuple((f.stack.index, f.level) for f in every if f.stride_bytes == stride),
        )
        for stride, n_slots in slots.items()
    )  # fmt: skip


class NestedArena:
    """The memory of every pool, the tensors that read it, and what fills it.

    Args:
        library: The checked libraries.
        reader: Reads the model's files.
        forms: By stack, then by level.
        plans: Of every pool.
        n_loaders: Threads that fill slots, each with its number.
    """

    def __init__(
        self,
        library: LlamaLibrary,
        reader: FlashReader,
        forms: Sequence[Sequence[LevelForm]],
        plans: Sequence[LevelPool],
        n_loaders: int,
    ) -> None:
        self._reader = reader
        self.forms = forms
        self.pools = [SlotPool(plan.n_slots) for plan in plans]
        self.pool_of = {pair: n for n, plan in enumerate(plans) for pair in plan.members}
        self._strides = [plan.stride_bytes for plan in plans]
        self.tensors: dict[tuple[int, int], int] = {}
        with ExitStack() as stack:
            self._addresses = []
            for plan in plans:
                region = Region(library.libc, plan.n_slots * plan.stride_bytes, huge=True)
                stack.callback(region.close)
                self._addresses.append(region.address)
            every = [form for levels in forms for form in levels]
            context = library.new_context(len(every))
            stack.callback(library.base.ggml_free, context)
            for form in every:
                self.tensors[form.stack.index, form.level] = self._tensor(library, context, form)
            longest = max(form.nested.layout.expert_bytes for form in every)
            self._staging = [
                Region(library.libc, page_end(longest) + PAGE_BYTES, huge=False)
                for _ in range(n_loaders)
            ]
            for region in self._staging:
                stack.callback(region.close)
            self._scratch = Region(
                library.libc, max(form.stride_bytes for form in every), huge=False
            )
            stack.callback(self._scratch.close)
            self._scratch_context = library.new_context(len(every))
            stack.callback(library.base.ggml_free, self._scratch_context)
            self._scratch_tensors: dict[tuple[int, int], int] = {}
            self._library = library
            self._resources = stack.pop_all()

    @property
    def slot_bytes(self) -> int:
        """Memory of every slot."""
        pairs = zip(self.pools, self._strides, strict=True)
        return sum(pool.n_slots * stride for pool, stride in pairs)

    def fill(self, form: LevelForm, expert: int, slot: int, number: int) -> None:
        """Read an expert up to this form's width and assemble its blocks.

        Raises:
            FormatError: it cannot be read.
        """
        layout = form.nested.layout
        prefix = self._read(form, expert, 0, number)
        scales, planes = layout.split(prefix, form.width)
        blocks = self._blocks(form, slot)
        to_ggml(scales, planes, form.width, layout.top, blocks, form.gain)

    def widen(
        self,
        forms: tuple[LevelForm, LevelForm],
        expert: int,
        slots: tuple[int, int],
        number: int,
    ) -> None:
        """Read only the planes that a narrower form lacks, and add them.

        Args:
            forms: The narrower and the wider one.
            expert: Which.
            slots: Of the narrower and of the wider blocks.
            number: Of the calling thread.
        """
        narrow, form = forms
        layout = form.nested.layout
        planes = None
        if form.width > narrow.width:
            words = self._read(form, expert, narrow.width, number).view(np.dtype("<u4"))
            planes = words.reshape(form.width - narrow.width, layout.n_groups)
        _rewiden(forms, self._blocks(narrow, slots[0]), planes, self._blocks(form, slots[1]))

    def narrow(self, wide: LevelForm, form: LevelForm, slots: tuple[int, int]) -> None:
        """Drop planes: write the blocks of a wider form as those of a narrower one."""
        source, target = self._blocks(wide, slots[0]), self._blocks(form, slots[1])
        _rewiden((wide, form), source, None, target)

    def narrowed(self, wide: LevelForm, form: LevelForm, slot: int) -> int:
        """Write what is in a slot of a wider form to scratch memory, in fewer bits.

        Returns:
            A tensor with that one expert, valid until the next call.
        """
        target = _bytes_at(self._scratch.address, form.memory_bytes)
        _rewiden((wide, form), self._blocks(wide, slot), None, target)
        key = form.stack.index, form.level
        if key not in self._scratch_tensors:
            tensor: int = self._library.base.ggml_new_tensor_3d(
                self._scratch_context, int(form.ggml_type), form.stack.row_length,
                form.stack.n_rows, 1,
            )  # fmt: skip
            tensor_at(tensor).data = self._scratch.address
            self._scratch_tensors[key] = tensor
        return self._scratch_tensors[key]

    def read_bytes(self, form: LevelForm, narrow: LevelForm | None) -> int:
        """Return what bringing a form takes from flash, given a narrower one that is there."""
        layout = form.nested.layout
        if narrow is None:
            return layout.prefix_bytes(form.width)
        return layout.planes_span(narrow.width, form.width)[1]

    def close(self) -> None:
        """Give everything back; nothing may be loading or computing."""
        self._resources.close()

    def _read(self, form: LevelForm, expert: int, first: int, number: int) -> Bytes:
        start = self._staging[number].address
        offset = form.extent(expert, first, start).offset_bytes
        address = start + offset % PAGE_BYTES
        extent = form.extent(expert, first, address)
        self._reader.read_here(extent)
        return _bytes_at(address, extent.size_bytes)

    def _blocks(self, form: LevelForm, slot: int) -> Bytes:
        pool = self.pool_of[form.stack.index, form.level]
        address = self._addresses[pool] + slot * self._strides[pool]
        return _bytes_at(address, form.memory_bytes)

    def _tensor(self, library: LlamaLibrary, context: int, form: LevelForm) -> int:
        stack = form.stack
        address: int = library.base.ggml_new_tensor_3d(
            context, int(form.ggml_type), stack.row_length, stack.n_rows, 1
        )
        pool = self.pool_of[stack.index, form.level]
        tensor = tensor_at(address)
        tensor.data = self._addresses[pool]
        tensor.ne[2] = self.pools[pool].n_slots
        tensor.nb[2] = self._strides[pool]
        tensor.nb[3] = self._strides[pool] * self.pools[pool].n_slots
        return address


def _rewiden(
    forms: tuple[LevelForm, LevelForm], source: Bytes, planes: Words | None, target: Bytes
) -> None:
    before, after = forms
    widths, gains = (before.width, after.width), (before.gain, after.gain)
    rewiden(source, planes, widths, after.nested.layout.top, target, gains)


def _bytes_at(address: int, n_bytes: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))
