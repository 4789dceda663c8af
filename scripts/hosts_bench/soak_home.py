"""One home of the soak: opens a model over several hosts, continues texts, survives its errors.

usage: soak_home.py '{"model": ..., "manifest": ..., "hosts": {...}, "deadline_s": 5}'

Every line {"text": ..., "n": ...} on stdin is answered by {"made": [...]}, by {"error": TYPE} for
an error of edgert, or by {"bug": ...} for any other; after an error the model is opened anew.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from edgert.config import directories
from edgert.deployment import deploy
from edgert.errors import EdgertError
from edgert.host_deployment import HostsAsk
from edgert.llama.backend import Backend
from edgert.model_files import FileHashes
from partition.manifest_file import read_manifest

Job = dict[str, Any]


class Home:
    """A home, its model open while nothing went wrong."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._backend: Backend | None = None

    def answer(self, job: Job) -> Job:
        """Continue a text."""
        try:
            if self._backend is None:
                self._backend = self._open()
            return {"made": continued(self._backend, job["text"], job["n"])}
        except EdgertError as error:
            self.close()
            return {"error": type(error).__name__, "message": error.message}
        except Exception:  # noqa: BLE001  the soak is about errors that nobody expected
            self.close()
            return {"bug": traceback.format_exc()}

    def close(self) -> None:
        """Close the model, so that sessions end."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _open(self) -> Backend:
        folders = directories(os.environ)
        ask = HostsAsk(folders, self._job["hosts"], deadline_s=self._job["deadline_s"])
        path = Path(self._job["manifest"])
        model, hashes = Path(self._job["model"]), FileHashes(folders.cache)
        return deploy(read_manifest(path), path, model, hashes, hosts=ask).open()


def continued(backend: Backend, text: str, n_tokens: int) -> list[int]:
    """Return the greedy continuation of a text, so many tokens or up to its end."""
    prompt = backend.vocab.tokenize(text, parse_special=True)
    backend.truncate(0)
    logits = backend.decode(prompt, 0, 1)[0]
    made: list[int] = []
    while len(made) < n_tokens:
        made.append(int(logits.argmax()))
        if backend.vocab.is_eog(made[-1]):
            break
        logits = backend.decode([made[-1]], len(prompt) + len(made) - 1, 1)[0]
    return made


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    home = Home(json.loads(sys.argv[1]))
    signal.signal(signal.SIGTERM, _leave)
    try:
        for line in sys.stdin:
            print(json.dumps(home.answer(json.loads(line))), flush=True)
    finally:
        home.close()


if __name__ == "__main__":
    main()
