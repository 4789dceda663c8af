"""The parts that many sessions share: opened once for a manifest, freed when nobody uses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from edgert.errors import PlanError
from edgert.hosts.allreduce import Exchange
from edgert.hosts.cloud.lane import Lane
from edgert.hosts.cloud.quota import KeyLimits, Quotas
from edgert.hosts.cloud.shared_part import SharedPart
from edgert.hosts.cloud.step_checks import SharedSizes
from edgert.hosts.runner import Runner
from edgert.hosts.stage_parts import StagePart
from edgert.llama.options import LoadOptions
from quant.model_spec import kv_bytes, read_model_spec

_CELLS = 256  # llama.cpp rounds a KV cache up to so many positions
_LINGER_S = 300.0  # a part that nobody uses is kept for so long
_LONG_ROPE = "rope_factors_long.weight"


@dataclass(frozen=True, slots=True)
class Sharing:
    """How parts are shared.

    Attributes:
        n_sessions: That one part serves at a time.
        n_positions: In its KV cache, all sessions together; None is a whole context for each.
        limits: Of each key.
    """

    n_sessions: int
    n_positions: int | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)


@dataclass(slots=True)
class _Opened:
    """A part, or the place where it is being opened."""

    lock: threading.Lock
    part: SharedPart | None = None
    used_s: float = 0.0


class SharedParts:
    """Opens parts for sessions. Thread-safe.

    Args:
        sharing: How.
        clock: Seconds, for how long a part has been unused.
    """

    def __init__(self, sharing: Sharing, clock: Callable[[], float] = time.monotonic) -> None:
        self._sharing = sharing
        self._clock = clock
        self._quotas = Quotas(sharing.limits)
        self._opened: dict[tuple[str, str], _Opened] = {}
        self._lock = threading.Lock()

    def opener(self, manifest_sha256: str, key: str) -> Callable[[StagePart, Exchange], Runner]:
        """Return what gives a session of a manifest its places in parts.

        Args:
            manifest_sha256: Parts are shared among sessions of the same manifest only.
            key: Whose session it is.
        """

        def take(stage_part: StagePart, exchange: Exchange) -> Runner:
            del exchange
            return self._take(manifest_sha256, key, stage_part)

        return take

    def extra_bytes(self, stage_part: StagePart) -> int:
        """Return what a part takes more than the plan counts, which is for one session.

        Raises:
            PlanError: the part cannot be shared.
        """
        _check_shareable(stage_part)
        options = stage_part.options
        n_ctx, n_cells = options.n_ctx or 0, self._n_cells(options)
        spec = read_model_spec(stage_part.part.file)
        cache = [kv_bytes(spec, n, options.type_k, options.type_v) for n in (n_ctx, n_cells)]
        # Which positions each token sees, as f32 and f16; rows of logits.
        masks = (n_cells - n_ctx) * (options.n_ubatch or options.n_batch) * 6
        rows = self._n_rows(options) - options.n_logits_max
        return cache[1] - cache[0] + masks + 4 * rows * stage_part.part.n_vocab

    def is_open(self, manifest_sha256: str) -> bool:
        """Whether parts of a manifest take memory."""
        with self._lock:
            return any(sha256 == manifest_sha256 for sha256, _ in self._opened)

    def free_unused(self, linger_s: float = _LINGER_S) -> None:
        """Close parts that nobody has used for a while."""
        now_s = self._clock()
        with self._lock:
            unused = [
                key
                for key, item in self._opened.items()
                if item.part is not None
                and not item.part.n_taken
                and now_s - item.used_s >= linger_s
                and item.lock.acquire(blocking=False)
            ]
            closing = [self._opened.pop(key) for key in unused]
        for item in closing:
            if item.part is not None:
                item.part.close()
            item.lock.release()

    def close(self) -> None:
        """Close every part, and end what is computed."""
        with self._lock:
            closing, self._opened = list(self._opened.values()), {}
        for item in closing:
            with item.lock:
                if item.part is not None:
                    item.part.close()

    def facts(self) -> list[dict[str, object]]:
        """Return what is shared, for people."""
        with self._lock:
            opened = [(key, item.part) for key, item in self._opened.items() if item.part]
        return [
            {
                "manifest": manifest[:16],
                "sessions": part.n_taken,
                "sessions_per_batch": part.sessions_per_batch,
                "resident_bytes": part.counters().resident_weight_bytes,
            }
            for (manifest, _), part in opened
        ]

    def _take(self, manifest_sha256: str, key: str, stage_part: StagePart) -> Lane:
        name = manifest_sha256, str(stage_part.part.file.path)
        while True:
            with self._lock:
                item = self._opened.setdefault(name, _Opened(threading.Lock()))
            with item.lock:
                with self._lock:
                    if self._opened.get(name) is not item:
                        continue  # it was freed meanwhile
                try:
                    if item.part is not None and item.part.is_closed:  # it failed
                        item.part.close()
                        item.part = None
                    if item.part is None:
                        item.part = self._open(stage_part)
                    item.used_s = self._clock()
                    return Lane(item.part, key, self._quotas, self._touch(item))
                except BaseException:
                    if item.part is None:
                        with self._lock:
                            self._opened.pop(name, None)
                    raise

    def _touch(self, item: _Opened) -> Callable[[], None]:
        def touch() -> None:
            item.used_s = self._clock()

        return touch

    def _open(self, stage_part: StagePart) -> SharedPart:
        extra_bytes = self.extra_bytes(stage_part)
        options = stage_part.options
        n_cells, memory_bytes = self._n_cells(options), options.memory_bytes
        asked = replace(
            options,
            n_sequences=self._sharing.n_sessions,
            n_cells=n_cells,
            n_logits_max=self._n_rows(options),
            memory_bytes=None if memory_bytes is None else memory_bytes + extra_bytes,
        )
        runner = replace(stage_part, options=asked).open(Exchange())
        try:
            sizes = SharedSizes(self._sharing.n_sessions, options.n_ctx or n_cells, n_cells)
            return SharedPart(runner, sizes)
        except BaseException:
            runner.close()
            raise

    def _n_cells(self, options: LoadOptions) -> int:
        n_ctx = options.n_ctx or 0
        wanted = self._sharing.n_positions or n_ctx * self._sharing.n_sessions
        return -(-max(wanted, n_ctx) // _CELLS) * _CELLS

    def _n_rows(self, options: LoadOptions) -> int:
        """Return how many outputs a batch may have: one of each session, and one more."""
        return min(max(options.n_logits_max, self._sharing.n_sessions + 1), options.n_batch)


def _check_shareable(stage_part: StagePart) -> None:
    stage, file = stage_part.stage, stage_part.part.file
    if stage.share is not None and stage_part.part.spec.n_layer:
        raise PlanError(
            f"stage {stage.stage_id} shares its layers with other hosts, which compute for one "
            "session at a time",
            hint="plan stages of whole layers, or use a worker that shares no parts",
        )
    if any(entry.name == _LONG_ROPE for entry in file.tensors):
        raise PlanError(
            f"stage {stage.stage_id} is of a model that rotates by the length of the whole cache",
            hint="use a worker that shares no parts",
        )
