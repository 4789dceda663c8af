"""Writes a model's packed file: every repackable weight, one at a time, atomically."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from edgert.errors import CapacityError, ConfigError
from edgert.events import Listener, LoadProgress, ignore
from edgert.llama.lib import LlamaLibrary, load_library
from edgert.llama.options import LoadOptions
from edgert.weights.flash import PAGE_BYTES, FlashReader, page_end
from edgert.weights.loading import LoadedModel, load_absent
from edgert.weights.memory import Region, span_bytes
from edgert.weights.packed import (
    PackedHeader,
    PackedWeight,
    encode_header,
    kernels_key,
    model_key,
    packed_path,
)
from edgert.weights.repack import Repacker
from edgert.weights.source import FileSource
from edgert.weights.uses import WeightUse
from quant.tensor_file import TensorFile, open_tensor_file

_KEEP_FREE_BYTES = 64 << 20


def write_packed(model: Path, out: Path | None, folder: Path, listener: Listener = ignore) -> Path:
    """Repack a model's weights for this processor into one file.

    Args:
        model: The GGUF file.
        out: The file to write; None names it by content in `folder`.
        folder: The cache folder.
        listener: Hears `LoadProgress`.

    Returns:
        The packed file.

    Raises:
        ConfigError: nothing to repack, or the place cannot be written to.
        CapacityError: the disk is too full.
    """
    file = open_tensor_file(model)
    library = load_library()
    options = LoadOptions(model, n_ctx=64, n_batch=2, n_logits_max=1)
    with ExitStack() as stack:
        loaded = load_absent(library, file, options, stack)
        repacker = Repacker(library)
        stack.callback(repacker.close)
        chosen = repacker.choose(loaded.uses)
        if not chosen:
            raise ConfigError(
                "ggml repacks none of this model's weights on this processor",
                hint="run it without --packed",
            )
        sizes = {n: repacker.packed_bytes(loaded.uses[n], buft) for n, buft in chosen.items()}
        header = _header(library, file, repacker, loaded.uses, sizes)
        path = out or packed_path(folder, file, header.kernels)
        repacker.mark(loaded.uses, chosen)
        _write(path, header, _Packer(library, file, loaded, repacker), listener)
    return path


class _Packer:
    """Reads and repacks one weight after the other into memory of its own."""

    def __init__(
        self, library: LlamaLibrary, file: TensorFile, loaded: LoadedModel, repacker: Repacker
    ) -> None:
        self._library = library
        self._source = FileSource(file)
        self._uses = loaded.uses
        self._repacker = repacker

    def pieces(
        self, header: PackedHeader, listener: Listener, stack: ExitStack
    ) -> Iterator[memoryview]:
        """Yield each weight's packed bytes, padded to pages; valid until the next one."""
        places = [self._source.place(weight.name) for weight in header.weights]
        libc = self._library.libc
        original = Region(
            libc, max(span_bytes(p.offset_bytes, p.size_bytes) for p in places), huge=True
        )
        stack.callback(original.close)
        packed = Region(libc, max(page_end(w.size_bytes) for w in header.weights), huge=True)
        stack.callback(packed.close)
        reader = FlashReader(self._source.paths, self._source.sizes_bytes)
        stack.callback(reader.close)  # before the memory it reads into
        done = 0
        for weight, place in zip(header.weights, places, strict=True):
            address = original.address + place.offset_bytes % PAGE_BYTES
            reader.read(place.at(address))
            self._repacker.repack(self._uses[weight.name], address, packed.address)
            padded = page_end(weight.size_bytes)
            tail = padded - weight.size_bytes
            ctypes.memset(packed.address + weight.size_bytes, 0, tail)
            yield memoryview((ctypes.c_char * padded).from_address(packed.address)).cast("B")
            done += weight.size_bytes
            listener(LoadProgress(done, header.data_bytes))


def _header(
    library: LlamaLibrary,
    file: TensorFile,
    repacker: Repacker,
    uses: Mapping[str, WeightUse],
    sizes: Mapping[str, int],
) -> PackedHeader:
    offset = 0
    weights = []
    for name in sorted(sizes, key=lambda name: uses[name].order):
        weights.append(PackedWeight(name=name, offset_bytes=offset, size_bytes=sizes[name]))
        offset += page_end(sizes[name])
    return PackedHeader(
        model=model_key(file), kernels=kernels_key(library, repacker), weights=tuple(weights)
    )


def _write(path: Path, header: PackedHeader, packer: _Packer, listener: Listener) -> None:
    """Write beside `path`, make it durable, then rename; a failure leaves nothing behind."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        status = os.statvfs(path.parent)
        room = status.f_bavail * status.f_frsize
        needed = header.data_bytes + _KEEP_FREE_BYTES
        if room < needed:
            raise CapacityError(
                f"{path.parent} has {room:,} bytes free, the packed file needs {needed:,}",
                needed_bytes=needed,
                available_bytes=room,
                hint="free space, or write it elsewhere with --out FILE",
            )
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(number, "wb", buffering=0) as stream, ExitStack() as stack:
                stream.write(encode_header(header))
                for piece in packer.pieces(header, listener, stack):
                    _write_piece(stream.fileno(), piece)
                os.fsync(stream.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", hint="choose a place with --out FILE"
        ) from error


def _write_piece(number: int, piece: memoryview) -> None:
    """Write all of it and drop it from the page cache, which belongs to others."""
    while piece:
        piece = piece[os.write(number, piece) :]
    os.fdatasync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
