"""Profiles of this machine on disk: keyed by its fingerprint, with an age, written atomically."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from devices.plausible import check
from devices.profile import AttentionRate, FileModel, FlashProfile, HostProfile, KernelRate
from devices.profile_file import parse, read_bounded
from edgert.atomic_file import write_error, write_file
from edgert.errors import CapacityError, ConfigError, DeviceError, FormatError

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

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
            ConfigError: the file is damaged, its figures cannot be, or it is of another machine:
                names both fingerprints.
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
            ConfigError: it is of another machine, or the folder cannot be written to.
            CapacityError: the disk is full.
        """
        record = self._updated(profile, storage)
        self._write(record)
        return record.profile

    def save_or_warn(self, profile: HostProfile, storage: str | None = None) -> HostProfile:
        """As `save`, but warn where it cannot be written: what was measured can be used once.

        Raises:
            ConfigError: it is of another machine.
        """
        record = self._updated(profile, storage)
        try:
            self._write(record)
        except (ConfigError, CapacityError) as error:
            logger.warning(
                "%s: figures are used and not remembered; %s, or plan with --no-measure",
                error.message,
                error.hint,
            )
        return record.profile

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
            raise DeviceError(
                f"{lock}: cannot be written: {error.strerror}",
                hint="make the folder writable, set EDGERT_HOME, or plan with --no-measure",
            ) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DeviceError(
                    f"{self.folder}: another process is measuring this machine",
                    hint="wait: both would measure each other; or plan with --no-measure",
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _updated(self, profile: HostProfile, storage: str | None) -> Record:
        """Return what is known with this profile in it, measured now."""
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
        return Record(profile=profile, flash=flash)

    def _write(self, record: Record) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error
        write_file(self.path, record.model_dump_json(indent=1).encode() + b"\n", replace=True)

    def _read(self) -> Record | None:
        if not self.path.exists():
            return None
        try:
            record = parse(Record, read_bounded(self.path), str(self.path))
        except FormatError as error:
            raise ConfigError(error.message, hint=_HINT) from error
        check(record.profile, str(self.path))
        return record


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
        attention = {_heads(rate): rate for rate in (known.attention if known else ())}
        attention.update((_heads(rate), rate) for rate in device.attention)
        rates = {"kernels": tuple(kernels.values()), "attention": tuple(attention.values())}
        devices.append(device.model_copy(update=rates))
    return new.model_copy(update={"devices": tuple(devices)})


def _key(rate: KernelRate) -> tuple[str, str, int | None]:
    return rate.ggml_type, rate.layout, rate.n_threads


def _heads(rate: AttentionRate) -> tuple[str, int, int | None]:
    return rate.cache_type, rate.head_length, rate.n_threads
