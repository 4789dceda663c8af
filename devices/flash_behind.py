"""What storage lies behind a path, from what the kernel says about block devices."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from devices.host import ROOT
from devices.profile import FlashKind

_MOUNT = re.compile(r"^\d+ \d+ (?P<number>\d+:\d+) \S+ \S+ .*? - (?P<system>\S+) (?P<source>\S+)")


@dataclass(frozen=True, slots=True)
class Storage:
    """Where files lie.

    Attributes:
        name: Of the block device, such as `nvme0n1`, or of the file system where there is none.
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
    return storage_of(f"{os.major(number)}:{os.minor(number)}", root)


def storage_of(number: str, root: Path = ROOT) -> Storage:
    """Return the storage with a device number such as `259:2`."""
    device = root / "sys/dev/block" / number
    if not device.exists():
        system, source = _mounted(number, root)
        device = root / "sys/class/block" / Path(source).name
        if not source.startswith("/dev/") or not device.exists():
            return Storage(system or f"device {number}", "virtual")
    return _disk(device.resolve(), n_left=4)


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


def _mounted(number: str, root: Path) -> tuple[str, str]:
    """Return the type and source of the file system with a device number."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        match = _MOUNT.match(line)
        if match and match["number"] == number:
            return match["system"], match["source"]
    return "", ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
