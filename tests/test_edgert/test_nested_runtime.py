"""Nested experts compute what their file says, at every width, whatever the memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.embedded import EMBEDDED_MODEL, embedded_path
from edgert.errors import CapacityError, ConfigError, FormatError
from edgert.events import ignore
from edgert.experts.keeper import ExpertWeights
from edgert.experts.nested_keeping import NestedExperts
from edgert.experts.proving import prove_nested
from edgert.experts.qualities import (
    Measured,
    Qualities,
    asked_bits,
    keep_qualities,
    parse_expert_bits,
    qualities_path,
)
from edgert.experts.widths import WidthPolicy, level_counts
from edgert.llama.backend import Backend
from edgert.llama.lib import tensor_at
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.weights.packed import model_key
from make_model import Request, make_model
from native import run, stock_logits
from quant.nested.assemble import to_ggml
from quant.nested.code import NestedMatrix, decode, encode
from quant.nested.encoder import ModelEncoder
from quant.nested.file import read_nested
from quant.nested.gains import UNIT, Gains
from quant.nested.source import ExpertStack, TensorReader
from quant.nested.writer import NestedRequest, write_nested, write_plain
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
TEXT = [300 + i % 9 * 13 for i in range(28)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return models by type, and what they become nested."""
    folder = tmp_path_factory.mktemp("nested")
    found = {}
    for kind, widths in (("Q4_0", (2, 4)), ("Q8_0", (2, 8))):
        source = make_model(Request("tiny-moe", folder / f"{kind}.gguf", weight_type=kind))[0]
        found[kind] = source
        found[f"{kind} nested"] = nested(source, folder / f"{kind}-nested.gguf", widths)
    return found


GAINS = (1536, 1408, 1280, 1152, UNIT, UNIT, UNIT)


