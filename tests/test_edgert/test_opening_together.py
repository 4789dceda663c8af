"""Threads that open models at the same time, as a worker of several homes does."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import threading
from edgert.embedded import EMBEDDED_DRAFT, embedded_path
from edgert.llama.lib import load_library
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions

n_threads = 6
together = threading.Barrier(n_threads)
libraries, rows = [], []

def work():
    together.wait()
    libraries.append(load_library())
    backend = open_backend(LoadOptions(embedded_path(EMBEDDED_DRAFT), n_ctx=256, n_threads=1))
    rows.append(backend.decode([1, 2, 3], 0, 1).tobytes())
    backend.close()

threads = [threading.Thread(target=work) for _ in range(n_threads)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len({id(library) for library in libraries}) == 1, libraries
assert len(rows) == n_threads and len(set(rows)) == 1, len(rows)
"""


def test_threads_open_models_together_from_the_first_moment_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
