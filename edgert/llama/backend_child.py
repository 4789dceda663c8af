"""Child process that lists llama.cpp's devices: `python -m edgert.llama.backend_child`.

Its last line is a `Runtime` as JSON, or `error: ` and a reason.
"""

from __future__ import annotations

import ctypes
import sys

from devices.profile import Runtime
from edgert.errors import EdgertError
from edgert.llama.lib import LlamaLibrary, load_library

EXIT_FAILED = 5


def runtime(library: LlamaLibrary) -> Runtime:
    """List the devices, each with what it says of itself."""
    count = library.ggml.ggml_backend_dev_count()
    devices = [library.ggml.ggml_backend_dev_get(index) for index in range(count)]
    backends = tuple(_describe(library, device) for device in devices)
    return Runtime(name="llama.cpp", version=library.version, backends=backends)


def _describe(library: LlamaLibrary, device: int) -> str:
    base = library.base
    name, text = base.ggml_backend_dev_name(device), base.ggml_backend_dev_description(device)
    free_bytes, total_bytes = ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(device, ctypes.byref(free_bytes), ctypes.byref(total_bytes))
    memory = f", {total_bytes.value:,} bytes" if total_bytes.value else ""
    return f"{name.decode(errors='replace')} ({text.decode(errors='replace')}{memory})"


def main() -> int:
    """Print the runtime; the exit code says whether there is one."""
    try:
        line = runtime(load_library()).model_dump_json()
    except EdgertError as error:
        sys.stdout.write(f"error: {str(error).splitlines()[0]}\n")
        return EXIT_FAILED
    sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
