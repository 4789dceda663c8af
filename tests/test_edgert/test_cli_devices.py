"""`edgert devices`: this host, the catalog, measuring, and what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import builders_devices as build
from devices.child_process import ChildProbe
from devices.flash_behind import storage_behind
from devices.host import n_usable_cpus
from devices.profile import Absence, DeviceProfile, Figure, HostProfile
from devices.profile_file import parse_host
from devices.store import ProfileStore
from edgert.cli import main, this_host
from edgert.cli.opening import embedded_model
from edgert.cli.this_host import Asked, Heads, types_of
from edgert.config import Directories
from edgert.errors import MeasurementError
from quant.tensor_file import open_tensor_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    return tmp_path


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(["devices", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[ChildProbe]:
    """Children that answer at once; the probes they stand for have tests of their own."""
    asked: list[ChildProbe] = []

    def run(probe: ChildProbe, _env: object) -> str:
        asked.append(probe)
        if probe.what == "kernels":
            return build.report().model_dump_json()
        if probe.what == "program":
            return build.figure(60e6).model_dump_json()
        if probe.what == "llama.cpp":
            return build.host().runtimes[0].model_dump_json()
        raise MeasurementError("ONNX Runtime: the probe crashed with SIGILL")

    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        found = replace(wish, host_id="here")
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        return build.host(found.host_id or "", fingerprint=mark)

    monkeypatch.setattr(this_host, "run_child", run)
    monkeypatch.setattr(this_host, "measure", measured)
    return asked


@pytest.mark.usefixtures("quick")
def test_host_is_shown_with_origins_and_absences(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys)
    assert code == 0
    assert "never measured" in out
    assert "(assumed)" in out
    assert "absent: ONNX Runtime: ONNX Runtime: the probe crashed with SIGILL" in out
    assert err == ""


@pytest.mark.usefixtures("quick")
def test_json_is_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "--json")
    assert code == 0
    assert parse_host(out, "stdout").devices[0].device_id == "cpu"


@pytest.mark.usefixtures("quick")
def test_measured_figures_are_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "--measure")
    assert code == 0
    assert "measuring" in err
    assert "measured just now" in out
    code, out, _ = outcome(capsys, "--json")
    host = parse_host(out, "stdout")
    assert host.measured_at_s is not None
    assert host.devices[0].kernels == build.report().kernels


def test_types_of_the_model_are_what_is_measured(
    quick: list[ChildProbe], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    types = types_of(open_tensor_file(embedded_model()))
    assert types

    def measured(_wish: object, probes: this_host.Probes) -> HostProfile:
        probes.processor()
        raise MeasurementError("enough")

    monkeypatch.setattr(this_host, "measure", measured)
    folders = Directories(home / "config.toml", home / "cache", home)
    with pytest.raises(MeasurementError, match="enough"):
        this_host.this_host(Asked(embedded_model(), types, 3, measure=True), folders, {})
    request = json.loads(quick[0].argument)
    assert tuple(request["types"]) == types
    assert request["n_threads"] == 3


@pytest.mark.usefixtures("quick")
def test_implausible_measurement_is_refused_and_not_remembered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    slow = build.device(build.kernel(matvec=1e9))

    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        return build.host(fingerprint=mark).model_copy(update={"devices": (slow,)})

    monkeypatch.setattr(this_host, "measure", measured)
    code, out, err = outcome(capsys, "--measure")
    assert (code, out) == (5, "")
    assert "$.devices[0].kernels[0].matvec_bytes_per_s.value: 1e+09" in err
    assert "while nothing else runs" in err
    assert list((home / "cache/devices").glob("*.json")) == []


def spread_by(figure: str, spread: float) -> DeviceProfile:
    return with_figure(figure, spread=spread)


def with_figure(figure: str, **changes: object) -> DeviceProfile:
    device = build.device()
    if figure == "matvec_bytes_per_s":
        rate = device.kernels[0].matvec_bytes_per_s.model_copy(update=changes)
        kernel = device.kernels[0].model_copy(update={figure: rate})
        return device.model_copy(update={"kernels": (kernel,)})
    found: Figure = getattr(device, figure)
    return device.model_copy(update={figure: found.model_copy(update=changes)})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("figure", "spread", "code"),
    [
        ("node_s", 1.5, 5),
        ("node_s", 1.0, 0),
        ("matvec_bytes_per_s", 1.5, 5),
        ("matvec_bytes_per_s", 0.9, 0),
        ("hand_over_s", 14.0, 0),
    ],
)
def test_measurement_that_spreads_beyond_its_median_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    figure: str,
    spread: float,
    code: int,
) -> None:
    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        devices = (spread_by(figure, spread),)
        return build.host(fingerprint=mark).model_copy(update={"devices": devices})

    monkeypatch.setattr(this_host, "measure", measured)
    got, _, err = outcome(capsys, "--measure")
    assert got == code
    if code:
        assert f"{figure}: repetitions spread by 1.5 of their median" in err
        assert "--no-measure" in err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("figure", ["node_s", "matvec_bytes_per_s"])
def test_measurement_without_the_processors_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        devices = (with_figure(figure, disturbed=True),)
        return build.host(fingerprint=mark).model_copy(update={"devices": devices})

    monkeypatch.setattr(this_host, "measure", measured)
    code, _, err = outcome(capsys, "--measure")
    assert code == 5
    assert f"{figure}: something else had the processors" in err


@pytest.mark.usefixtures("quick")
def test_disturbed_measurement_is_made_once_more(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    devices = [spread_by("node_s", 1.5), build.device()]

    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        return build.host(fingerprint=mark).model_copy(update={"devices": (devices.pop(0),)})

    monkeypatch.setattr(this_host, "measure", measured)
    code, _, err = outcome(capsys, "--measure")
    assert code == 0, err
    assert "measuring once more" in caplog.text
    assert devices == []


@pytest.mark.usefixtures("quick")
def test_measurement_that_cannot_be_remembered_is_shown_with_a_warning(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    home: Path,
) -> None:
    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        (home / "cache/devices" / f"{mark}.json").mkdir()
        return build.host(fingerprint=mark)

    monkeypatch.setattr(this_host, "measure", measured)
    code, out, _ = outcome(capsys, "--measure", "--json")
    assert code == 0
    assert parse_host(out, "stdout").measured_at_s is not None
    (warning,) = (item.message for item in caplog.records if "not remembered" in item.message)
    assert "--no-measure" in warning


@pytest.mark.usefixtures("quick")
def test_profile_of_another_machine_is_refused(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    store = ProfileStore(home / "cache/devices", build.FINGERPRINT)
    store.save(build.host())
    mine = this_host.fingerprint(this_host.kernel_build(), None)
    store.path.rename(store.folder / f"{mine}.json")
    code, out, err = outcome(capsys)
    assert (code, out) == (2, "")
    assert build.FINGERPRINT in err
    assert mine in err


@pytest.mark.usefixtures("quick")
def test_second_measurement_at_the_same_time_is_refused(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    with ProfileStore(home / "cache/devices", build.FINGERPRINT).locked():
        code, _, err = outcome(capsys, "--measure")
    assert code == 5
    assert "another process is measuring" in err


def test_catalog_lists_names_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "--catalog")
    assert code == 0
    assert len(out.splitlines()) >= 12
    code, out, _ = outcome(capsys, "--catalog", "raspberry-pi-5-8gb")
    assert "Raspberry Pi 5" in out
    assert "(declared)" in out
    code, out, _ = outcome(capsys, "--catalog", "--json", "raspberry-pi-5-8gb")
    assert parse_host(out, "stdout").host_id == "raspberry-pi-5-8gb"
    code, out, _ = outcome(capsys, "--catalog", "--json")
    assert len(json.loads(out)) >= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--catalog", "toaster"], "'toaster' is not in the catalog"),
        (["--catalog", "--measure"], "choose one"),
        (["/nonexistent/model.gguf"], "no such file"),
        (["-t", "0"], "--threads"),
    ],
)
def test_wrong_request_is_an_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_answer_of_a_child_that_is_no_report_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_host, "run_child", lambda *_: '{"kernels": 1}')
    probes = this_host._probes(Asked(Path()), 1, {})
    with pytest.raises(MeasurementError, match="no result"):
        probes.processor()


def test_kernels_are_kept_where_the_program_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(probe: ChildProbe, _env: object) -> str:
        if probe.what == "kernels":
            return build.report().model_dump_json()
        raise MeasurementError("program: the probe crashed with SIGILL")

    monkeypatch.setattr(this_host, "run_child", run)
    report = this_host._probes(Asked(Path()), 1, {}).processor()
    assert report.kernels == build.report().kernels
    assert report.process_bytes == build.report().process_bytes
    (lacking,) = report.skipped
    assert (lacking.what, lacking.about) == ("measured program memory", "figure")
    assert "SIGILL" in lacking.reason


HEADS = Heads(8, 2, 64)


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (Asked(Path(), ("q4_0",)), True),
        (Asked(Path(), ("q4_0",), heads=HEADS), True),
        (Asked(Path(), ("q4_0",), heads=replace(HEADS, head_length=128)), False),
        (Asked(Path(), ("q4_0", "q5_0"), heads=HEADS), False),
    ],
)
def test_measured_means_types_and_heads_and_the_storage_of_the_model(
    home: Path, asked: Asked, *, known: bool
) -> None:
    folders = Directories(home / "config.toml", home / "cache", home)
    asked = replace(asked, place=home)
    mark = this_host.fingerprint(this_host.kernel_build(), n_usable_cpus())
    store = ProfileStore(home / "cache/devices", mark)
    device = build.device().model_copy(update={"attention": (build.attention(64),)})
    host = build.host(fingerprint=mark).model_copy(update={"devices": (device,)})
    assert not this_host.has_measured(asked, folders)
    store.save(host, "another disk")
    assert not this_host.has_measured(asked, folders)
    store.save(host, storage_behind(home).name)
    assert this_host.has_measured(asked, folders) == known


def test_files_of_killed_probes_go_with_the_next_measurement_and_not_before(
    quick: list[ChildProbe], capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    stale = home / "cache/flash-probe-left"
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    assert outcome(capsys)[0] == 0
    assert stale.exists()
    assert outcome(capsys, "--measure")[0] == 0
    assert not stale.exists()
    assert quick


@pytest.mark.usefixtures("quick")
def test_disturbed_figures_are_said_again_when_they_are_remembered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = Absence(what="undisturbed q4_0 file", reason="too low", about="figure")

    def measured(wish: this_host.Wish, _probes: object) -> HostProfile:
        mark = this_host.fingerprint(wish.build, wish.n_threads)
        return build.host(fingerprint=mark).model_copy(update={"absences": (disturbed,)})

    monkeypatch.setattr(this_host, "measure", measured)
    assert outcome(capsys, "--measure")[0] == 0
    assert "absent: undisturbed q4_0 file: too low" in outcome(capsys)[1]


@pytest.mark.parametrize("peer", ["a..b:80", f"{'x' * 64}.example:80"])
def test_peer_whose_name_can_be_none_is_refused(
    capsys: pytest.CaptureFixture[str], peer: str
) -> None:
    code, out, err = outcome(capsys, "--link", peer)
    assert (code, out) == (2, "")
    assert "no name of a host" in err


def test_ctrl_c_while_measuring_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    def interrupted(*_: object) -> HostProfile:
        raise KeyboardInterrupt

    monkeypatch.setattr(this_host, "measure", interrupted)
    code, out, err = outcome(capsys, "--measure")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert list((home / "cache").rglob("*.json")) == []
    with ProfileStore(home / "cache/devices", build.FINGERPRINT).locked():
        pass


def test_link_to_itself_is_measured_and_wrong_peers_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(["devices", "--link", "loopback", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {figure["origin"] for figure in figures.values()} == {"measured"}
    assert 0 < figures["round_trip_s"]["value"] < 1
    assert main.run(["devices", "--link", "127.0.0.1:1"]) == 6
    assert main.run(["devices", "--link", "nonsense"]) == 2


@pytest.mark.parametrize(
    "port",
    ["\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT TWO}", "0", "65536", "9" * 5000, "-1", "", "+1"],
)
def test_port_that_is_no_decimal_number_is_refused(
    capsys: pytest.CaptureFixture[str], port: str
) -> None:
    code, out, err = outcome(capsys, "--link", f"localhost:{port}")
    assert (code, out) == (2, "")
    assert "wanted HOST:PORT" in err
