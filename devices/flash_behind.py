"""What storage lies behind a path, from what the kernel says about block devices."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from devices.host import ROOT
from devices.profile import FlashKind

_MOUNT = re.compile(
    r"^\d+ \d+ (?P<number>\d+:\d+) \S+ (?P<point>\S+) .*?- (?P<system>\S+) (?P<source>\S+)"
)
_ESCAPED = re.compile(r"\\([0-7]{3})")  # spaces and backslashes of mount points


@dataclass(frozen=True, slots=True)
class Storage:
    """Where files lie.

    Attributes:
        name: Of the block device, such as `nvme0n1`; where there is none the file system with what
            is mounted, such as `nfs4 server:/models`.
        kind: Bounds what is plausible.
    """

    name: str
    kind: FlashKind


def storage_behind(path: Path, root: Path = ROOT) -> Storage:
    """Return the storage that holds `path`, or the nearest folder above it that exists.

    Args:
        path: A file or folder.
        root: Where /sys and /proc are looked up.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    number = place.stat().st_dev
    return storage_of(f"{os.major(number)}:{os.minor(number)}", root, place.resolve())


def storage_of(number: str, root: Path = ROOT, place: Path | None = None) -> Storage:
    """Return the storage with a device number such as `259:2`.

    Args:
        number: As the kernel tells it; btrfs, overlays and network file systems make numbers up,
            which need not be those of their mounts.
        root: Where /sys and /proc are looked up.
        place: A path there without links: the mount point above it stands in for the number.
    """
    device = root / "sys/dev/block" / number
    if not device.exists():
        system, source = _mounted(number, place, root)
        device = root / "sys/class/block" / _device_name(source, root)
        if not source.startswith("/dev/") or not device.exists():
            return Storage(_mount_name(system, source) or f"device {number}", "virtual")
    return _disk(device.resolve(), n_left=4)


def _device_name(source: str, root: Path) -> str:
    """Return the kernel's name of a device: mapped ones are mounted by a link to it."""
    path = root / source.lstrip("/")
    return path.resolve().name if path.is_symlink() else Path(source).name


def _mount_name(system: str, source: str) -> str:
    """Name a mount: what is mounted tells two of the same system apart."""
    return system if source in ("", "none", system) else f"{system} {source}"


def _disk(device: Path, n_left: int) -> Storage:
    """Follow partitions and mapped devices down to a disk."""
    if (device / "partition").exists():
        device = device.parent
    below = sorted((device / "slaves").glob("*")) if (device / "slaves").is_dir() else []
    if below and n_left > 0:
        return _disk(below[0].resolve(), n_left - 1)
    return Storage(device.name, _kind(device))


def _kind(device: Path) -> FlashKind:
    name, place = device.name, str(device).lower()
    if name.startswith("nvme"):
        return "nvme"
    if name.startswith("mmcblk"):
        return "sd" if _text(device / "device/type").upper() == "SD" else "emmc"
    if name.startswith("sd"):
        return "ufs" if "ufs" in place else "sata"
    return "virtual"


def _mounted(number: str, place: Path | None, root: Path) -> tuple[str, str]:
    """Return type and source of the mount with a number, else of the nearest one above a place."""
    nearest: tuple[str, str] = "", ""
    n_most = -1
    for line in _text(root / "proc/self/mountinfo").splitlines():
        match = _MOUNT.match(line)
        if match is None:
            continue
        found = match["system"], match["source"]
        if match["number"] == number:
            return found
        point = Path(_ESCAPED.sub(lambda code: chr(int(code[1], 8)), match["point"]))
        # Of mounts at the same point the last one covers the others.
        if place is not None and place.is_relative_to(point) and len(point.parts) >= n_most:
            nearest, n_most = found, len(point.parts)
    return nearest


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
