"""Loads and checks the libraries of llama-cpp-python; the only module that knows their C types."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from edgert.errors import BackendError

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.3.36",)
GGML_OP_GET_ROWS_NAME = b"GET_ROWS"
_LOADING = threading.Lock()
_MOST_OPERATIONS = 64  # asking for the name of a number that does not exist reads past a table
_LOG_LEVEL_WARN, _LOG_LEVEL_ERROR = 3, 4


Handle: TypeAlias = Any  # an opaque C pointer or structure of llama_cpp
Symbols: TypeAlias = Any  # a loaded shared library, or the llama_cpp module


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml/include/ggml.h); its layout is verified by `load_library`."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.c_void_p * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class TensorFields(Protocol):
    """The fields of a `ggml_tensor` that edgert reads and writes; addresses are integers."""

    type: int
    buffer: int | None
    ne: MutableSequence[int]
    nb: MutableSequence[int]
    op: int
    src: MutableSequence[int | None]
    view_src: int | None
    view_offs: int
    data: int | None
    name: bytes
    extra: int | None


def tensor_at(address: int) -> TensorFields:
    """Return the tensor structure at an address; its fields read and write memory."""
    fields: TensorFields = Tensor.from_address(address)
    return fields


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_PTR, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_BASE_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_PTR, [_InitParams]),
    "ggml_free": (None, [_PTR]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_new_tensor_2d": (_PTR, [_PTR, _INT, ctypes.c_int64, ctypes.c_int64]),
    "ggml_new_tensor_3d": (_PTR, [_PTR, _INT, *[ctypes.c_int64] * 3]),
    "ggml_new_tensor": (_PTR, [_PTR, _INT, _INT, ctypes.POINTER(ctypes.c_int64)]),
    "ggml_set_name": (_PTR, [_PTR, ctypes.c_char_p]),
    "ggml_get_name": (ctypes.c_char_p, [_PTR]),
    "ggml_get_data": (_PTR, [_PTR]),
    "ggml_nbytes": (_SIZE, [_PTR]),
    "ggml_mul_mat": (_PTR, [_PTR, _PTR, _PTR]),
    "ggml_mul_mat_id": (_PTR, [_PTR, _PTR, _PTR, _PTR]),
    "ggml_view_2d": (_PTR, [_PTR, _PTR, ctypes.c_int64, ctypes.c_int64, _SIZE, _SIZE]),
    "ggml_op_name": (ctypes.c_char_p, [_INT]),
    "ggml_type_name": (ctypes.c_char_p, [_INT]),
    "ggml_backend_reg_get_proc_address": (_PTR, [_PTR, ctypes.c_char_p]),
    "ggml_backend_dev_backend_reg": (_PTR, [_PTR]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_PTR, _PTR]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_PTR]),
    "ggml_backend_buft_alloc_buffer": (_PTR, [_PTR, _SIZE]),
    "ggml_backend_buft_get_alloc_size": (_SIZE, [_PTR, _PTR]),
    "ggml_backend_buffer_get_base": (_PTR, [_PTR]),
    "ggml_backend_buffer_get_type": (_PTR, [_PTR]),
    "ggml_backend_buffer_get_size": (_SIZE, [_PTR]),
    "ggml_backend_buffer_free": (None, [_PTR]),
    "ggml_backend_tensor_alloc": (_INT, [_PTR, _PTR, _PTR]),
    "ggml_backend_tensor_set": (None, [_PTR, _PTR, _SIZE, _SIZE]),
    "ggml_permute": (_PTR, [_PTR, _PTR, *[_INT] * 4]),
    "ggml_flash_attn_ext": (_PTR, [_PTR] * 5 + [ctypes.c_float] * 3),
    "ggml_add": (_PTR, [_PTR, _PTR, _PTR]),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_new_graph_custom": (_PTR, [_PTR, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_PTR, _PTR]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [_INT]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _PTR, _PTR, *[ctypes.c_int64] * 3, _PTR]),
    "ggml_backend_dev_init": (_PTR, [_PTR, ctypes.c_char_p]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [_PTR]),
    "ggml_backend_dev_description": (ctypes.c_char_p, [_PTR]),
    "ggml_backend_dev_type": (_INT, [_PTR]),
    "ggml_backend_dev_memory": (None, [_PTR, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)]),
    "ggml_backend_free": (None, [_PTR]),
    "ggml_backend_graph_compute": (_INT, [_PTR, _PTR]),
}
_GGML_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_dev_by_type": (_PTR, [_INT]),
    "ggml_backend_dev_count": (_SIZE, []),
    "ggml_backend_dev_get": (_PTR, [_SIZE]),
}

# The line after the one that says why.
_NO_REASON = ": failed to load model"


@dataclass(slots=True)
class NativeLog:
    """What the native libraries say: to `logging`, the last warnings kept for error messages."""

    problems: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    _hooks: list[tuple[int, Callable[[str], None]]] = field(default_factory=list)

    def listen(self, hook: Callable[[str], None]) -> None:
        """Tell a hook every line that this thread causes; others may open models meanwhile."""
        self._hooks.append((threading.get_ident(), hook))

    def leave(self, hook: Callable[[str], None]) -> None:
        """Tell a hook no more; nothing happens if it does not listen."""
        for entry in tuple(self._hooks):
            if entry[1] == hook:
                self._hooks.remove(entry)

    @contextmanager
    def heard_by(self, hook: Callable[[str], None]) -> Iterator[None]:
        """Let a hook listen for a while."""
        self.listen(hook)
        try:
            yield
        finally:
            self.leave(hook)

    def receive(self, level: int, text: bytes | None, _user: int | None) -> None:
        """Take one log line (`llama_log_callback`)."""
        line = (text or b"").decode("utf-8", "replace").rstrip()
        for thread, hook in tuple(self._hooks):
            if thread == threading.get_ident():
                hook(line)
        if level in (_LOG_LEVEL_WARN, _LOG_LEVEL_ERROR) and line:
            self.problems.append(line)
        logger.debug("%s", line)

    def last_problem(self) -> str:
        """Return the newest warning or error that gives a reason, or a phrase for none."""
        reasons = [line for line in self.problems if not line.endswith(_NO_REASON)]
        return (reasons or [*self.problems] or ["llama.cpp gave no reason"])[-1]


@dataclass(frozen=True, slots=True)
class LlamaLibrary:
    """The checked libraries: `api` is `llama_cpp`, `base` libggml-base, `ggml` libggml."""

    api: Symbols
    base: Symbols
    ggml: Symbols
    libc: Symbols
    version: str
    folder: Path
    log: NativeLog
    keep_alive: tuple[Any, ...]

    def op_name(self, op: int) -> bytes:
        """Return the name of a ggml operation, such as b"MUL_MAT"."""
        name: bytes = self.base.ggml_op_name(op)
        return name

    def op_number(self, name: bytes) -> int:
        """Return the number of a ggml operation; BackendError if this version has none."""
        for number in range(_MOST_OPERATIONS):
            if self.op_name(number) == name:
                return number
        raise BackendError(f"ggml has no operation {name.decode()}")

    def new_context(self, n_tensors: int, n_graph_nodes: int = 0) -> int:
        """Return a ggml context for `n_tensors` tensors without data; free it with `ggml_free`.

        Args:
            n_tensors: How many it has room for.
            n_graph_nodes: Room for one graph of so many nodes besides.
        """
        size = self.base.ggml_tensor_overhead() * n_tensors
        if n_graph_nodes:
            size += self.base.ggml_graph_overhead_custom(n_graph_nodes, False)
        context: int = self.base.ggml_init(_InitParams(size, None, True))
        return context

    def system_info(self) -> str:
        """Return the processor features that the kernels were built for and found."""
        info: bytes = self.api.llama_print_system_info()
        return info.decode()


def load_library() -> LlamaLibrary:
    """Import llama-cpp-python, check its version and the tensor layout, and silence its log.

    Raises:
        BackendError: not installed, an untested version, a missing symbol, or another layout.
    """
    # Threads that come first together must not load twice: llama.cpp has one log callback, and that
    # of the copy which nobody keeps would be freed while it is called.
    with _LOADING:
        return _load_library()


@functools.cache
def _load_library() -> LlamaLibrary:
    version = _installed_version()
    # Threads of an OpenMP team wait by spinning. Unbounded, one descheduled thread costs the others
    # its whole time slice at every barrier: a small model beside a busy process was measured a
    # thousand times slower. A short spin keeps the speed of an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    try:
        api: Symbols = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"llama-cpp-python {version} cannot be loaded: {error}",
            hint="reinstall it: pip install --force-reinstall llama-cpp-python",
        ) from error
    folder = Path(str(api.__file__)).parent / "lib"
    base = _open(folder, "ggml-base", _BASE_PROTOTYPES)
    ggml = _open(folder, "ggml", _GGML_PROTOTYPES)
    log = NativeLog()
    callback = api.llama_log_callback(log.receive)
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    libc = _open_libc()
    verify_layout(base)
    return LlamaLibrary(api, base, ggml, libc, version, folder, log, (callback,))


def verify_layout(base: Symbols, layout: type[ctypes.Structure] = Tensor) -> None:
    """Compare `layout` with real tensors as the library itself reads them.

    Args:
        base: libggml-base with prototypes set.
        layout: The structure to check; a parameter so that a test can plant a wrong one.

    Raises:
        BackendError: a field is not where it should be.
    """
    context = base.ggml_init(_InitParams(1 << 20, None, False))
    try:
        weight = base.ggml_new_tensor_2d(context, 0, 64, 3)
        base.ggml_set_name(weight, b"layout-probe")
        view = base.ggml_view_2d(context, weight, 64, 1, 256, 256)
        product = base.ggml_mul_mat(context, weight, view)
        seen: Any = layout.from_address(weight)
        node: Any = layout.from_address(product)
        part: Any = layout.from_address(view)
        checks = {
            "name": seen.name == base.ggml_get_name(weight) == b"layout-probe",
            "data": seen.data == base.ggml_get_data(weight) and seen.data is not None,
            "ne": list(seen.ne) == [64, 3, 1, 1],
            "nb": list(seen.nb) == [4, 256, 768, 768] and base.ggml_nbytes(weight) == 768,
            "op": base.ggml_op_name(node.op) == b"MUL_MAT",
            "src": node.src[0] == weight and node.src[1] == view and node.src[2] is None,
            "view": part.view_src == weight and part.view_offs == 256,
            "buffer": seen.buffer is None and seen.extra is None,
        }
    finally:
        base.ggml_free(context)
    wrong = [name for name, good in checks.items() if not good]
    if wrong:
        raise BackendError(
            f"struct ggml_tensor has another layout than tested: {', '.join(wrong)}",
            hint=f"install a tested llama-cpp-python: {', '.join(TESTED_VERSIONS)}",
        )


def _installed_version() -> str:
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            "llama-cpp-python is not installed",
            hint=f"pip install llama-cpp-python=={TESTED_VERSIONS[-1]}",
        ) from error
    if version not in TESTED_VERSIONS:
        raise BackendError(
            f"llama-cpp-python {version} is not tested, wanted {' or '.join(TESTED_VERSIONS)}",
            hint=f"pip install llama-cpp-python=={TESTED_VERSIONS[-1]}",
        )
    return version


def _open(folder: Path, name: str, prototypes: dict[str, tuple[Any, list[Any]]]) -> Symbols:
    candidates = [folder / f"lib{name}.so", folder / f"lib{name}.dylib"]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise BackendError(f"lib{name} is missing in {folder}")
    library = ctypes.CDLL(str(path))
    for symbol, (result, arguments) in prototypes.items():
        try:
            function = getattr(library, symbol)
        except AttributeError as error:
            raise BackendError(f"{path.name} has no symbol {symbol}") from error
        function.restype, function.argtypes = result, arguments
    return library


def _open_libc() -> Symbols:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = _PTR
    libc.mmap.argtypes = [_PTR, _SIZE, _INT, _INT, _INT, ctypes.c_long]
    libc.munmap.argtypes = [_PTR, _SIZE]
    libc.madvise.argtypes = [_PTR, _SIZE, _INT]
    return libc
