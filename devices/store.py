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

from devices.merging import kept_flash, merged
from devices.plausible import check
from devices.profile import FileModel, FlashProfile, HostProfile
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
        check(profile, str(self.path))
        return Stored(profile, max(0.0, self.clock() - (profile.measured_at_s or 0.0)))

    def save(self, profile: HostProfile, storage: str | None = None) -> HostProfile:
        """Write the profile, keeping rates of types and disks that it does not have; return it.

        Figures that were measured before are kept where the new ones are only assumed, and dropped
        where they contradict new ones.

        Raises:
            ConfigError: it is of another machine, its figures cannot be, or the folder cannot be
                written to.
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
        known = dict(old.flash) if old is not None else {}
        if old is not None and old.profile.fingerprint == self.fingerprint:
            profile = merged(old.profile, profile)
        flash = profile.flash
        bare = profile.model_copy(update={"flash": None})
        kept = {
            name: curve
            for name in known
            if name != storage and (curve := kept_flash(known[name], None, bare)) is not None
        }
        if storage is not None and flash is not None:
            flash = kept_flash(known.get(storage), flash, bare)
        update = {"measured_at_s": self.clock(), "flash": flash}
        profile = profile.model_copy(update=update)
        check(profile, "the new profile")
        if storage is not None and flash is not None:
            kept[storage] = flash
        return Record(profile=profile, flash=kept)

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
