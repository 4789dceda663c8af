"""Which build of the kernels is installed, without loading it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

_LIBRARY = "libggml-cpu.*"


def kernel_build() -> str:
    """Identify the installed kernels: version of the package and a digest of their library."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return "none"
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin else None
    digest = hashlib.sha256()
    for path in sorted(folder.glob(_LIBRARY)) if folder is not None else ():
        digest.update(path.read_bytes())
    return f"llama-cpp-python {version} {digest.hexdigest()[:16]}"
