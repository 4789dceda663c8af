"""Assumed rates: for every weight type, plausible, never for what cannot compute it."""

from __future__ import annotations

import pytest

import builders_devices as build
from devices.assumed import with_types
from devices.catalog import known_host, names
from devices.plausible import check
from devices.profile import Absence
from devices.weight_types import BITS, nearest
from quant.formats import FORMATS

TYPES = tuple(BITS)


def test_bits_are_those_of_the_formats() -> None:
    formats = {known.name: known.bits_per_weight for known in FORMATS.values()}
    assert {name: formats[name] for name in BITS} == BITS


@pytest.mark.parametrize(
    ("name", "known", "like"),
    [
        ("q5_0", ("q4_0", "q4_K", "q8_0", "f16"), "q4_0"),
        ("q5_K", ("q4_0", "q4_K", "q8_0", "f16"), "q4_K"),
        ("iq2_s", ("q4_K", "iq3_s"), "iq3_s"),
        ("bf16", ("q8_0", "f16"), "f16"),
        ("bf16", ("q8_0",), "q8_0"),
        ("i32", ("q8_0",), None),
        ("q4_0", (), None),
    ],
)
def test_most_similar_type_stands_in(name: str, known: tuple[str, ...], like: str | None) -> None:
    assert nearest(name, known) == like


@pytest.mark.parametrize("name", names())
def test_known_devices_get_every_type_they_can_compute(name: str) -> None:
    before = known_host(name)
    host = with_types(before, TYPES)
    check(host)
    for old, new in zip(before.devices, host.devices, strict=True):
        assert new.kernels[: len(old.kernels)] == old.kernels
        if old.kind == "npu" or old.static_tokens is not None:
            assert new == old
        else:
            assert {kernel.ggml_type for kernel in new.kernels} == set(TYPES)
        added = new.kernels[len(old.kernels) :]
        assert {kernel.matvec_bytes_per_s.origin for kernel in added} <= {"assumed"}


def test_a_weight_takes_as_long_as_one_of_the_similar_type_and_bytes_come_no_faster() -> None:
    host = with_types(build.host(), ("q4_1", "tq2_0", "iq2_s"))
    rates = {
        kernel.ggml_type: kernel.matvec_bytes_per_s.value for kernel in host.devices[0].kernels
    }
    assert rates["q4_1"] == rates["q4_0"] == 8e9
    assert rates["tq2_0"] == pytest.approx(8e9 * 2.0625 / 4.5)
    assert rates["iq2_s"] == pytest.approx(8e9 * 2.5625 / 4.5 / 2)


def test_type_that_has_no_kernels_here_is_not_assumed() -> None:
    lacking = Absence(what="q5_1 file", reason="not multiplied", about="figure")
    host = build.host().model_copy(update={"absences": (lacking,)})
    assert with_types(host, ("q5_1", "i32", "nonsense")) == host


def test_device_without_any_rate_is_left_alone() -> None:
    device = build.device().model_copy(update={"kernels": ()})
    host = build.host().model_copy(update={"devices": (device,)})
    assert with_types(host, ("q5_1",)) == host
