"""Many homes, few workers and trouble: every reply is right or an error with a type."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from edgert.config import directories
from edgert.hosts.identity import create_identity, hosts_folder, load_identity, trust
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.model_files import FileHashes
from hosts_bench.plans import Wanted, known_profile, split_manifest
from hosts_bench.programs import Job, Program, say
from hosts_bench.side import continued_with_margins
from hosts_bench.texts import EMBEDDED, NEAR_TIE, TEXTS
from partition.manifest_file import canonical_json

HERE = Path(__file__).resolve().parent
_ROOM_BYTES = 400_000_000
_DEADLINE_S = 3.0  # of a host for one step
_HANG_S = 90.0  # of a reply, opening the model included
_LEAST_TOKENS, _MOST_TOKENS = 3, 12
_KINDS = ("kill worker", "freeze worker", "kill home", "freeze home")
_FROZEN_S = (0.1, 1.0, 2 * _DEADLINE_S)  # mostly between the first two
_SHARE_LONG = 0.3
_FORGOTTEN_S = 14.0  # after which workers have ended sessions of homes that are gone
_PAUSE_S = (0.1, 1.0)
_GROWTH, _GROWTH_BYTES = 1.15, 24_000_000


@dataclass(frozen=True, slots=True)
class Wish:
    """A text and what one host makes of it."""

    text: str
    made: tuple[int, ...]


@dataclass
class Tally:
    """What became of requests."""

    correct: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    hangs: int = 0
    killed: int = 0
    events: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def n_answered(self) -> int:
        """Requests that had an answer of whatever kind, or none in time."""
        failed = len(self.wrong) + len(self.bugs) + self.hangs
        return self.correct + sum(self.errors.values()) + failed

    @property
    def is_clean(self) -> bool:
        """Whether every answer was right or an error with a type."""
        return not (self.wrong or self.bugs or self.hangs)


class Soak:
    """Workers and homes; `close` ends every process.

    Args:
        work: Folder for everything.
        n_workers: 2 or 3.
        n_homes: At the same time.
        seed: Of texts and trouble.
    """

    def __init__(self, work: Path, n_workers: int, n_homes: int, seed: int) -> None:
        self._work = work
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._closed = False
        self.workers: dict[str, Program] = {}
        self.homes: dict[str, Program] = {}
        self._n_started = 0
        names = [f"h{index}" for index in range(1, n_workers + 1)]
        home_names = [f"home{index}" for index in range(n_homes)]
        self._introduce(names, home_names)
        self._ports = {name: 7611 + 10 * index for index, name in enumerate(names)}
        self._manifests = self._plan(names)
        self.wishes = _wishes()
        for name in names:
            self.start_worker(name)
        self.home_names = home_names

    def start_worker(self, name: str) -> None:
        """Start a worker, the first time or again."""
        port = self._ports[name]
        command = ["-m", "edgert.cli.main", "worker", "--listen", f"127.0.0.1:{port}"]
        command += ["--memory", "12G", "--sessions", "64", "--grace", "1"]
        program = self._program(name, command)
        with self._lock:
            self.workers[name] = program
        program.wait_for("works at")

    def start_home(self, name: str) -> Program:
        """Start a home; which manifest it runs follows from its name."""
        number = int(name.removeprefix("home"))
        manifest, hosts = self._manifests[number % len(self._manifests)]
        addresses = {host: f"127.0.0.1:{self._ports[host]}" for host in hosts}
        job = {"model": str(EMBEDDED), "manifest": str(manifest), "hosts": addresses,
               "deadline_s": _DEADLINE_S}  # fmt: skip
        program = self._program(name, [str(HERE / "soak_home.py"), json.dumps(job)])
        with self._lock:
            self.homes[name] = program
        return program

    def run(self, n_requests: int, until_s: float, tally: Tally, *, trouble: bool) -> None:
        """Have all homes make requests, with trouble or in peace."""
        left = threading.Semaphore(n_requests)
        over = threading.Event()

        def serve(name: str) -> None:
            source = random.Random(f"{name}{n_requests}")
            program = self.start_home(name)
            while time.monotonic() < until_s and left.acquire(blocking=False):
                wish = source.choice(self.wishes)
                if not self._ask(program, wish, tally):
                    program.close()
                    program = self.start_home(name)
            program.close()

        with ThreadPoolExecutor(len(self.home_names) + 1) as pool:
            troubling = pool.submit(self._trouble, over, tally) if trouble else None
            serving = [pool.submit(serve, name) for name in self.home_names]
            try:
                for future in serving:
                    future.result()
            finally:
                over.set()
            if troubling is not None:
                troubling.result()

    def rss(self) -> dict[str, int]:
        """Return the resident bytes of every worker, once sessions without a home are over."""
        time.sleep(_FORGOTTEN_S)
        found = {}
        for name, program in self.workers.items():
            words = Path(f"/proc/{program.pid}/status").read_text().split()
            found[name] = 1024 * int(words[words.index("VmRSS:") + 1])
        return found

    def close(self) -> None:
        """End every process."""
        with self._lock:
            self._closed = True
            programs = [*self.homes.values(), *self.workers.values()]
        for program in programs:
            program.close()

    def _ask(self, program: Program, wish: Wish, tally: Tally) -> bool:
        """Make one request; whether the home goes on."""
        started_s = time.monotonic()
        answer: Job | None
        try:
            answer = program.ask(_HANG_S, text=wish.text, n=len(wish.made))
        except (SystemExit, OSError):
            answer = None
        took_s = time.monotonic() - started_s
        with tally.lock:
            tally.slowest_s = max(tally.slowest_s, took_s)
            if answer is None:
                tally.hangs += took_s >= _HANG_S
                tally.killed += took_s < _HANG_S
            elif "error" in answer:
                tally.errors[answer["error"]] += 1
            elif "bug" in answer:
                tally.bugs.append(answer["bug"])
            elif tuple(answer["made"]) == wish.made:
                tally.correct += 1
            else:
                tally.wrong.append(f"{wish.text}: {answer['made']}, wanted {list(wish.made)}")
            if tally.n_answered % 100 == 0:
                say(f"  {tally.n_answered} answered, {tally.correct} of them correct")
        return answer is not None

    def _trouble(self, over: threading.Event, tally: Tally) -> None:
        """Kill and freeze; the first worker is never killed, so that its memory can be compared."""
        while not over.wait(self._random.uniform(*_PAUSE_S)):
            kind = self._random.choice(_KINDS)
            with self._lock:
                group = self.workers if kind.endswith("worker") else self.homes
                names = sorted(group)[1:] if kind == "kill worker" else sorted(group)
                name = self._random.choice(names) if names else None
                program = group.get(name) if name else None
            if program is None or name is None:
                continue
            tally.events[kind] += 1
            if kind.startswith("kill"):
                program.signal(signal.SIGKILL)
                if kind == "kill worker":
                    over.wait(self._random.uniform(0.0, 2.0))
                    program.close()
                    self.start_worker(name)
                continue
            least_s, middle_s, most_s = _FROZEN_S
            is_long = self._random.random() < _SHARE_LONG
            bounds = (middle_s, most_s) if is_long else (least_s, middle_s)
            program.signal(signal.SIGSTOP)
            over.wait(self._random.uniform(*bounds))
            program.signal(signal.SIGCONT)

    def _program(self, name: str, command: Sequence[str]) -> Program:
        with self._lock:
            if self._closed:
                raise SystemExit("the soak has ended")
            self._n_started += 1
            log = self._work / f"{name}-{self._n_started}.log"
        return Program([sys.executable, *command], log=log, home=self._work / name)

    def _introduce(self, workers: Sequence[str], homes: Sequence[str]) -> None:
        """Give everyone a key; homes trust workers, workers trust homes."""
        known = {}
        for name in (*workers, *homes):
            folder = hosts_folder(directories({"EDGERT_HOME": str(self._work / name)}))
            if not (folder / "certificate.pem").exists():
                create_identity(folder, name)
            known[name] = folder, load_identity(folder)
        for these, those in ((workers, homes), (homes, workers)):
            for one in these:
                for other in those:
                    trust(known[one][0], other, known[other][1].certificate_pem)

    def _plan(self, workers: Sequence[str]) -> list[tuple[Path, list[str]]]:
        """Write a manifest with each worker, and one with the first two."""
        profile = known_profile(EMBEDDED, self._work / "profile")
        hashes = FileHashes()
        pair = canonical_json(
            split_manifest(Wanted(EMBEDDED, (1, 1), _ROOM_BYTES), profile, hashes)
        )
        three = split_manifest(Wanted(EMBEDDED, (2, 1, 1), _ROOM_BYTES), profile, hashes)
        found: list[tuple[Path, list[str]]] = []
        for content, hosts in (
            *((pair.replace(b'"h1"', b'"%s"' % name.encode()), [name]) for name in workers),
            (canonical_json(three), ["h1", "h2"]),
        ):
            path = self._work / f"manifest-{'-'.join(hosts)}.json"
            path.write_bytes(content)
            found.append((path, hosts))
        return found


def is_flat(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether the worker that was never killed has about as much memory as before."""
    return after["h1"] <= max(_GROWTH * before["h1"], before["h1"] + _GROWTH_BYTES)


def _wishes() -> list[Wish]:
    """Return texts with what one host makes of them, up to where rounding might decide."""
    backend = open_backend(LoadOptions(EMBEDDED, n_ctx=256, n_batch=128, n_threads=1))
    found = []
    try:
        for text in TEXTS:
            made, margins = continued_with_margins(backend, text, _MOST_TOKENS)
            n_clear = next((i for i, gap in enumerate(margins) if gap < NEAR_TIE), len(made))
            if n_clear >= _LEAST_TOKENS:
                found.append(Wish(text, tuple(made[:n_clear])))
    finally:
        backend.close()
    return found
