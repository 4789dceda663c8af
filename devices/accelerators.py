"""Accelerators that are not usable here, each with its reason; nothing is initialised."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.host import ROOT
from devices.profile import Absence

_MISSING_DRIVER = "no NVIDIA driver is loaded"


@dataclass(frozen=True, slots=True)
class Kind:
    """An accelerator that a runtime may use.

    Attributes:
        runtime: Name of the runtime.
        backend: How its name of the backend begins.
        missing: Why the machine has none; None when it has.
        package: Package that brings the backend, or what its build lacks.
        module: What that package installs; None when the runtime itself would contain it.
    """

    runtime: str
    backend: str
    missing: Callable[[Path], str | None]
    package: str
    module: str | None = None


def _no_nvidia(root: Path) -> str | None:
    return None if (root / "proc/driver/nvidia/version").exists() else _MISSING_DRIVER


def _no_render_node(root: Path) -> str | None:
    if any((root / "dev/dri").glob("renderD*")):
        return None
    return "the kernel shows no GPU: /dev/dri has no render node"


def _no_amd(root: Path) -> str | None:
    return None if (root / "dev/kfd").exists() else "no AMD compute driver: /dev/kfd is missing"


def _no_qualcomm_npu(root: Path) -> str | None:
    found = any((root / "dev").glob("*fastrpc*")) or any((root / "dev").glob("adsprpc*"))
    return None if found else "no Qualcomm NPU: /dev has no fastrpc device"


def _not_apple(_root: Path) -> str | None:
    return None if sys.platform == "darwin" else "only on Apple systems"


def _always(_root: Path) -> str | None:
    return None


KINDS = (
    Kind("llama.cpp", "CUDA", _no_nvidia, "llama-cpp-python is built without CUDA"),
    Kind("llama.cpp", "Vulkan", _no_render_node, "llama-cpp-python is built without Vulkan"),
    Kind("llama.cpp", "ROCm", _no_amd, "llama-cpp-python is built without ROCm"),
    Kind("llama.cpp", "Metal", _not_apple, "llama-cpp-python is built without Metal"),
    Kind("ONNX Runtime", "CUDAExecutionProvider", _no_nvidia, "onnxruntime is built without CUDA"),
    Kind(
        "ONNX Runtime", "QNNExecutionProvider", _no_qualcomm_npu,
        "package onnxruntime-qnn is not installed", "onnxruntime_qnn",
    ),
    Kind(
        "ONNX Runtime", "OpenVINOExecutionProvider", _always,
        "package onnxruntime-ep-openvino is not installed", "onnxruntime_ep_openvino",
    ),
    Kind(
        "ONNX Runtime", "WebGpuExecutionProvider", _no_render_node,
        "package onnxruntime-ep-webgpu is not installed", "onnxruntime_ep_webgpu",
    ),
    Kind("ONNX Runtime", "CoreMLExecutionProvider", _not_apple, "onnxruntime is built without it"),
)  # fmt: skip


def absent(runtime: str, backends: Sequence[str], root: Path = ROOT) -> list[Absence]:
    """List what a runtime could use elsewhere and cannot use here.

    Args:
        runtime: Its name.
        backends: What it has here.
        root: Where /dev and /proc are looked up.
    """
    found = []
    for kind in KINDS:
        if kind.runtime != runtime or any(name.startswith(kind.backend) for name in backends):
            continue
        found.append(Absence(what=f"{runtime} {kind.backend}", reason=_reason(kind, root)))
    return found


def _reason(kind: Kind, root: Path) -> str:
    missing = kind.missing(root)
    installed = kind.module is not None and importlib.util.find_spec(kind.module) is not None
    if installed:
        return missing or "installed, but ONNX Runtime found no device for it"
    return kind.package if missing is None else f"{missing}, and {kind.package}"
