"""Remembered profiles: by fingerprint, with an age, whole, one writer at a time."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import builders_devices as build
from devices.profile import Absence, Figure, FlashProfile, HostProfile, MemoryPool
from devices.store import ProfileStore
from edgert.errors import CapacityError, ConfigError, DeviceError

OTHER = "fedcba9876543210"


def store(
    tmp_path: Path, now_s: float = 1000.0, fingerprint: str = build.FINGERPRINT
) -> ProfileStore:
    return ProfileStore(tmp_path / "devices", fingerprint, lambda: now_s)


def with_kernels(*types: tuple[str, float]) -> HostProfile:
    kernels = tuple(build.kernel(name, matvec) for name, matvec in types)
    return build.host().model_copy(update={"devices": (build.device(*kernels),)})


def test_nothing_is_remembered_at_first(tmp_path: Path) -> None:
    assert store(tmp_path).load() is None


def test_saved_profile_comes_back_with_its_age(tmp_path: Path) -> None:
    store(tmp_path, 1000.0).save(build.host())
    found = store(tmp_path, 1060.0).load()
    assert found is not None
    assert found.age_s == 60.0
    assert found.profile == build.host().model_copy(update={"measured_at_s": 1000.0})


def test_clock_that_went_back_makes_no_negative_age(tmp_path: Path) -> None:
    store(tmp_path, 1000.0).save(build.host())
    found = store(tmp_path, 10.0).load()
    assert found is not None
    assert found.age_s == 0


def test_profile_of_another_machine_is_refused_naming_both(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.save(build.host())
    mine.path.rename(mine.folder / f"{OTHER}.json")
    with pytest.raises(ConfigError, match=f"{build.FINGERPRINT}.*{OTHER}"):
        store(tmp_path, fingerprint=OTHER).load()
    with pytest.raises(ConfigError, match=f"{build.FINGERPRINT}.*{OTHER}"):
        store(tmp_path, fingerprint=OTHER).save(build.host())


def test_rates_of_other_types_are_kept_and_newer_ones_win(tmp_path: Path) -> None:
    store(tmp_path).save(with_kernels(("q4_0", 8e9), ("q8_0", 9e9)))
    store(tmp_path).save(with_kernels(("q4_0", 7e9), ("f16", 20e9)))
    found = store(tmp_path).load()
    assert found is not None
    rates = {k.ggml_type: k.matvec_bytes_per_s.value for k in found.profile.devices[0].kernels}
    assert rates == {"q4_0": 7e9, "q8_0": 9e9, "f16": 20e9}


def test_each_disk_has_its_own_flash(tmp_path: Path) -> None:
    slow = FlashProfile(kind="nvme", points=build.flash().points[:3])
    store(tmp_path).save(build.host(), "nvme0n1")
    store(tmp_path).save(build.host().model_copy(update={"flash": slow}), "nvme1n1")
    flashes = []
    for name in ("nvme0n1", "nvme1n1", "sda"):
        found = store(tmp_path).load(name)
        assert found is not None
        flashes.append(found.profile.flash)
    assert flashes == [build.flash(), slow, None]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"value": 8000000000.0', '"value": 64000000000.0', r"\$\.devices\[0\]\.kernels\[0\]"),
        ('"value": 8000000000.0', '"value": -1', r"\$\.profile\.devices\[0\]"),
        ('"format_version": 1', '"format_version": 2', r"\$\.format_version"),
        ("{", "", "not JSON"),
    ],
)
def test_file_that_was_edited_is_refused_with_the_place(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    store(tmp_path).save(build.host())
    path = store(tmp_path).path
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        store(tmp_path).load()


def test_flash_that_was_edited_is_refused_where_it_is_used(tmp_path: Path) -> None:
    store(tmp_path).save(build.host(), "nvme0n1")
    path = store(tmp_path).path
    content = json.loads(path.read_text())
    for point in content["flash"]["nvme0n1"]["points"]:
        point["bytes_per_s"]["value"] *= 1000
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"\$\.flash\.points"):
        store(tmp_path).load("nvme0n1")
    store(tmp_path).save(build.host(), "nvme0n1")
    assert store(tmp_path).load("nvme0n1") is not None


def test_edited_flash_of_another_disk_is_dropped_by_the_next_measurement(tmp_path: Path) -> None:
    store(tmp_path).save(build.host(), "sda")
    path = store(tmp_path).path
    content = json.loads(path.read_text())
    for point in content["flash"]["sda"]["points"]:
        point["bytes_per_s"]["value"] *= 1000
    path.write_text(json.dumps(content))
    store(tmp_path).save(build.host(), "nvme0n1")
    found = store(tmp_path).load("sda")
    assert found is not None
    assert found.profile.flash is None


def with_memory(bytes_per_s: Figure, host: HostProfile) -> HostProfile:
    pool: MemoryPool = host.pools[0].model_copy(update={"bytes_per_s": bytes_per_s})
    device = host.devices[0].model_copy(update={"bytes_per_s": bytes_per_s})
    return host.model_copy(update={"pools": (pool,), "devices": (device,)})


def test_old_rates_that_contradict_a_slower_memory_are_dropped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = with_kernels(("q4_0", 8e9), ("q8_0", 24e9), ("q4_K", 6e9))
    device = old.devices[0].model_copy(update={"attention": (build.attention(),)})
    store(tmp_path).save(old.model_copy(update={"devices": (device,)}), "nvme0n1")
    slow = with_memory(build.rate(8e9), with_kernels(("q4_0", 4e9)))
    store(tmp_path).save(slow, "sda")
    found = store(tmp_path).load("nvme0n1")
    assert found is not None
    rates = {k.ggml_type: k.matvec_bytes_per_s.value for k in found.profile.devices[0].kernels}
    assert rates == {"q4_0": 4e9, "q4_K": 6e9}
    assert len(found.profile.devices[0].attention) == 1
    assert "q8_0 file contradicts new figures" in caplog.text


def test_old_flash_that_is_faster_than_the_memory_of_now_is_dropped(tmp_path: Path) -> None:
    store(tmp_path).save(build.host(), "nvme0n1")
    slow = with_memory(build.rate(1.5e9), with_kernels(("q4_0", 1.4e9)))
    store(tmp_path).save(slow.model_copy(update={"flash": None}), "sda")
    found = store(tmp_path).load("nvme0n1")
    assert found is not None
    assert found.profile.flash is None


def assumed(host: HostProfile) -> HostProfile:
    """The same host when every probe failed."""
    document = host.model_dump(mode="json")

    def change(part: object) -> None:
        for item in part.values() if isinstance(part, dict) else part:  # type: ignore[attr-defined]
            if isinstance(item, dict | list):
                change(item)
        if isinstance(part, dict) and "origin" in part:
            part.update(origin="assumed", value=part["value"] * 0.8)

    change(document)
    return HostProfile.model_validate_json(json.dumps(document))


def test_figures_that_were_measured_stay_where_the_new_ones_are_assumed(tmp_path: Path) -> None:
    whole = build.host()
    device = whole.devices[0].model_copy(update={"attention": (build.attention(),)})
    whole = whole.model_copy(update={"devices": (device,)})
    store(tmp_path).save(whole, "nvme0n1")
    failed = assumed(whole)
    no_rate = failed.devices[0].model_copy(update={"attention": ()})
    saved = store(tmp_path).save(failed.model_copy(update={"devices": (no_rate,)}), "nvme0n1")
    found = store(tmp_path).load("nvme0n1")
    assert found is not None
    assert found.profile == saved
    assert found.profile == whole.model_copy(update={"measured_at_s": 1000.0})


def test_assumed_figures_are_replaced_by_measured_ones(tmp_path: Path) -> None:
    store(tmp_path).save(assumed(build.host()), "nvme0n1")
    store(tmp_path).save(build.host(), "nvme0n1")
    found = store(tmp_path).load("nvme0n1")
    assert found is not None
    assert found.profile == build.host().model_copy(update={"measured_at_s": 1000.0})


def test_old_memory_that_contradicts_new_kernels_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).save(build.host())
    guess = Figure(value=10e9, origin="assumed")
    slow = with_memory(build.rate(10e9).model_copy(update=dict(guess)), with_kernels(("q8_0", 2e9)))
    store(tmp_path).save(slow)
    found = store(tmp_path).load()
    assert found is not None
    assert found.profile.pools[0].bytes_per_s.origin == "assumed"
    assert "contradict" in caplog.text


def lacking(*whats: str) -> HostProfile:
    absences = tuple(Absence(what=what, reason="busy", about="figure") for what in whats)
    return build.host().model_copy(
        update={"absences": (*absences, Absence(what="llama.cpp CUDA", reason="no driver"))}
    )


def test_what_was_said_of_figures_is_kept_until_they_are_measured_again(tmp_path: Path) -> None:
    store(tmp_path).save(
        lacking("undisturbed q8_0 file", "undisturbed q4_0 file", "measured flash rates")
    )
    saved = store(tmp_path).save(lacking("undisturbed graph nodes"))
    assert [absence.what for absence in saved.absences] == [
        "undisturbed graph nodes", "llama.cpp CUDA", "undisturbed q8_0 file"
    ]  # fmt: skip


def test_damaged_file_is_replaced_by_the_next_measurement(tmp_path: Path) -> None:
    store(tmp_path).save(build.host())
    store(tmp_path).path.write_text("{")
    store(tmp_path).save(build.host())
    assert store(tmp_path).load() is not None


def test_writing_leaves_nothing_else_behind(tmp_path: Path) -> None:
    store(tmp_path).save(build.host())
    assert [path.name for path in (tmp_path / "devices").iterdir()] == [f"{build.FINGERPRINT}.json"]
    assert json.loads(store(tmp_path).path.read_text())["format_version"] == 1


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_an_error_or_a_warning_that_keeps_the_measurement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with full_disk():
        with pytest.raises(CapacityError):
            store(tmp_path).save(build.host())
        found = store(tmp_path).save_or_warn(build.host())
    assert found == build.host().model_copy(update={"measured_at_s": 1000.0})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not remembered" in record.message
    assert "--no-measure" in record.message
    assert store(tmp_path).load() is None


def test_measurement_that_cannot_be_written_still_has_what_was_known(tmp_path: Path) -> None:
    store(tmp_path).save(with_kernels(("q8_0", 9e9)))
    with full_disk():
        found = store(tmp_path).save_or_warn(with_kernels(("q4_0", 7e9)))
    assert {kernel.ggml_type for kernel in found.devices[0].kernels} == {"q4_0", "q8_0"}


def test_second_writer_is_refused_while_the_first_is_at_it(tmp_path: Path) -> None:
    with (
        store(tmp_path).locked(),
        pytest.raises(DeviceError, match="another process"),
        store(tmp_path).locked(),
    ):
        pass
    with store(tmp_path).locked():
        pass


def test_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "devices").touch()
    with (
        pytest.raises(DeviceError, match="cannot be written") as caught,
        store(tmp_path).locked(),
    ):
        pass
    assert "--no-measure" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="cannot write it"):
        store(tmp_path).save(build.host())
