"""ggml's repacked weights: which tensors have them, and turning a tensor's bytes into that form.

Repacked rows are interleaved for one processor's kernels. The buffer that marks a tensor as
repacked holds nothing here: it only makes ggml choose the kernels, while the bytes lie wherever the
tensor's data pointer says (ggml/src/ggml-cpu/repack.cpp).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from edgert.errors import BackendError
from edgert.llama.lib import LlamaLibrary, Symbols, tensor_at
from edgert.weights.uses import WeightUse

_CPU_DEVICE = 0
_PROBE_TOKENS = 512
_F32, _I32 = 0, 26
# Built with gcc 12, ggml's AMX kernels load a truncated tile configuration and the next tile
# instruction ends the process with SIGILL, after every check for AMX has passed. Which compiler
# built the library cannot be seen from here, and no speed is worth a dead process.
AVOIDED_BUFFERS = frozenset({b"AMX"})


class Repacker:
    """Knows ggml's repacking buffers and uses them; owns the buffers it marks tensors with.

    Args:
        library: The checked libraries.
    """

    def __init__(self, library: LlamaLibrary) -> None:
        self._library = library
        base = library.base
        self._device = library.ggml.ggml_backend_dev_by_type(_CPU_DEVICE)
        self.types = [
            buft
            for buft in self._extra_types()
            if base.ggml_backend_buft_name(buft) not in AVOIDED_BUFFERS
        ]
        self._buffers: list[int] = []

    def choose(self, uses: Mapping[str, WeightUse]) -> dict[str, int]:
        """Return the buffer type for each weight that has repacked kernels, by name."""
        chosen: dict[str, int] = {}
        for use in uses.values():
            if use.viewed or use.lookups or len(use.addresses) != 1:
                continue
            for buft in self.types:
                if self._supports(buft, use):
                    chosen[use.name] = buft
                    break
        return chosen

    def packed_bytes(self, use: WeightUse, buft: int) -> int:
        """Return the length of a weight in its repacked form."""
        size: int = self._library.base.ggml_backend_buft_get_alloc_size(buft, _address_of(use))
        return size

    def mark(self, uses: Mapping[str, WeightUse], chosen: Mapping[str, int]) -> None:
        """Make ggml treat the chosen weights as repacked; their data pointers are unset then."""
        base = self._library.base
        for buft in sorted(set(chosen.values())):
            names = [name for name, of in chosen.items() if of == buft]
            largest = max(self.packed_bytes(uses[name], buft) for name in names)
            buffer = base.ggml_backend_buft_alloc_buffer(buft, largest)
            if not buffer:
                raise BackendError(f"ggml cannot reserve {largest:,} bytes for repacking")
            self._buffers.append(buffer)
            start = base.ggml_backend_buffer_get_base(buffer)
            for name in names:
                address = _address_of(uses[name])
                tensor = tensor_at(address)
                tensor.buffer = tensor.data = tensor.extra = None
                base.ggml_backend_tensor_alloc(buffer, address, start)

    def repack(self, use: WeightUse, source_address: int, target_address: int) -> None:
        """Repack a marked weight's original bytes into memory at `target_address`.

        The tensor's data pointer is left there. Callable from several threads for several weights.
        """
        address = _address_of(use)
        tensor = tensor_at(address)
        tensor.data = target_address
        size = self._library.base.ggml_nbytes(address)
        self._library.base.ggml_backend_tensor_set(address, source_address, 0, size)

    def kernels(self) -> str:
        """Name the repacking buffers in use, for people and for fingerprints."""
        names = [self._library.base.ggml_backend_buft_name(buft).decode() for buft in self.types]
        return "+".join(names) or "none"

    def close(self) -> None:
        """Free the buffers; nothing may be computed with the marked weights any more."""
        for buffer in self._buffers:
            self._library.base.ggml_backend_buffer_free(buffer)
        self._buffers.clear()

    def _extra_types(self) -> list[int]:
        base = self._library.base
        registry = base.ggml_backend_dev_backend_reg(self._device)
        function = base.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not function:
            return []
        prototype = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        listed = prototype(function)(self._device)
        types: list[int] = []
        while listed and listed[len(types)]:
            types.append(listed[len(types)])
        return types

    def _supports(self, buft: int, use: WeightUse) -> bool:
        """Ask ggml as llama.cpp does (`weight_buft_supported`, src/llama-model-loader.cpp)."""
        base = self._library.base
        with _Scratch(self._library) as context:
            weight = _like(base, context, _address_of(use))
            tensor = tensor_at(weight)
            if use.operation == b"MUL_MAT":
                # A weight may be one matrix for each head; ggml aborts where the other has fewer.
                shape = (ctypes.c_int64 * 4)(tensor.ne[0], _PROBE_TOKENS, *tensor.ne[2:])
                other = base.ggml_new_tensor(context, _F32, 4, shape)
                node = base.ggml_mul_mat(context, weight, other)
            elif use.operation == b"MUL_MAT_ID":
                other = base.ggml_new_tensor_3d(context, _F32, tensor.ne[0], 1, _PROBE_TOKENS)
                ids = base.ggml_new_tensor_2d(context, _I32, 1, _PROBE_TOKENS)
                node = base.ggml_mul_mat_id(context, weight, other, ids)
            else:
                return False
            buffer = base.ggml_backend_buft_alloc_buffer(buft, 0)
            tensor.buffer = buffer
            supported = bool(base.ggml_backend_dev_supports_op(self._device, node))
            base.ggml_backend_buffer_free(buffer)
            return supported


class _Scratch:
    """A ggml context for tensors without data."""

    def __init__(self, library: LlamaLibrary) -> None:
        self._library = library
        self._context: int | None = None

    def __enter__(self) -> int:
        self._context = context = self._library.new_context(8)
        return context

    def __exit__(self, *_: object) -> None:
        self._library.base.ggml_free(self._context)


def _like(base: Symbols, context: int, address: int) -> int:
    """Return a new tensor of the type and shape of another."""
    model = tensor_at(address)
    shape = (ctypes.c_int64 * 4)(*model.ne)
    n_dims = max(index + 1 for index in range(4) if shape[index] > 1 or index == 0)
    tensor: int = base.ggml_new_tensor(context, model.type, n_dims, shape)
    return tensor


def _address_of(use: WeightUse) -> int:
    return min(use.addresses)
