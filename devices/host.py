"""What this host has: memory within its control groups, usable cores, CPU features."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a page-aligned number near 2**63
_LEAST_MARGIN_BYTES = 128 * 10**6
_MARGIN_SHARE = 0.1
_N_QUOTA_AND_PERIOD = 2
_CPUINFO_KEYS = ("flags", "Features", "isa", "features")
_PART_KEYS = ("CPU implementer", "CPU variant", "CPU part", "CPU revision")


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """One control group with a memory limit.

    Attributes:
        path: Its folder.
        limit_bytes: The hard limit, or the lower one from which on the kernel slows it down.
        used_bytes: What counts against it and cannot be reclaimed: page cache is left out.
    """

    path: Path
    limit_bytes: int
    used_bytes: int

    @property
    def room_bytes(self) -> int:
        """What may still be allocated."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Memory a process should bound itself to by default, and why."""

    budget_bytes: int
    available_bytes: int
    margin_bytes: int
    reason: str


def memory_groups(root: Path = ROOT) -> list[GroupMemory]:
    """List the control groups around this process that limit memory, innermost first.

    Args:
        root: Where /proc and /sys/fs/cgroup are looked up.

    Returns:
        Groups of both cgroup versions, from the process's own up to the mount.
    """
    found: list[GroupMemory] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mount, read = root / "sys/fs/cgroup", _read_v2
            if not (mount / "cgroup.controllers").exists():
                mount /= "unified"
        elif "memory" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup/memory", _read_v1
        else:
            continue
        found += [memory for folder in _folders(mount, group) if (memory := read(folder))]
    return found


def available_bytes(root: Path = ROOT) -> tuple[int, str]:
    """Return the memory this process may still take, and what bounds it."""
    best, reason = int(psutil.virtual_memory().available), "memory available on this machine"
    for group in memory_groups(root):
        if group.room_bytes < best:
            best = group.room_bytes
            reason = f"limit of {group.limit_bytes:,} bytes in control group {group.path}"
    return best, reason


def default_memory_budget(root: Path = ROOT) -> MemoryBudget:
    """Choose the bound for the whole process when a person names none.

    What the process already holds belongs to it and is added to what is available; a margin for
    everything else on the machine is taken off.
    """
    free_bytes, reason = available_bytes(root)
    total_bytes = free_bytes + int(psutil.Process().memory_info().rss)
    margin_bytes = max(_LEAST_MARGIN_BYTES, int(total_bytes * _MARGIN_SHARE))
    return MemoryBudget(max(1, total_bytes - margin_bytes), free_bytes, margin_bytes, reason)


def n_usable_cpus(root: Path = ROOT) -> int:
    """Count the logical CPUs this process may run on, whose time its control groups grant.

    Args:
        root: Where /proc and /sys/fs/cgroup are looked up.
    """
    known = hasattr(os, "sched_getaffinity")
    n_cpus = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min([n_cpus, *(math.ceil(share) for share in _cpu_shares(root))]))


def n_physical_cores(root: Path = ROOT) -> int:
    """Count the cores behind those CPUs: hyper-threads of one core count once."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return len({_core(cpu, root) for cpu in usable}) or n_usable_cpus(root)


def _core(cpu: int, root: Path) -> str:
    """Name the core of a CPU by the CPUs that share it: core ids start anew in every cluster."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if siblings := _read(topology / name).strip():
            return siblings
    core, package = _read(topology / "core_id"), _read(topology / "physical_package_id")
    return f"{package.strip()} {core.strip()}" if core.strip() else f"cpu{cpu}"


def _cpu_shares(root: Path) -> Iterator[float]:
    """Yield how many CPUs' time each control group around this process grants."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
            if not (mount / "cgroup.controllers").exists():
                mount /= "unified"
            texts = [_read(folder / "cpu.max").split() for folder in _folders(mount, group)]
        elif "cpu" in controllers.split(","):
            folders = [
                folder
                for name in dict.fromkeys(("cpu", controllers))
                for folder in _folders(root / "sys/fs/cgroup" / name, group)
            ]
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            texts = [[_read(folder / name).strip() for name in names] for folder in folders]
        else:
            continue
        for text in texts:
            # Without a limit the quota is "max", or -1.
            if len(text) == _N_QUOTA_AND_PERIOD and all(part.isdecimal() for part in text):
                quota, period = map(int, text)
                if quota > 0 and period > 0:
                    yield quota / period


def cpu_features(root: Path = ROOT) -> list[str]:
    """List the CPU's instruction-set flags as the kernel names them, sorted; of the first CPU."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in _CPUINFO_KEYS:
            return sorted(set(value.split()))
    return []


def cpu_name(root: Path = ROOT) -> str:
    """Return the processor's name, the board's where the kernel gives none, else its type."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware"):
            return value.strip()
    return _board(root) or platform.machine()


def cpu_parts(root: Path = ROOT) -> list[str]:
    """List what cores there are where cpuinfo has numbers instead of a name (ARM), sorted.

    Each is the implementer, its part number, variant and revision; the board is one more.
    """
    parts, current = set(), dict.fromkeys(_PART_KEYS, "")
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in current:
            current[key.strip()] = value.strip()
        if key.strip() == _PART_KEYS[-1]:  # the last line of a core
            parts.add(" ".join(current.values()))
    board = _board(root)
    return sorted(parts) + ([board] if board else [])


def _board(root: Path) -> str:
    return _read(root / "proc/device-tree/model").strip("\0 \n")


def peak_resident_bytes(root: Path = ROOT) -> int:
    """Return the most memory this process ever held, mapped file pages included."""
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def peak_group_bytes(root: Path = ROOT) -> int | None:
    """Return the peak of the innermost limiting control group, page cache included; None if none.

    It covers every process the group has had.
    """
    for group in memory_groups(root):
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if (text := _read(group.path / name).strip()).isdigit():
                return int(text)
    return None


def cpu_fingerprint(system_info: str = "", root: Path = ROOT) -> str:
    """Identify the CPU feature set that packed weights belong to.

    Args:
        system_info: What llama.cpp says it was compiled for.
        root: Where /proc is looked up.
    """
    text = " ".join(cpu_features(root)) + "\n" + " ".join(system_info.split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folders(mount: Path, group: str) -> list[Path]:
    """List the folders from a group up to its mount; inside a container only the mount exists."""
    path = PurePosixPath("/" + group.lstrip("/"))
    names = [path, *path.parents]
    return [mount / str(name).lstrip("/") for name in names if ".." not in name.parts]


def _read_v1(folder: Path) -> GroupMemory | None:
    return _group(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def _read_v2(folder: Path) -> GroupMemory | None:
    return _group(folder, ("memory.max", "memory.high"), "memory.current", "")


def _group(
    folder: Path, limit_names: Sequence[str], usage_name: str, prefix: str
) -> GroupMemory | None:
    found = [_read(folder / name).strip() for name in limit_names]
    limits = [int(text) for text in found if text.isdigit() and int(text) < _UNLIMITED_BYTES]
    usage = _read(folder / usage_name).strip()
    if not limits or not usage.isdigit():
        return None
    counts = dict(
        line.split(maxsplit=1)
        for line in _read(folder / "memory.stat").splitlines()
        if len(line.split()) == 2
    )
    caches = (f"{prefix}active_file", f"{prefix}inactive_file")
    cached = sum(int(counts.get(name, 0)) for name in caches)
    return GroupMemory(folder, min(limits), max(0, int(usage) - cached))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
