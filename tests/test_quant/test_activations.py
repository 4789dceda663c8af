"""The activation codec: its bound holds, outliers are exact, damaged messages are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgert.errors import FormatError
from quant.activations.basis import Basis, Moments
from quant.activations.codec import GROUP_VALUES, decode, encode
from quant.activations.prefix import OUTLIER, read_bits, split, write_bits
from quant.activations.settings import CodecKind, CodecSettings
from quant.activations.steps import find_outliers, step_below, step_values

Floats = NDArray[np.float32]

WIDTH = 24
VALUES = st.floats(-1e4, 1e4, width=32) | st.floats(-1.0, 1.0, width=32)
TOKENS = st.integers(0, 5)
STATES = TOKENS.flatmap(lambda n: arrays(np.float32, (n, WIDTH), elements=VALUES))
BOUNDS = st.sampled_from((0.002, 0.03, 0.1, 0.3, 1.0))


def normal(n_tokens: int, n_embd: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n_tokens, n_embd), np.float32)


def slanted(n_tokens: int, n_embd: int = WIDTH) -> Floats:
    """States that reach far in few directions, none of them an axis."""
    turn = np.linalg.qr(normal(n_embd, n_embd, 7))[0]
    reach = np.geomspace(8, 0.1, n_embd, dtype=np.float32)
    return ((normal(n_tokens, n_embd, 3) * reach) @ turn.T).astype(np.float32)


def learnt(states: Floats) -> Basis:
    moments = Moments(states.shape[1])
    moments.add(states)
    return moments.basis()


def lengths(states: Floats) -> NDArray[np.float64]:
    return np.sqrt(np.square(states.astype(np.float64)).sum(axis=1))


def test_a_small_message_by_hand() -> None:
    # Length of (3, -1, 0, 2) is sqrt(14). 0.3 of it allows an error of 1.26 in square; the step
    # that errors of step**2 / 12 suggest is 0.3 * sqrt(14) * sqrt(12 / 4) = 1.944, on the grid of
    # 32 steps an octave 1.9375: codes 2, -1, 0, 1, values 3.875, -1.9375, 0, 1.9375, error 1.648,
    # too much. The step for which it would fit, 1.944 * sqrt(1.26 / 1.648) = 1.7, is 1.6875: codes
    # 2, -1, 0, 1, error 0.375**2 + 0.6875**2 + 0.3125**2 = 0.711, which fits.
    data = encode(np.array([[3, -1, 0, 2]], np.float32), CodecSettings(bound=0.3))
    # z is 3, 2, 0, 1. The mean magnitude 1 is 1.39 times 0.72, so the width is 0: no low bits,
    # classes 2, 1, 0, 0 in unary 001 01 1 1, picks of the last two 0 and 1.
    assert data[0] == 0x60
    mode_and_step = int.from_bytes(data[1:3], "little")
    assert mode_and_step >> 12 == 2
    assert step_values(np.array([mode_and_step & 0xFFF], np.int32))[0] == 1.6875
    assert data[3:] == bytes((0b00101110, 0b10000000))
    assert decode(data, 1, 4).tolist() == [[3.375, -1.6875, 0, 1.6875]]


def test_the_format_does_not_change() -> None:
    # A normal token twice, zeros, an outlier, values too small for a step.
    states = np.tile(np.array([1, -2, 0.5, 3, -0.25, 0, -1.5, 0.75], np.float32), (5, 2))
    states[1] = 0
    states[2, 5] = 1e5
    states[3] *= np.float32(1e-20)
    loose, tight = (CodecSettings(bound=bound, threshold=3) for bound in (0.1, 0.001))
    assert encode(states, loose).hex() == GOLDEN_LOOSE
    assert encode(states, tight).hex() == GOLDEN_TIGHT
    decoded = decode(bytes.fromhex(GOLDEN_LOOSE), 5, 16)
    assert decoded[0, :8].tolist() == GOLDEN_VALUES
    assert decoded[2, 5] == 1e5
    assert (decoded[3] == states[3]).all()


GOLDEN_LOOSE = (
    "60c1370000c13700b0c13708e53c1e08e5bc9e08e5bc1dc6ab0d1f08e53c9d00000000c6ab8d9ec6"
    "ab0d1e08e53c1e08e5bc9e08e5bc1dc6ab0d1f08e53c9d00000000c6ab8d9ec6ab0d1eb1b1b1b1b1"
    "b18c39c61ce30c0004e30e718738c39c211084000050c347"
)
GOLDEN_TIGHT = (
    "60f0960000f09600b0f09608e53c1e08e5bc9e08e5bc1dc6ab0d1f08e53c9d00000000c6ab8d9ec6"
    "ab0d1e08e53c1e08e5bc9e08e5bc1dc6ab0d1f08e53c9d00000000c6ab8d9ec6ab0d1eb1b1b1b1b1"
    "b159595959595999999999999971717171717199999999999971717171717199999999999943038d"
    "0c0e3430300011a181c686071a181c733666400050c347"
)
GOLDEN_VALUES = [1.03125, -2.0625, 0.515625, 3.09375, 0.0, 0.0, -1.546875, 0.515625]


@given(STATES, BOUNDS)
@settings(max_examples=200, deadline=None)
def test_no_token_errs_more_than_the_bound(states: Floats, bound: float) -> None:
    decoded = decode(encode(states, CodecSettings(bound=bound)), *states.shape)
    assert decoded.shape == states.shape
    assert (lengths(decoded - states) <= bound * lengths(states) * (1 + 1e-6)).all()


@given(st.integers(1, 200), st.integers(1, 300), BOUNDS)
@settings(max_examples=30, deadline=None)
def test_any_shape_comes_back_within_the_bound(n_tokens: int, n_embd: int, bound: float) -> None:
    states = normal(n_tokens, n_embd)
    decoded = decode(encode(states, CodecSettings(bound=bound)), n_tokens, n_embd)
    assert (lengths(decoded - states) <= bound * lengths(states) * (1 + 1e-6)).all()


@given(st.lists(st.integers(0, 255), min_size=1, max_size=6, unique=True), st.booleans())
@settings(deadline=None)
def test_outliers_are_exact_and_cost_the_others_nothing(places: list[int], vast: bool) -> None:
    states = normal(2, 256)
    states[1, places] = np.linspace(50, 90, len(places)) * (1e6 if vast else 1)
    decoded = decode(encode(states, CodecSettings(bound=0.1)), 2, 256)
    assert (decoded[1, places] == states[1, places]).all()
    rest = np.delete(states, places, axis=1)
    assert lengths(np.delete(decoded, places, axis=1) - rest)[1] <= 0.1 * lengths(rest)[1]


def test_outliers_are_told_from_the_others_not_from_themselves() -> None:
    values = np.ones((1, 64), np.float32)
    values[0, :2] = 1e6, 100
    outliers = find_outliers(values, 8, None)
    assert outliers is not None
    assert np.flatnonzero(outliers[0]).tolist() == [0, 1]
    assert find_outliers(values[:, 2:], 8, None) is None


@pytest.mark.parametrize("width", range(-1, 8))
def test_codes_survive_in_every_width(width: int) -> None:
    codes = np.arange(-20, 21, dtype=np.int16)[None]
    parts = split(codes, np.array([[width]], np.int8), None)
    bits = write_bits(parts)
    read, classes, n_bits = read_bits(bits, parts.widths, codes.shape)
    inside = parts.classes < OUTLIER
    assert n_bits == len(bits) == parts.n_bits()[0]
    assert (classes == parts.classes).all()
    assert (read[inside] == codes[inside]).all()
    assert inside.all() == (width >= 2)


def test_normal_values_take_few_bits_more_than_their_entropy() -> None:
    states = normal(64, 1024)
    data = encode(states, CodecSettings(bound=0.1))
    n_bits = 8 * len(data) / states.size
    # Uniform codes with an error of 0.1 have the entropy log2(sqrt(2 pi e) / (0.1 sqrt(12))).
    entropy = np.log2(np.sqrt(2 * np.pi * np.e) / (0.1 * np.sqrt(12)))
    assert entropy < n_bits < entropy + 0.15


def test_tighter_bounds_take_more_bits_up_to_plain_values() -> None:
    states = normal(1, 512)
    sizes = [len(encode(states, CodecSettings(bound=b))) for b in (1.0, 0.5, 0.1, 0.01, 0.001)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 512 * 1.2 / 8  # most are 0, which takes one bit
    assert sizes[-1] < 2 * 512


@pytest.mark.parametrize("value", [1e-30, 1e30, 1e-45])
def test_values_beyond_all_steps_are_kept_as_they_are(value: float) -> None:
    states = np.full((1, 8), value, np.float32)
    assert (decode(encode(states, CodecSettings()), 1, 8) == states).all()


def test_zeros_take_no_bits() -> None:
    data = encode(np.zeros((5, 100), np.float32), CodecSettings())
    assert len(data) == 11
    assert not decode(data, 5, 100).any()


@pytest.mark.parametrize(("kind", "n_bytes"), [("f32", 4), ("f16", 2)])
def test_plain_kinds_write_every_value(kind: CodecKind, n_bytes: int) -> None:
    states = normal(3, 10).astype(np.float16).astype(np.float32)
    data = encode(states, CodecSettings(kind))
    assert len(data) == 1 + 30 * n_bytes
    assert (decode(data, 3, 10) == states).all()


@pytest.mark.parametrize("kind", ["f32", "f16", "adaptive"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kind: CodecKind, value: float) -> None:
    states = normal(3, 8)
    states[1, 4] = value
    with pytest.raises(FormatError, match="hidden state 1 "):
        encode(states, CodecSettings(kind))


def test_values_too_large_for_f16_are_refused() -> None:
    with pytest.raises(FormatError, match="70000"):
        encode(np.full((1, 2), 7e4, np.float32), CodecSettings("f16"))


def test_a_basis_saves_bits_and_holds_its_bound() -> None:
    states, basis = slanted(600), learnt(slanted(300))
    plain = encode(states, CodecSettings(bound=0.1))
    data = encode(states, CodecSettings(bound=0.1, basis=basis))
    assert len(data) < 0.8 * len(plain)
    decoded = decode(data, *states.shape, basis)
    assert (lengths(decoded - states) <= 0.1 * lengths(states) * (1 + 1e-4)).all()


def test_a_basis_survives_its_file_and_another_one_is_refused() -> None:
    states = slanted(50)
    basis, other = learnt(states), learnt(normal(50, WIDTH))
    again = Basis.from_bytes(basis.to_bytes())
    assert again.digest == basis.digest
    data = encode(states, CodecSettings(basis=basis))
    assert (decode(data, *states.shape, again) == decode(data, *states.shape, basis)).all()
    assert data[0] == 0x70 | basis.digest[0] & 15 != 0x70 | other.digest[0] & 15
    for wrong in (None, other, learnt(normal(50, 8))):
        with pytest.raises(FormatError, match="in a basis that is not here"):
            decode(data, *states.shape, wrong)
    with pytest.raises(ValueError, match="a basis of width 8"):
        encode(states, CodecSettings(basis=learnt(normal(50, 8))))


@pytest.mark.parametrize("change", ["short", "long", "magic", "nan", "skewed", "far"])
def test_a_damaged_basis_is_refused(change: str) -> None:
    content = learnt(slanted(50)).to_bytes()
    head, values = content[:8], np.frombuffer(content, "<f4", offset=8).copy()
    match change:
        case "magic":
            head = b"\0" + head[1:]
        case "nan":
            values[40] = np.nan
        case "skewed":
            values[40] += 0.1
        case "far":
            values[0] = 0
    content = head + values.tobytes()
    if change == "short":
        content = content[:-1]
    if change == "long":
        content += b"\0"
    with pytest.raises(FormatError):
        Basis.from_bytes(content)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_mutated_messages_are_read_or_refused(data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(0, 3))
    states = slanted(n_tokens)
    if n_tokens > 1:
        states[1, 3] = 1e4
    basis = learnt(slanted(50)) if data.draw(st.booleans()) else None
    kind: CodecKind = data.draw(st.sampled_from(("f32", "f16", "adaptive", "adaptive")))
    bound = data.draw(st.sampled_from((0.001, 0.1, 0.5)))
    message = bytearray(encode(states, CodecSettings(kind, bound=bound, basis=basis)))
    for _ in range(data.draw(st.integers(1, 4))):
        change = data.draw(st.sampled_from(("flip", "cut", "add")))
        at = data.draw(st.integers(0, max(0, len(message) - 1)))
        if change == "cut":
            del message[at:]
        elif change == "add":
            message += data.draw(st.binary(max_size=9))
        elif message:
            message[at] ^= data.draw(st.integers(1, 255))
    asked = data.draw(st.integers(0, 4))
    try:
        decoded = decode(bytes(message), asked, WIDTH, basis)
    except FormatError:
        return
    assert decoded.shape == (asked, WIDTH)
    assert np.isfinite(decoded).all()


@given(st.binary(max_size=400), st.integers(0, 3), st.sampled_from((1, 7, 40)))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(content: bytes, n_tokens: int, n_embd: int) -> None:
    for first in (b"", b"\x60"):
        try:
            decoded = decode(first + content, n_tokens, n_embd)
        except FormatError:
            continue
        assert np.isfinite(decoded).all()


def test_every_message_cut_short_is_refused() -> None:
    states = normal(40, 2048)
    assert states.size > GROUP_VALUES
    data = encode(states, CodecSettings(bound=0.3))
    for end in (*range(12), *range(12, len(data), 997), len(data) - 1):
        with pytest.raises(FormatError):
            decode(data[:end], *states.shape)
    for wrong in ((39, 2048), (41, 2048), (40, 2047), (40, 2049)):
        with pytest.raises(FormatError):
            decode(data, *wrong)


def test_more_bytes_than_plain_values_are_refused_before_they_are_unpacked() -> None:
    with pytest.raises(FormatError, match="wanted 2 to 10"):
        decode(b"\x60" + bytes(11), 1, 2)


@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_steps_are_at_most_a_thirtysecond_below(value: float) -> None:
    step = step_values(step_below(np.array([value], np.float32)))[0]
    assert step <= value < step * (1 + 1 / 31)


@pytest.mark.parametrize(
    "wrong", [{"bound": 0.0}, {"bound": 1.5}, {"bound": float("nan")}, {"threshold": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        CodecSettings(**wrong)  # type: ignore[arg-type]
