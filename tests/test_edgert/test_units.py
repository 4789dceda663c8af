"""Sizes and rates: what people type, what they read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import ConfigError
from edgert.units import format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2000M", 2_000_000_000),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 * 2**29),
        ("512 mib", 2**29),
        ("4096", 4096),
        ("1k", 1000),
        (7, 7),
    ],
)
def test_size_with_unit_is_bytes(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1.2.3G", "2 giga", "0", "0.1", "9999999T", "nan"])
def test_not_a_size_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    "text", ["9" * 400, "9" * 400 + "T", "1." + "0" * 400 + "E", 10**5000], ids=range(4)
)
def test_endless_size_is_a_config_error_of_one_line(text: str | int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert len(caught.value.message) < 150


@given(st.integers(1, 2**60))
def test_bytes_survive_as_a_bare_number(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == pytest.approx(size_bytes, rel=1e-15)


def test_sizes_have_three_digits() -> None:
    sizes = [format_bytes(n) for n in (0, 999, 1000, 1_460_000_000, 999_500_000, 3.8e12)]
    assert sizes == ["0 B", "999 B", "1.00 kB", "1.46 GB", "1.00 GB", "3.80 TB"]


def test_rates_and_durations_name_their_unit() -> None:
    assert format_rate(802e6) == "802 MB/s"
    assert [format_seconds(s) for s in (0.18, 2.81, 123.4)] == ["180 ms", "2.81 s", "123 s"]
