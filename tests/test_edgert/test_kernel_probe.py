"""The processor's probes: real kernels on few weights, a fake clock, and children that fail."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from devices.child_process import ChildProbe, run_child
from devices.profile import ProcessorReport, Runtime
from edgert.errors import BackendError, ConfigError, MeasurementError
from edgert.llama import probe_child
from edgert.llama.attention_probe import AttentionShape, attention_rate
from edgert.llama.build import kernel_build
from edgert.llama.kernel_probe import N_COLUMNS, N_ROWS, KernelProbe, KernelRequest
from edgert.llama.lib import load_library
from edgert.llama.repetition import Repetitions


@dataclass
class FakeProcessor:
    n_threads: int = 1
    n_computed: int = 0

    def compute(self, _graph: int) -> None:
        self.n_computed += 1


def ticks(step_s: float = 1.0) -> Iterator[float]:
    return (index * step_s for index in itertools.count())


def probe(*types: str, layouts: tuple[str, ...] = ("file",)) -> KernelProbe:
    request = KernelRequest(
        types=types,
        layouts=layouts,  # type: ignore[arg-type]
        weight_bytes=1 << 20,
        n_tokens=4,
        n_repetitions=1,
    )
    wall, processor = ticks(), ticks()
    return KernelProbe(load_library(), request, wall.__next__, processor.__next__)


def test_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(BackendError, match="clock"):
        Repetitions(lambda: 0.0, lambda: 0.0, 3, 5.0).time(FakeProcessor(), 0)


def test_rates_are_bytes_and_operations_over_the_clocks_seconds() -> None:
    (rate,) = probe("q8_0").rates()
    file_bytes = N_ROWS * N_COLUMNS // 32 * 34
    assert (rate.ggml_type, rate.layout, rate.n_threads) == ("q8_0", "file", 1)
    assert rate.matmat_tokens == 4
    assert rate.matvec_bytes_per_s.origin == "measured"
    # Each repetition takes one tick of the clock; one matrix holds the few weights.
    assert rate.matvec_bytes_per_s.value == file_bytes
    assert rate.matmat_flops.value == 2 * N_ROWS * N_COLUMNS * 4


@pytest.mark.parametrize("name", ["f32", "f16", "q4_K", "q6_K", "iq4_nl"])
def test_types_of_models_are_computed(name: str) -> None:
    assert [rate.ggml_type for rate in probe(name).rates()] == [name]


def test_layout_without_kernels_is_skipped_with_a_reason() -> None:
    one = probe("f32", layouts=("repacked",))
    assert list(one.rates()) == []
    assert [absence.what for absence in one.skipped] == ["f32 repacked"]
    assert one.skipped[0].reason
    assert one.skipped[0].about == "figure"


def test_type_that_cannot_be_multiplied_is_skipped_with_a_reason() -> None:
    one = probe("i32")
    assert list(one.rates()) == []
    assert one.skipped[0].what == "i32 file"


def test_unknown_type_is_an_error() -> None:
    with pytest.raises(ConfigError, match="q5_9"):
        list(probe("q5_9").rates())


def test_node_costs_are_positive_and_measured() -> None:
    node_s, graph_s = probe("f32").node_s()
    assert node_s.value > 0
    assert graph_s.value > node_s.value
    assert node_s.origin == "measured"


def test_attention_counts_four_operations_for_each_head_element_and_cached_token() -> None:
    wall, used = ticks(), ticks()
    shape = AttentionShape(n_head=4, n_head_kv=2, head_length=64, n_cached=256, n_layers=2)
    repetitions = Repetitions(wall.__next__, used.__next__, 3, 100.0)
    rate, disturbed = attention_rate(load_library(), 1, repetitions, shape, n_tokens=8)
    assert not disturbed
    assert rate.decode_flops.value == 4 * 4 * 64 * 256 * 2
    assert rate.prefill_flops.value == 4 * 4 * 64 * 256 * 8
    assert (rate.cache_type, rate.head_length, rate.prefill_tokens) == ("f16", 64, 8)


def test_child_reports_on_this_processor() -> None:
    argument = '{"types": ["q4_0"], "n_threads": 1, "layouts": ["file"], "weight_bytes": 9437184}'
    line = run_child(ChildProbe("kernels", "edgert.llama.probe_child", argument), os.environ)
    report = ProcessorReport.model_validate_json(line)
    assert [kernel.ggml_type for kernel in report.kernels] == ["q4_0"]
    assert 10e6 < report.process_bytes.value < 1e9
    assert report.attention[0].decode_flops.value > 0


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ('{"types": ["q5_9"], "n_threads": 1}', "ggml type 'q5_9' is unknown"),
        ('{"n_threads": 0}', "validation error"),
        ("nonsense", "validation error"),
    ],
)
def test_child_that_cannot_do_it_says_why(argument: str, reason: str) -> None:
    child = ChildProbe("kernels", "edgert.llama.probe_child", argument)
    with pytest.raises(MeasurementError, match=reason):
        run_child(child, os.environ)


def test_children_list_the_backends() -> None:
    for name, module, backend in (
        ("llama.cpp", "edgert.llama.backend_child", "CPU"),
        ("ONNX Runtime", "edgert.onnx.provider_child", "CPUExecutionProvider"),
    ):
        runtime = Runtime.model_validate_json(run_child(ChildProbe(name, module), os.environ))
        assert runtime.name == name
        assert any(found.startswith(backend) for found in runtime.backends)


def test_build_names_version_and_library() -> None:
    assert kernel_build() == kernel_build()
    assert kernel_build().startswith("llama-cpp-python 0.3.")
    assert len(kernel_build().split()[-1]) == 16


def test_request_of_a_child_is_strict() -> None:
    asked = probe_child.ChildRequest.model_validate_json('{"n_threads": 2, "types": ["f16"]}')
    assert asked.request().types == ("f16",)
    assert asked.request().n_threads == 2
