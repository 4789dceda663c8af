"""The packages, the public names, and what `edgert --help` may load."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgert

ROOT = Path(__file__).parent.parent.parent
HEAVY = (
    "numpy", "cryptography", "llama_cpp", "onnx", "onnxruntime", "pydantic", "rich",
    "prompt_toolkit", "jinja2", "gguf", "psutil", "edgert.api", "edgert.engine",
    "edgert.llama", "quant",
)  # fmt: skip

PUBLIC = {
    "AsyncEngine", "BackendError", "Cancelled", "CapacityError", "Chunk", "ConfigError",
    "DeviceError", "EdgertError", "Engine", "FormatError", "GenerationStats", "LinkError",
    "LinkTimeout", "MeasurementError", "PlanError", "Reply", "SamplingParams", "__version__",
    "load",
}  # fmt: skip


def child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_four_packages_and_nothing_else_are_importable_from_the_root() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == {"edgert", "partition", "quant", "devices"}


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == edgert.__version__
    assert importlib.metadata.version("edgert") == edgert.__version__


def test_public_names_are_these_and_all_resolve() -> None:
    assert set(edgert.__all__) == PUBLIC
    assert set(dir(edgert)) == PUBLIC
    assert [name for name in PUBLIC if getattr(edgert, name) is None] == []


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = edgert.nonsense  # type: ignore[attr-defined]


def test_errors_can_be_imported_without_anything_heavy() -> None:
    loaded = child("import edgert.errors, edgert.units, sys; print(*sys.modules)").split()
    assert not [name for name in loaded if name.split(".")[0] in HEAVY or name in HEAVY]


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [(["--help"], ()), (["--version"], ()), (["chat", "--help"], ("pydantic",))],
)
def test_help_loads_nothing_heavy(arguments: list[str], needed: tuple[str, ...]) -> None:
    """Typer parses the flags of a subcommand with pydantic, which is why that one is needed."""
    unwanted = set(HEAVY) - set(needed)
    code = (
        "import sys\nfrom edgert.cli.main import run\n"
        f"code = run({arguments!r})\nprint('LOADED', *sys.modules)\nsys.exit(code)"
    )
    loaded = child(code).rpartition("LOADED")[2].split()
    assert not [name for name in loaded if name.split(".")[0] in unwanted or name in unwanted]


def test_program_is_installed_under_its_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="edgert")
    assert entry.value == "edgert.cli.main:main"


def test_scripts_that_people_run_are_executable() -> None:
    for name in ("scripts/chat", "scripts/check", "scripts/setup", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, name
