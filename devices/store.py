"""Profiles of this machine on disk: keyed by its fingerprint, with an age, written atomically."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from devices.profile import FileModel, FlashProfile, HostProfile, KernelRate
from edgert.errors import ConfigError, DeviceError

Clock = Callable[[], float]

_MOST_FILE_BYTES = 1 << 22
_HINT = "edgert devices --measure"


class Record(FileModel):
    """What the file holds.

    Attributes:
        profile: Of this machine.
        flash: By name of the block device; several disks may have been measured.
    """

    format_version: Literal[1] = 1
    profile: HostProfile
    flash: dict[str, FlashProfile] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """A profile that was found, and how old its newest figures are."""

    profile: HostProfile
    age_s: float


@dataclass(frozen=True, slots=True)
class ProfileStore:
    """Reads and writes profiles of one machine.

    Attributes:
        folder: Where they lie.
        fingerprint: Of this machine and its kernels.
        clock: Seconds since 1970.
    """

    folder: Path
    fingerprint: str
    clock: Clock = time.time

    @property
    def path(self) -> Path:
        """The file of this machine."""
        return self.folder / f"{self.fingerprint}.json"

    def load(self, storage: str | None = None) -> Stored | None:
        """Return the profile of this machine, None if it was never measured.

        Args:
            storage: Name of a block device; the profile's flash is the one measured there, None
                where that was never done.

        Raises:
            ConfigError: the file is damaged, or of another machine; names both fingerprints.
        """
        record = self._read()
        if record is None:
            return None
        require_same(record.profile, self.fingerprint, str(self.path))
        flash = record.flash.get(storage) if storage is not None else record.profile.flash
        profile = record.profile.model_copy(update={"flash": flash})
        return Stored(profile, max(0.0, self.clock() - (profile.measured_at_s or 0.0)))

    def save(self, profile: HostProfile, storage: str | None = None) -> HostProfile:
        """Write the profile, keeping rates of types and disks that it does not have; return it.

        Raises:
            ConfigError: it is of another machine.
            DeviceError: it cannot be written.
        """
        require_same(profile, self.fingerprint, "the new profile")
        try:
            old = self._read()
        except ConfigError:
            old = None  # damaged: replaced
        flash = dict(old.flash) if old is not None else {}
        if old is not None and old.profile.fingerprint == self.fingerprint:
            profile = merged(old.profile, profile)
        profile = profile.model_copy(update={"measured_at_s": self.clock()})
        if storage is not None and profile.flash is not None:
            flash[storage] = profile.flash
        record = Record(profile=profile, flash=flash)
        write_atomically(self.path, record.model_dump_json(indent=1) + "\n")
        return profile

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from measuring or writing at the same time.

        Raises:
            DeviceError: another one is at it, or the folder cannot be written.
        """
        lock = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceError(f"{lock}: cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DeviceError(
                    f"{self.folder}: another process is measuring this machine",
                    hint="wait until it is done: both would measure each other",
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> Record | None:
        try:
            if self.path.stat().st_size > _MOST_FILE_BYTES:
                raise ConfigError(f"{self.path}: too large for a profile", hint=_HINT)
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}") from error
        try:
            return Record.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(["$", *map(str, first["loc"])])
            raise ConfigError(f"{self.path}: {place}: {first['msg']}", hint=_HINT) from error


def require_same(profile: HostProfile, fingerprint: str, place: str) -> None:
    """Refuse a profile of another machine: ConfigError names both fingerprints."""
    if profile.fingerprint != fingerprint:
        raise ConfigError(
            f"{place}: profile of another machine: fingerprint "
            f"{profile.fingerprint or 'none'}, this machine has {fingerprint}",
            hint=_HINT,
        )


def merged(old: HostProfile, new: HostProfile) -> HostProfile:
    """Return the new profile with the old one's rates where it has none."""
    before = {device.device_id: device for device in old.devices}
    devices = []
    for device in new.devices:
        known = before.get(device.device_id)
        kernels = {_key(rate): rate for rate in (known.kernels if known else ())}
        measured = {_key(rate): rate for rate in device.kernels}
        for key, rate in measured.items():
            if rate.matvec_bytes_per_s.origin != "assumed" or key not in kernels:
                kernels[key] = rate
        devices.append(device.model_copy(update={"kernels": tuple(kernels.values())}))
    return new.model_copy(update={"devices": tuple(devices)})


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all; DeviceError when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise DeviceError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            Path(name).unlink()
        raise DeviceError(f"{path}: cannot be written: {error.strerror}") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(rate: KernelRate) -> tuple[str, str, int | None]:
    return rate.ggml_type, rate.layout, rate.n_threads
