"""Sparse twins of GGUF files: the header's bytes, then nothing, so that loading reads no weight."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

from edgert.errors import BackendError, FormatError
from edgert.llama.lib import NativeLog
from quant.formats import GgmlType, NestedType, type_named
from quant.nested.blocks import block_form
from quant.tensor_file import Shard, TensorFile

# Said by llama_model_loader (src/llama-model-loader.cpp) once every file is open and measured, and
# before any of them is mapped.
_FILES_ARE_OPEN = "loaded meta data with"
_COPY_BYTES = 1 << 20


class SparseTwin:
    """In-memory files that look like the shards of a model while llama.cpp opens them.

    llama.cpp maps a file with MAP_POPULATE, which would fill every page of a hole. So a twin has
    its full length only until llama.cpp has measured it; then it shrinks to the header, and
    populating the rest of the mapping finds nothing to do. The mapped addresses beyond the header
    must not be touched: the owner of the weights puts its own memory there or rebinds the tensors.

    Args:
        file: The validated original.
        log: The native log, which says when the files are open.
    """

    def __init__(self, file: TensorFile, log: NativeLog) -> None:
        self._log = log
        self._shards = file.shards
        self._shrunk = False
        self._descriptors: list[int] = []
        stand_ins = _stand_ins(file)
        try:
            for shard in file.shards:
                self._descriptors.append(_make_twin(shard, stand_ins))
        except OSError:
            self.close()
            raise
        self.paths = [Path(f"/proc/self/fd/{number}") for number in self._descriptors]
        log.listen(self._on_log)

    def after_load(self) -> None:
        """Check that the twins shrank in time.

        Raises:
            BackendError: the line that says so never came; the memory bound would not hold.
        """
        self._unhook()
        if not self._shrunk:
            raise BackendError("llama.cpp did not announce its open files; untested version?")

    def close(self) -> None:
        """Close the twins; mappings of them stay valid."""
        self._unhook()
        for number in self._descriptors:
            os.close(number)
        self._descriptors.clear()

    def _on_log(self, line: str) -> None:
        if _FILES_ARE_OPEN in line and not self._shrunk:
            for number, shard in zip(self._descriptors, self._shards, strict=True):
                os.ftruncate(number, shard.data_offset_bytes)
            self._shrunk = True

    def _unhook(self) -> None:
        self._log.leave(self._on_log)


def _make_twin(shard: Shard, stand_ins: Mapping[bytes, bytes]) -> int:
    """Return a descriptor of an in-memory file: the shard's header, then a hole to its length."""
    number = os.memfd_create("edgert-twin", os.MFD_CLOEXEC)
    with shard.path.open("rb") as source:
        shard.check_unchanged(source.fileno())
        header = source.read(shard.data_offset_bytes)
    if len(header) < shard.data_offset_bytes:
        os.close(number)
        raise FormatError("file ended inside its header", path=shard.path)
    for info, stand_in in stand_ins.items():
        if header.count(info) == 1:
            header = header.replace(info, stand_in)
    view = memoryview(header)
    while view:
        view = view[os.write(number, view[:_COPY_BYTES]) :]
    os.ftruncate(number, shard.size_bytes)
    return number


def _stand_ins(file: TensorFile) -> dict[bytes, bytes]:
    """Return what llama.cpp is told of tensors whose types only edgert knows.

    A nested expert has exactly the bytes of one in the ggml type of its top width, so a header with
    that type instead is as valid, and its offsets are as they were.
    """
    found = {}
    for entry in file.tensors:
        kind = entry.ggml_type
        if isinstance(kind, NestedType):
            name = entry.name.encode()
            shape = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape)
            info = struct.pack("<Q", len(name)) + name + shape
            stand_in = GgmlType(type_named(block_form(kind.top, kind.top).name))
            found[info + struct.pack("<I", kind)] = info + struct.pack("<I", stand_in)
    return found
