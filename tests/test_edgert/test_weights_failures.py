"""What happens to a streaming model when its file, its packed file or its caller misbehaves."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from edgert.errors import Cancelled, CapacityError, ConfigError, FormatError
from edgert.events import Notice
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.weights.packed import MAGIC, read_header
from edgert.weights.streaming import StreamedWeights

BUDGET = 5_500_000
PROMPT = [300, 301, 302]


@pytest.fixture
def model(random_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(random_models["plain"], tmp_path / "model.gguf"))


def stream(model: Path, packed: str = "off") -> Backend:
    return open_backend(
        LoadOptions(
            model, weight_memory_bytes=BUDGET, n_ctx=64, n_threads=1,
            packed=packed, packed_folder=model.parent,
        )
    )  # fmt: skip


def decode_three(backend: Backend) -> None:
    for position in range(3, 6):
        backend.decode([300], position, 1)


def decode_for_ever(backend: Backend) -> None:
    while True:
        backend.truncate(0)
        backend.decode(PROMPT * 10, 0, 1)


@pytest.mark.model
def test_a_file_that_shrinks_is_named_with_offset_and_tensor(model: Path) -> None:
    backend = stream(model)
    try:
        backend.decode(PROMPT, 0, 1)
        os.truncate(model, model.stat().st_size // 2)
        with pytest.raises(FormatError) as caught:
            decode_three(backend)
        assert caught.value.path == model
        assert caught.value.offset is not None
        assert caught.value.tensor is not None
        assert caught.value.hint is not None
    finally:
        backend.close()


@pytest.mark.model
def test_read_ahead_that_failed_before_a_pass_is_tried_again_in_it(model: Path) -> None:
    backend = stream(model)
    try:
        wanted = backend.decode(PROMPT, 0, 1).tobytes()
        backend.truncate(0)
        assert isinstance(backend, LlamaBackend)
        assert isinstance(backend._keeper, StreamedWeights)
        streamer = backend._keeper.streamer
        streamer.drain()
        content = model.read_bytes()
        os.truncate(model, 4096)
        streamer.end_pass()  # reads ahead
        assert all(isinstance(a.ticket.wait() and a.ticket.error, FormatError)
                   for a in streamer._arrivals)  # fmt: skip
        model.write_bytes(content)
        assert backend.decode(PROMPT, 0, 1).tobytes() == wanted
    finally:
        backend.close()


@pytest.mark.model
def test_a_cancelled_pass_leaves_the_next_one_exact(model: Path) -> None:
    backend = stream(model)
    try:
        wanted = backend.decode(PROMPT, 0, 1).tobytes()
        backend.truncate(0)
        backend.cancel()
        with pytest.raises(Cancelled):
            backend.decode(PROMPT, 0, 1)
        backend.truncate(0)
        assert backend.decode(PROMPT, 0, 1).tobytes() == wanted
    finally:
        backend.close()


@pytest.mark.model
def test_cancel_from_another_thread_stops_a_pass(model: Path) -> None:
    backend = stream(model)
    heard = threading.Event()

    def cancel_until_heard() -> None:
        # Once may not be enough: at the very end of a pass there is nothing left to cancel.
        while not heard.wait(0.02):
            backend.cancel()

    canceller = threading.Thread(target=cancel_until_heard)
    try:
        canceller.start()
        with pytest.raises(Cancelled):
            decode_for_ever(backend)
    finally:
        heard.set()
        canceller.join()
        backend.close()


@pytest.mark.model
def test_a_truncated_packed_file_is_refused(model: Path) -> None:
    stream(model, "auto").close()
    packed = next(model.parent.glob("*.packed"))
    os.truncate(packed, packed.stat().st_size - 4096)
    with pytest.raises(FormatError, match="its header says"):
        stream(model, "only")


@pytest.mark.model
def test_a_packed_file_of_another_model_is_not_used(model: Path) -> None:
    stream(model, "auto").close()
    packed = next(model.parent.glob("*.packed"))
    os.utime(model, ns=(0, 0))
    with pytest.raises(ConfigError, match="no packed file"):
        stream(model, "only")
    header, _ = read_header(packed)
    assert header.weights


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", MAGIC, MAGIC + b"\xff" * 8, MAGIC + (2).to_bytes(8, "little") + b"{}"],
)
def test_what_is_no_packed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.packed"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        read_header(path)


@pytest.mark.model
def test_load_anyway_goes_on_over_the_budget_and_says_so(model: Path) -> None:
    heard: list[object] = []
    options = LoadOptions(model, memory_bytes=1 << 20, n_ctx=64, n_threads=1, load_anyway=True)
    backend = open_backend(options, heard.append)
    try:
        assert backend.counters().streaming
        assert any(isinstance(event, Notice) and "over the budget" in event.text for event in heard)
        assert backend.decode(PROMPT, 0, 1).shape[0] == 1
    finally:
        backend.close()


@pytest.mark.model
def test_an_impossible_budget_is_refused_with_figures_and_a_flag(model: Path) -> None:
    with pytest.raises(CapacityError) as caught:
        open_backend(LoadOptions(model, memory_bytes=1 << 20, n_ctx=64, n_threads=1))
    assert (caught.value.needed_bytes or 0) > (caught.value.available_bytes or 0)
    assert "--memory" in str(caught.value) + str(caught.value.hint)
