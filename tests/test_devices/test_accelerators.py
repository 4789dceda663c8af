"""Accelerators that are not usable, from made-up /dev and /proc trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.accelerators import KINDS, absent


def reasons(root: Path, runtime: str, *backends: str) -> dict[str, str]:
    return {found.what: found.reason for found in absent(runtime, backends, root)}


def test_machine_without_anything_says_what_is_missing(tmp_path: Path) -> None:
    found = reasons(tmp_path, "llama.cpp", "CPU (a processor)")
    assert found["llama.cpp CUDA"] == (
        "no NVIDIA driver is loaded, and llama-cpp-python is built without CUDA"
    )
    assert "/dev/dri" in found["llama.cpp Vulkan"]


def test_driver_without_a_build_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    found = reasons(tmp_path, "llama.cpp", "CPU")
    assert found["llama.cpp CUDA"] == "llama-cpp-python is built without CUDA"
    assert found["llama.cpp Vulkan"] == "llama-cpp-python is built without Vulkan"


def test_what_is_there_is_not_absent(tmp_path: Path) -> None:
    assert "llama.cpp CUDA" not in reasons(tmp_path, "llama.cpp", "CPU", "CUDA0 (a GPU)")


@pytest.mark.parametrize("runtime", ["llama.cpp", "ONNX Runtime"])
def test_every_kind_has_a_reason_everywhere(tmp_path: Path, runtime: str) -> None:
    found = reasons(tmp_path, runtime)
    assert len(found) == sum(kind.runtime == runtime for kind in KINDS)
    assert all(found.values())


def test_npu_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/fastrpc-cdsp").touch()
    found = reasons(tmp_path, "ONNX Runtime", "CPUExecutionProvider")
    assert found["ONNX Runtime QNNExecutionProvider"] in (
        "package onnxruntime-qnn is not installed",
        "installed, but ONNX Runtime found no device for it",
    )
