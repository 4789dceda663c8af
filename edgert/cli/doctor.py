"""`edgert doctor`: checks of this machine and installation, each ok, warn or fail with a reason."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from devices.host import (
    cpu_features,
    cpu_fingerprint,
    cpu_name,
    default_memory_budget,
    memory_groups,
    n_physical_cores,
    n_usable_cpus,
)
from devices.measure_flash import supports_direct
from edgert.cli.opening import embedded_model, model_path
from edgert.errors import EdgertError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ShowOptions

Status = Literal["ok", "warn", "fail"]

_LIBRARIES = (
    "llama-cpp-python", "numpy", "onnx", "onnxruntime", "gguf", "pydantic", "typer", "rich",
    "prompt_toolkit", "psutil", "jinja2",
)  # fmt: skip
_FAST = {"avx2", "avx512f", "asimd", "neon", "rvv"}
_LITTLE_BYTES = 500 * 10**6
_COLORS = {"ok": "32", "warn": "33", "fail": "31"}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def run(options: ShowOptions, context: Context) -> int:
    """Print the findings; the exit code is 1 when one of them is a failure."""
    checks: list[Check] = []
    for name, find in _checks(options, context):
        try:
            checks.append(find())
        except (EdgertError, OSError) as error:
            hint = error.hint if isinstance(error, EdgertError) else None
            checks.append(Check(name, "fail", str(error), hint))
    if options.output.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(_line(check, width, colored=context.color() and context.stdout.isatty()))
    return int(any(check.status == "fail" for check in checks))


def _checks(options: ShowOptions, context: Context) -> Iterator[tuple[str, Callable[[], Check]]]:
    yield "python", _python
    yield "libraries", _libraries
    yield "llama.cpp", _llama
    yield "cpu", _cpu
    yield "memory", _memory
    yield "control groups", _groups
    cache = context.directories.cache
    yield "cache folder", lambda: _direct("cache folder", cache)
    model = model_path(options.model, context.env)
    if model is not None:
        yield "model", lambda: _model("model", model)
        yield "model folder", lambda: _direct_file("model folder", model)
    yield "embedded model", lambda: _model("embedded model", embedded_model())
    yield "configuration", lambda: _configuration(context)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} {sys.executable}")


def _libraries() -> Check:
    found, missing = [], []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        hint = f"{sys.executable} -m pip install {' '.join(missing)}"
        return Check("libraries", "fail", f"missing: {', '.join(missing)}", hint)
    return Check("libraries", "ok", ", ".join(found))


def _llama() -> Check:
    return Check("llama.cpp", "ok", _system_info())


def _system_info() -> str:
    from edgert.llama.lib import load_library

    text: bytes = load_library().api.llama_print_system_info()
    return " ".join(text.decode("utf-8", "replace").split())


def _cpu() -> Check:
    features = cpu_features()
    detail = f"{cpu_name()}, {n_physical_cores()} cores, {n_usable_cpus()} usable threads"
    detail += f", features {cpu_fingerprint(_system_info())}"
    if not _FAST.intersection(features):
        return Check("cpu", "warn", f"{detail}; no AVX2, NEON or RVV: computing will be slow")
    return Check("cpu", "ok", detail)


def _memory() -> Check:
    budget = default_memory_budget()
    detail = (
        f"{format_bytes(budget.available_bytes)} available ({budget.reason}), "
        f"default budget {format_bytes(budget.budget_bytes)}"
    )
    status: Status = "warn" if budget.budget_bytes < _LITTLE_BYTES else "ok"
    return Check("memory", status, detail)


def _groups() -> Check:
    groups = memory_groups()
    text = "; ".join(
        f"{group.path}: {format_bytes(group.used_bytes)} of {format_bytes(group.limit_bytes)} used"
        for group in groups
    )
    return Check("control groups", "ok", text or "no memory limit")


def _direct(name: str, folder: Path) -> Check:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        probe.write(bytes(8192))
        probe.flush()
        return _direct_file(name, Path(probe.name))


def _direct_file(name: str, path: Path) -> Check:
    if supports_direct(path):
        return Check(name, "ok", f"{path.parent}: O_DIRECT works")
    return Check(
        name, "warn", f"{path.parent}: no O_DIRECT, reads go through the page cache",
        "keep large models on a local disk with ext4, xfs or f2fs",
    )  # fmt: skip


def _model(name: str, path: Path) -> Check:
    from quant.model_spec import read_model_spec
    from quant.tensor_file import open_tensor_file

    spec = read_model_spec(open_tensor_file(path))
    detail = f"{path}: {spec.name}, {spec.architecture}, {format_bytes(spec.weight_bytes)}"
    return Check(name, "ok", detail)


def _configuration(context: Context) -> Check:
    path = context.directories.config_file
    chosen = [
        f"{name} ({origin})" for name, origin in context.origins.items() if origin != "default"
    ]
    detail = f"{path}{'' if path.exists() else ' (not there)'}"
    return Check("configuration", "ok", f"{detail}; set: {', '.join(chosen) or 'nothing'}")


def _line(check: Check, width: int, *, colored: bool) -> str:
    status = f"{check.status:4}"
    if colored:
        status = f"\x1b[{_COLORS[check.status]}m{status}\x1b[0m"
    hint = f" ({check.hint})" if check.hint else ""
    return f"{status}  {check.name:{width}}  {check.detail}{hint}"
