"""The profile of this host: measured, remembered or assumed, and what is absent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

import builders_devices as build
from devices import discover as module
from devices.discover import Probes, Wish, discover, fingerprint, measure
from devices.measure_memory import MemoryProbe, MemoryRates
from devices.plausible import check
from devices.profile import Absence, FlashPoint, HostProfile, ProcessorReport, Runtime
from edgert.errors import MeasurementError

CRASH = "kernels: the probe crashed with SIGSEGV"


def fail() -> ProcessorReport:
    raise MeasurementError(CRASH)


def no_runtime() -> Runtime:
    raise MeasurementError("ONNX Runtime: the probe crashed with SIGABRT")


def llama() -> Runtime:
    return Runtime(name="llama.cpp", version="0.3.36", backends=("CPU (a processor)",))


def probes(*, crash: bool = False) -> Probes:
    return Probes(
        processor=fail if crash else build.report,
        runtimes=(("llama.cpp", llama), ("ONNX Runtime", no_runtime)),
    )


def wish(tmp_path: Path) -> Wish:
    return Wish(tmp_path, tmp_path / "cache", 2, "a build", host_id="here")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of memory and flash that take no time: their own tests cover them."""

    def memory(_probe: MemoryProbe) -> MemoryRates:
        return MemoryRates(build.rate(15e9), build.rate(25e9))

    def curve(_path: Path) -> Sequence[FlashPoint]:
        return tuple(
            point.model_copy(update={"bytes_per_s": build.rate(point.bytes_per_s.value / 2)})
            for point in build.flash().points
        )

    monkeypatch.setattr(module, "measure_memory", memory)
    monkeypatch.setattr(module, "measure_curve", curve)
    monkeypatch.setattr(module, "_SCRATCH_BYTES", 16 << 20)


def absences(host: HostProfile) -> dict[str, str]:
    return {absence.what: absence.reason for absence in host.absences}


def test_never_measured_host_is_assumed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        host = discover(wish(tmp_path), probes())
    assert "assumed" in caplog.text
    check(host)
    assert host.measured_at_s is None
    figures = [host.pools[0].bytes_per_s, host.process_bytes, host.devices[0].node_s]
    figures += [kernel.matvec_bytes_per_s for kernel in host.devices[0].kernels]
    assert host.flash is not None
    figures += [point.bytes_per_s for point in host.flash.points]
    assert {figure.origin for figure in figures} == {"assumed"}


def test_remembered_figures_are_used_with_todays_memory(tmp_path: Path) -> None:
    old = build.host().model_copy(update={"measured_at_s": 5.0})
    host = discover(wish(tmp_path), probes(), old)
    assert host.devices[0].kernels == old.devices[0].kernels
    assert host.flash == old.flash
    assert host.measured_at_s == 5.0
    assert host.pools[0].bytes_per_s == old.pools[0].bytes_per_s
    assert host.pools[0].total_bytes != old.pools[0].total_bytes


def test_what_is_remembered_of_figures_is_shown_again(tmp_path: Path) -> None:
    of_figure = Absence(what="undisturbed q4_0 file", reason="busy", about="figure")
    of_system = Absence(what="llama.cpp CUDA", reason="no driver was there then")
    old = build.host().model_copy(update={"absences": (of_figure, of_system)})
    found = discover(wish(tmp_path), probes(), old).absences
    assert of_figure in found
    assert of_system not in found


@pytest.mark.parametrize("remembered", [True, False])
def test_types_that_were_never_measured_are_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, remembered: bool
) -> None:
    types = ("q5_0", "q5_K", "iq4_xs", "q4_0")
    cached = build.host() if remembered else None
    asked = Wish(tmp_path, tmp_path / "cache", 2, "a build", host_id="here", types=types)
    host = discover(asked, probes(), cached)
    check(host)
    known = {kernel.ggml_type: kernel for kernel in host.devices[0].kernels}
    assert known.keys() >= set(types)
    assert {known[name].matvec_bytes_per_s.origin for name in types[:3]} == {"assumed"}
    assert "q5_0, q5_K, iq4_xs are assumed" in caplog.text


@pytest.mark.usefixtures("quick")
def test_types_are_assumed_where_kernels_could_not_be_measured_and_only_there(
    tmp_path: Path,
) -> None:
    asked = Wish(tmp_path, tmp_path / "cache", 2, "a build", host_id="here", types=("iq3_s",))
    for crash in (True, False):
        host = measure(asked, probes(crash=crash))
        types = {kernel.ggml_type for kernel in host.devices[0].kernels}
        assert ("iq3_s" in types) == crash


def test_disk_that_was_never_measured_is_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = build.host().model_copy(update={"flash": None})
    with caplog.at_level(logging.WARNING):
        host = discover(wish(tmp_path), probes(), old)
    assert "never measured" in caplog.text
    assert host.flash is not None
    assert host.flash.streaming.origin == "assumed"


@pytest.mark.usefixtures("quick")
def test_measured_host_is_measured_throughout(tmp_path: Path) -> None:
    host = measure(wish(tmp_path), probes())
    check(host)
    assert host.host_id == "here"
    assert host.pools[0].bytes_per_s.value == 25e9
    assert host.devices[0].kernels == build.report().kernels
    assert host.devices[0].hand_over_s == build.report().graph_s
    assert host.process_bytes.value == 56e6
    assert host.flash is not None
    assert host.flash.streaming.value == 1e9
    assert [runtime.name for runtime in host.runtimes] == ["llama.cpp"]


@pytest.mark.usefixtures("quick")
def test_crash_of_a_probe_is_a_reported_fact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        host = measure(wish(tmp_path), probes(crash=True))
    assert absences(host)["measured kernel rates"] == CRASH
    assert "SIGSEGV" in caplog.text
    assert host.devices[0].kernels[0].matvec_bytes_per_s.origin == "assumed"
    assert host.pools[0].bytes_per_s.origin == "measured"


def test_every_absence_has_a_reason(tmp_path: Path) -> None:
    found = absences(discover(wish(tmp_path), probes()))
    assert found["ONNX Runtime"] == "ONNX Runtime: the probe crashed with SIGABRT"
    assert "llama.cpp CUDA" in found
    assert all(found.values())


@pytest.mark.usefixtures("quick")
def test_flash_of_another_disk_is_not_guessed_from_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from devices.flash_behind import Storage

    def behind(path: Path) -> Storage:
        return Storage("sda" if path.name == "cache" else "sdb", "sata")

    monkeypatch.setattr(module, "storage_behind", behind)
    host = measure(wish(tmp_path), probes())
    assert "no file large enough to measure sdb" in absences(host)["measured flash rates"]


def test_memory_is_what_control_groups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = module.host.GroupMemory(Path("/limit"), 900_000_000, 100_000_000)
    monkeypatch.setattr(module.host, "memory_groups", lambda *_: [group])
    pool = discover(wish(tmp_path), probes()).pools[0]
    assert pool.total_bytes == 900_000_000
    assert pool.available_bytes <= 900_000_000


def test_fingerprint_depends_on_build_and_threads() -> None:
    assert fingerprint("a", 2) == fingerprint("a", 2)
    assert len({fingerprint("a", 2), fingerprint("b", 2), fingerprint("a", 4)}) == 3


def test_fingerprint_tells_arm_processors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = set()
    for part in ("0xd05", "0xd0b"):
        monkeypatch.setattr(module.host, "cpu_parts", lambda part=part: [f"0x41 0x1 {part} 0"])
        marks.add(fingerprint("a", 2))
    assert len(marks) == 2
