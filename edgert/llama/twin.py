"""Sparse twins of GGUF files: the header's bytes, then nothing, so that loading reads no weight."""

from __future__ import annotations

import os
from pathlib import Path

from edgert.errors import BackendError, FormatError
from edgert.llama.lib import NativeLog
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
        try:
            for shard in file.shards:
                self._descriptors.append(_make_twin(shard))
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


def _make_twin(shard: Shard) -> int:
    """Return a descriptor of an in-memory file: the shard's header, then a hole to its length."""
    number = os.memfd_create("edgert-twin", os.MFD_CLOEXEC)
    with shard.path.open("rb") as source:
        shard.check_unchanged(source.fileno())
        left = shard.data_offset_bytes
        while left:
            piece = source.read(min(left, _COPY_BYTES))
            if not piece:
                os.close(number)
                raise FormatError("file ended inside its header", path=shard.path)
            os.write(number, piece)
            left -= len(piece)
    os.ftruncate(number, shard.size_bytes)
    return number