class LargeGains:
    """Codes of which every narrow width has a gain that nobody overlooks."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def encode(self, stack: ExpertStack, expert: int) -> NestedMatrix:
        return encode(self._reader.weights(stack, expert), 2, 8, has_gains=True)

    def gains(self, name: str) -> Gains:
        del name
        return GAINS

    def down_extra_bits(self) -> int:
        return 0


@pytest.fixture(scope="module")
def gained(models: dict[str, Path]) -> Path:
    out = models["Q8_0"].with_name("gained.gguf")
    request = NestedRequest(2, 8, "0" * 64, calibrated=True)
    with TensorReader(open_tensor_file(models["Q8_0"])) as reader, out.open("w+b") as stream:
        write_nested(stream, reader, request, LargeGains(reader), lambda *_: None)
    return out


def plain(path: Path, width: int, *, with_gains: bool) -> Path:
    """Write what a width of a nested model means as a model of halves."""
    model = read_nested(open_tensor_file(path))
    assert model is not None
    out = path.with_name(f"{path.stem}-{width}-{with_gains}.gguf")

    def values(name: str, expert: int) -> NDArray[np.float32]:
        tensor = model.tensor(name)
        gain = tensor.gain(width) if with_gains else UNIT
        return decode(model.read(name, expert, width), tensor.layout, width, gain)

    shapes = {name: tensor.entry.shape for name, tensor in model.tensors.items()}
    with TensorReader(model.file) as reader, out.open("wb") as stream:
        write_plain(stream, reader, shapes, values)
    return out


def nested(source: Path, out: Path, widths: tuple[int, int]) -> Path:
    with TensorReader(open_tensor_file(source)) as reader, out.open("w+b") as stream:
        encoder = ModelEncoder(reader, widths)
        write_nested(stream, reader, NestedRequest(*widths, "0" * 64), encoder, lambda *_: None)
    return out


@contextmanager
def opened(path: Path, weight_bytes: int | None = None, **changes: object) -> Iterator[Backend]:
    options = LoadOptions(
        path, weight_memory_bytes=weight_bytes,
        **{"n_ctx": 64, "n_threads": 1, **changes},  # type: ignore[arg-type]
    )  # fmt: skip
    backend = open_backend(options)
    try:
        yield backend
    finally:
        backend.close()


def keeper(backend: Backend) -> NestedExperts:
    assert isinstance(backend, LlamaBackend)
    assert isinstance(backend._keeper, ExpertWeights)
    return backend._keeper


def logits(backend: Backend, tokens: Sequence[int] = TEXT) -> NDArray[np.float32]:
    """Return a prefill of twelve tokens, then one by one, as rows."""
    rows = [backend.decode(tokens[:12], 0, 1)[0].copy()]
    rows += [backend.decode([t], 12 + i, 1)[0].copy() for i, t in enumerate(tokens[12:])]
    return np.array(rows)


def least_bytes(path: Path, **changes: object) -> int:
    with pytest.raises(CapacityError) as caught, opened(path, 1 << 16, **changes):
        pass
    assert caught.value.needed_bytes is not None
    return caught.value.needed_bytes


def test_widest_width_of_a_quantized_source_is_that_source(models: dict[str, Path]) -> None:
    with opened(models["Q8_0 nested"]) as backend:
        found = logits(backend)
    with opened(models["Q8_0"], least_bytes(models["Q8_0"])) as backend:
        wanted = logits(backend)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bits", [(2,), (3,), (5,), (8,), (3, 8), (2, 4, 8)])
def test_logits_do_not_depend_on_memory(models: dict[str, Path], bits: tuple[int, ...]) -> None:
    path = models["Q8_0 nested"]
    changes = {"expert_bits": bits, "exact_bits": True}
    with opened(path, **changes) as backend:
        wanted = logits(backend)
    least = least_bytes(path, **changes)
    for weight_bytes in (least, least * 3 // 2):
        with opened(path, weight_bytes, **changes) as backend:
            found = logits(backend)
        # what is not routed streams there as it is in the file: other kernels, other roundings
        assert np.allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())
        with opened(path, weight_bytes, **changes) as backend:
            assert np.array_equal(found, logits(backend))


@pytest.mark.parametrize("width", [2, 5])
def test_gains_of_the_file_are_computed_with(gained: Path, width: int) -> None:
    with opened(gained, expert_bits=(width,)) as backend:
        found = logits(backend)
    off = []
    for with_gains in (True, False):
        with opened(plain(gained, width, with_gains=with_gains)) as backend:
            off.append(np.abs(logits(backend) - found).max(axis=1) / np.abs(found).max())
    # Kernels round inputs to eight bits, so a router with a near tie chooses another expert.
    assert np.median(off[0]) < 0.1 < np.median(off[1]) / 2


@pytest.mark.parametrize("bits", [(3, 5), (2, 4, 8)])
def test_gains_do_not_depend_on_memory(gained: Path, bits: tuple[int, ...]) -> None:
    changes = {"expert_bits": bits, "exact_bits": True}
    with opened(gained, **changes) as backend:
        wanted = logits(backend)
    with opened(gained, least_bytes(gained, **changes), **changes) as backend:
        found = logits(backend)
    assert np.allclose(found, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


def test_blocks_in_memory_are_those_of_the_file_whatever_they_were(gained: Path) -> None:
    model = read_nested(open_tensor_file(gained))
    assert model is not None
    with opened(gained, expert_bits=(2, 4, 5, 8), expert_cuts=(0.3, 0.6, 0.9)) as backend:
        parts = keeper(backend)
        cache, turn, forms = parts.cache, parts.plan.turns[0], parts.plan.forms[0]

        def made(level: int) -> bytes:
            width, name = forms[level].width, forms[level].stack.name
            scales, planes = forms[level].nested.layout.split(model.read(name, 3, width), width)
            return to_ggml(scales, planes, width, 8, gain=GAINS[width - 2])[1].tobytes()

        for level in range(4):  # read, then widened three times
            for load in cache.need(turn, (0,), {3: level}).get(0, ()):
                cache.wait(load)
            assert cache.place(0, 3)[0] == level
            tensor = tensor_at(cache.tensor(0, level))
            address = tensor.data + cache.place(0, 3)[1] * tensor.nb[2]
            assert ctypes.string_at(address, forms[level].memory_bytes) == made(level)
        for level in range(3):
            address = tensor_at(cache.narrowed(0, 3, level)).data
            assert ctypes.string_at(address, forms[level].memory_bytes) == made(level)


def test_more_bits_are_nearer_to_the_source(models: dict[str, Path]) -> None:
    with opened(models["Q8_0 nested"]) as backend:
        wanted = logits(backend)
    errors = []
    for bits in ((2,), (3,), (4,), (5,), (7,)):
        with opened(models["Q8_0 nested"], expert_bits=bits) as backend:
            errors.append(float(np.linalg.norm(logits(backend) - wanted)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[2] > 0


def test_widening_an_expert_reads_one_plane_for_each_bit(models: dict[str, Path]) -> None:
    with opened(models["Q8_0 nested"], expert_bits=(4, 5), expert_cuts=(1.0,)) as backend:
        parts = keeper(backend)
        cache, form = parts.cache, parts.plan.forms[0][1]
        plane_bytes = form.nested.layout.plane_bytes
        turn = parts.plan.turns[0]
        for load in cache.need(turn, (0,), {3: 0})[0]:
            cache.wait(load)
        before = cache.tally.bytes_read
        assert before == form.nested.layout.prefix_bytes(4)
        for load in cache.need(turn, (0,), {3: 1})[0]:
            cache.wait(load)
        assert cache.tally.bytes_read - before == plane_bytes
        assert cache.place(0, 3)[0] == 1
        assert not cache.need(turn, (0,), {3: 0})  # more bits than wanted are used as they are


def test_an_expert_that_loses_its_wide_place_keeps_its_narrow_bits(models: dict[str, Path]) -> None:
    changes = {"expert_bits": (4, 8), "expert_cuts": (0.5,)}
    path = models["Q8_0 nested"]
    with opened(path, least_bytes(path, **changes) * 5 // 4, **changes) as backend:
        parts = keeper(backend)
        cache, turn = parts.cache, parts.plan.turns[0]
        wide = [s for s in turn.stacks for _ in range(s.n_experts)]
        everything = [(s.index, e % s.n_experts) for e, s in enumerate(wide)]
        for stack, expert in everything:
            for load in cache.need(turn, (stack,), {expert: 1}).get(stack, ()):
                cache.wait(load)
        cache.end_turn()
        before, kept = cache.tally.bytes_read, []
        for stack, expert in everything:
            if cache.holds(stack, expert) and cache.place(stack, expert)[0] == 0:
                kept.append(expert)
                assert not cache.need(turn, (stack,), {expert: 0})
        assert kept
        assert cache.tally.bytes_read == before


def test_bits_in_use_are_counted(models: dict[str, Path]) -> None:
    with opened(models["Q8_0 nested"], expert_bits=(4,)) as backend:
        logits(backend)
        experts = backend.counters().experts
    assert experts is not None
    assert experts.total.bits_per_weight == pytest.approx(4.5)


def test_memory_for_less_than_one_tokens_experts_says_the_least(models: dict[str, Path]) -> None:
    path = models["Q8_0 nested"]
    least = least_bytes(path)
    with pytest.raises(CapacityError, match="need"), opened(path, least // 2):
        pass
    with opened(path, least) as backend:
        assert logits(backend).shape[0] == len(TEXT) - 11


def test_read_that_fails_ends_the_pass_and_spares_the_session(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "copy.gguf"
    content = models["Q8_0 nested"].read_bytes()
    path.write_bytes(content)
    with opened(path, least_bytes(path)) as backend:
        wanted = logits(backend)
        with path.open("r+b") as stream:
            stream.truncate(len(content) - len(content) // 2)
        backend.truncate(0)
        with pytest.raises(FormatError, match="ended early"):
            logits(backend, [*range(260, 400)][::5])
        path.write_bytes(content)
        backend.truncate(0)
        assert np.array_equal(logits(backend), wanted)


def test_several_texts_at_once_are_as_if_alone(models: dict[str, Path]) -> None:
    for name, bounded in (("Q8_0", False), ("Q8_0", True), ("Q8_0 nested", True), ("dense", True)):
        path = embedded_path(EMBEDDED_MODEL) if name == "dense" else models[name]
        alone, weight_bytes = [], least_bytes(path) if bounded else None
        with opened(path, weight_bytes, n_sequences=3) as backend:
            assert backend.counters().streaming is bounded
            for first in (300, 320, 340):
                backend.truncate(0)
                alone.append([backend.decode([first + i], i, 1)[0].copy() for i in range(4)])
        with opened(path, weight_bytes, n_sequences=3) as backend:
            for i in range(4):
                rows = backend.decode_sequences([300 + i, 320 + i, 340 + i], [i] * 3, [0, 1, 2])
                for text in range(3):
                    wanted = alone[text][i]
                    assert np.allclose(rows[text], wanted, atol=1e-2 * np.abs(wanted).max())
            with pytest.raises(ValueError, match="wanted 0 to 2"):
                backend.decode_sequences([1], [9], [3])


def test_stock_llama_cpp_computes_the_source_alike(models: dict[str, Path]) -> None:
    path = models["Q8_0 nested"]
    with opened(path, least_bytes(path)) as backend:  # what is not routed streams, not repacked
        found = run(lambda tokens, position: backend.decode(tokens, position, 1)[0].copy())
    assert found == stock_logits(models["Q8_0"])


@pytest.mark.parametrize(
    ("bits", "cuts", "says"),
    [((1,), (), "has 2 to 8"), ((9,), (), "has 2 to 8"), ((8, 4), (), "widths"),
     ((4, 8), (2.0,), "cuts"), ((4, 8), (0.1, 0.2), "cuts")],
)  # fmt: skip
def test_wrong_widths_are_refused(
    models: dict[str, Path], bits: tuple[int, ...], cuts: tuple[float, ...], says: str
) -> None:
    with (
        pytest.raises(ConfigError, match=says),
        opened(models["Q8_0 nested"], expert_bits=bits, expert_cuts=cuts),
    ):
        pass


def test_widths_of_a_model_that_is_not_nested_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="not nested"), opened(models["Q8_0"], expert_bits=(4,)):
        pass


@pytest.mark.parametrize("text", ["", "x", "4,", "4@", "4,8@x", "4.5"])
def test_widths_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--expert-bits"):
        parse_expert_bits(text)


def test_bits_follow_the_routing_weight_that_stands_before() -> None:
    weights = np.array([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]], np.float32)
    policy = WidthPolicy((2, 4, 8), (0.4, 0.9))
    # before: 0, 0.5, 0.8, 0.95 and 0, 0.97, 0.98, 0.99
    assert policy.levels(weights).tolist() == [[2, 1, 1, 0], [2, 0, 0, 0]]
    experts = np.array([[5, 1, 2, 3], [3, 5, 1, 2]], np.int32)
    assert level_counts(experts, policy.levels(weights), 3) == {5: 2, 3: 2, 1: 1, 2: 1}


def _fail(event: object) -> None:
    pytest.fail(f"proved again: {event}")


def test_damaged_planes_are_found_once_and_named(models: dict[str, Path], tmp_path: Path) -> None:
    good = models["Q8_0 nested"]
    folder = tmp_path / "proofs"
    prove_nested(open_tensor_file(good), folder, ignore)
    prove_nested(open_tensor_file(good), folder, _fail)
    model = read_nested(open_tensor_file(good))
    assert model is not None
    name = list(model.tensors)[2]
    entry, layout = model.tensors[name].entry, model.tensors[name].layout
    first = entry.offset_bytes + layout.prefix_bytes(4)
    content = bytearray(good.read_bytes())
    size = layout.plane_bytes
    content[first : first + size], content[first + size : first + 2 * size] = (
        content[first + size : first + 2 * size],
        content[first : first + size],
    )
    swapped = tmp_path / "swapped.gguf"
    swapped.write_bytes(content)
    with pytest.raises(FormatError, match="reordered") as caught:
        prove_nested(open_tensor_file(swapped), folder, ignore)
    assert name in str(caught.value)


def test_quality_chooses_the_fewest_bits_that_keep_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = models["Q8_0 nested"]
    key = model_key(open_tensor_file(path))
    measured = [((8,), (), 10.0, 8.5), ((4, 8), (0.25,), 10.05, 5.5), ((4,), (), 10.5, 4.5)]
    policies = tuple(
        Measured(widths=w, cuts=c, perplexity=p, bits_per_weight=b) for w, c, p, b in measured
    )
    keep_qualities(tmp_path / "experts", Qualities(model=key, text_bytes=9, policies=policies))
    assert asked_bits(path, None, 0.99, tmp_path)["expert_bits"] == (4, 8)
    assert asked_bits(path, None, 0.9, tmp_path)["expert_bits"] == (4,)
    assert asked_bits(path, None, 1.0, tmp_path)["expert_bits"] == (8,)
    with pytest.raises(ConfigError, match="both choose"):
        asked_bits(path, "4", 0.9, tmp_path)
    with pytest.raises(ConfigError, match="no qualities"):
        asked_bits(models["Q4_0 nested"], None, 0.9, tmp_path)
    kept = qualities_path(tmp_path / "experts", key)
    kept.write_text(kept.read_text().replace("8.5", "-1"))
    with pytest.raises(FormatError, match="bits_per_weight"):
        asked_bits(path, None, 0.9, tmp_path)
    os.truncate(kept, 5)
    with pytest.raises(FormatError):
        asked_bits(path, None, 0.9, tmp_path)
