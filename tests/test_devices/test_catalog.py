"""The catalog: every entry is sourced, declared and plausible; what is no entry is refused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

import pytest

from devices.catalog import catalog_topology, known_host, names, usual_link
from devices.catalog_entry import parse_entry
from devices.plausible import check
from devices.profile import Figure, HostProfile
from edgert.errors import ConfigError, FormatError


def figures(thing: object) -> Iterator[Figure]:
    if isinstance(thing, Figure):
        yield thing
    elif isinstance(thing, tuple):
        for item in thing:
            yield from figures(item)
    elif hasattr(type(thing), "model_fields"):
        for name in type(thing).model_fields:
            yield from figures(getattr(thing, name))


def text_of(name: str) -> str:
    return (resources.files("devices") / "catalog" / f"{name}.yaml").read_text(encoding="utf-8")


def test_at_least_twelve_devices_of_every_kind_are_known() -> None:
    assert len(names()) >= 12
    kinds = {device.kind for name in names() for device in known_host(name).devices}
    assert kinds == {"cpu", "gpu", "npu"}


@pytest.mark.parametrize("name", names())
def test_every_figure_is_declared_with_a_source(name: str) -> None:
    found = list(figures(known_host(name)))
    assert len(found) > 10
    assert [one for one in found if one.origin != "declared" or not one.source] == []


@pytest.mark.parametrize("name", names())
def test_every_entry_is_plausible_and_has_the_usual_types(name: str) -> None:
    host = known_host(name)
    check(host)
    types = {kernel.ggml_type for kernel in host.devices[0].kernels}
    assert types >= {"q4_0", "q8_0", "q4_K", "q6_K", "f16"}
    assert host.fingerprint is None


# Clock in GHz, operations a cycle and number of the cores that compute.
CORES = {
    "snapdragon-8-gen-3-phone": ((3.3, 32, 1), (3.2, 16, 3), (3.0, 16, 2)),
    "dimensity-9300-phone": ((3.25, 32, 1), (2.85, 32, 3), (2.0, 16, 4)),
}


@pytest.mark.parametrize("name", CORES)
def test_phone_does_not_exceed_the_peak_of_its_cores(name: str) -> None:
    peak = sum(clock * 1e9 * operations * n for clock, operations, n in CORES[name])
    assert parse_entry(text_of(name), name).devices[0].flops.value < 0.9 * peak


def test_unified_memory_is_one_pool_and_a_discrete_gpu_has_its_own() -> None:
    phone, desktop = known_host("snapdragon-8-gen-3-phone"), known_host("desktop-rtx-4090-24gb")
    assert {device.pool_id for device in phone.devices} == {"ram"}
    assert [device.pool_id for device in desktop.devices] == ["ram", "vram0"]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        known_host("../../etc/passwd")
    assert "raspberry-pi-5-8gb" in str(caught.value.hint)


def test_topology_of_known_devices_has_home_first_and_the_slower_link_of_each_pair() -> None:
    found = catalog_topology(["raspberry-pi-5-8gb", "pixel-8-pro", "orange-pi-5-plus-16gb"])
    check(found)
    ids = [host.host_id for host in found.hosts]
    assert ids == ["raspberry-pi-5-8gb", "pixel-8-pro", "orange-pi-5-plus-16gb"]
    assert found.home == ids[0]
    kinds = {(link.source, link.target): link.kind for link in found.links}
    assert kinds[ids[0], ids[1]] == kinds[ids[1], ids[0]] == "wifi"
    assert kinds[ids[0], ids[2]] == "ethernet_1g"
    assert len(found.links) == 6


def test_topology_of_known_devices_has_links_of_the_kind_that_is_asked_for() -> None:
    found = catalog_topology(["raspberry-pi-5-8gb", "orange-pi-5-plus-16gb"], "wifi")
    assert {link.kind for link in found.links} == {"wifi"}
    assert len(found.links) == 2


def test_device_named_twice_is_refused() -> None:
    names_twice = ["pixel-8-pro", "raspberry-pi-5-8gb", "pixel-8-pro"]
    with pytest.raises(ConfigError, match="'pixel-8-pro' is named twice") as caught:
        catalog_topology(names_twice, "wifi")
    assert caught.value.hint is not None


def test_topology_needs_a_name() -> None:
    with pytest.raises(ConfigError):
        catalog_topology([])


def test_usual_links_carry_their_source() -> None:
    link = usual_link("internet", "a", "b")
    assert link.bytes_per_s.origin == "declared"
    assert link.bytes_per_s.source


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 17.1e+9", "value: -1", r"\$\.pools\[0\]\.bytes_per_s\.value: -1"),
        ("value: 17.1e+9", "value: 17.1e9", r"\$\.pools\[0\]\.bytes_per_s\.value: .*a number"),
        ("kind: sd", "kind: tape", r"\$\.flash\.kind"),
        ("n_cores: 4", "cores: 4", r"\$\.n_cores: missing"),
        ("n_cores: 4", "n_cores: 2026-01-01", "dates"),
        ("n_cores: 4", "n_cores: [", "not YAML"),
        ("matmat: {q4_0: 1.0,", "matmat: {", r"\$\.devices\[0\]\.matmat"),
        ("matvec: {q4_0: 0.85,", "matvec: {q4_0: 85,", r"matvec\.q4_0: 85, wanted <= 1"),
        ("name: ", "!!python/object/apply:os.getcwd []\nname: ", "not YAML"),
    ],
)
def test_damaged_entry_is_refused(old: str, new: str, message: str) -> None:
    text = text_of("raspberry-pi-5-8gb")
    assert old in text
    with pytest.raises(FormatError, match=message):
        parse_entry(text.replace(old, new, 1), "entry.yaml")


def test_profiles_of_the_catalog_survive_being_written() -> None:
    for name in names():
        assert HostProfile.model_validate_json(known_host(name).model_dump_json()) == known_host(
            name
        )
