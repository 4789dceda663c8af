"""Child process that measures the program itself: `python -m edgert.cli.program_child`.

A control group counts a process's own memory, the page cache of the files it reads, and what the
kernel keeps for it. Its last line is a number of bytes as a JSON `Figure`.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from devices.profile import Figure
from edgert.errors import EdgertError
from edgert.llama.lib import load_library

EXIT_FAILED = 5
# What `edgert chat` loads before its first token.
_MODULES = (
    "edgert.api", "edgert.cli.app", "edgert.cli.chat", "edgert.cli.chat_repl",
    "edgert.cli.deploying", "edgert.deployment", "edgert.template", "prompt_toolkit.shortcuts",
)  # fmt: skip
# Page tables, inodes and buffers of the process: seen as the difference between a control group's
# count and the pages of the process, which hardly varies.
_KERNEL_BYTES = 14 << 20
# Pages that the kernel reads ahead around those a program touches, seen with a cold cache. Without
# it, files that other programs hold in the cache would count here.
_READ_AHEAD = 2.65


def program_bytes() -> int:
    """Return what a control group counts for the program with no model loaded.

    Raises:
        BackendError: llama.cpp cannot be loaded.
    """
    for name in _MODULES:
        importlib.import_module(name)
    library = load_library()
    mapped = sum(_cached_bytes(library.libc, path) for path in set(_mapped()))
    compiled = sum(_cached_bytes(library.libc, path) for path in set(_compiled()))
    files = min(mapped, int(_READ_AHEAD * _status_bytes("RssFile:"))) + compiled
    return _status_bytes("RssAnon:") + files + _KERNEL_BYTES


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _mapped() -> Iterator[Path]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) > 5 and fields[5].startswith("/"):
            yield Path(fields[5])


def _compiled() -> Iterator[Path]:
    for module in list(sys.modules.values()):
        cached = getattr(getattr(module, "__spec__", None), "cached", None)
        if isinstance(cached, str):
            yield Path(cached)


def _cached_bytes(libc: ctypes.CDLL, path: Path) -> int:
    """Return how much of a file is in the page cache (mincore(2)); 0 if it cannot be said."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return 0
            with mmap.mmap(
                file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            ) as view:
                n_pages = -(-size // mmap.PAGESIZE)
                resident = (ctypes.c_ubyte * n_pages)()
                address = ctypes.addressof(ctypes.c_char.from_buffer(view))
                failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
    except (OSError, ValueError, BufferError):
        return 0
    return 0 if failed else mmap.PAGESIZE * sum(page & 1 for page in resident)


def main() -> int:
    """Print the figure; the exit code says whether there is one."""
    try:
        figure = Figure(value=float(program_bytes()), origin="measured")
    except EdgertError as error:
        sys.stdout.write(f"error: {str(error).splitlines()[0]}\n")
        return EXIT_FAILED
    sys.stdout.write(figure.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
