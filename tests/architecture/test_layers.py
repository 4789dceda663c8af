"""Who may import whom, sizes of files and functions, and constructs that are not allowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("edgert", "partition", "quant", "devices")
FOUNDATION = (
    "edgert.errors", "edgert.units", "edgert.events", "edgert.timeline", "edgert.atomic_file",
    "edgert.strict_json", "edgert",
)  # fmt: skip
INTERFACE = ("edgert.cli", "edgert.api", "edgert.aio", "edgert.loading", "edgert.deployment")

MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 6
LONG_FILES = ("edgert/llama/lib.py",)
# Where every option has a name of its own.
MANY_PARAMETERS = ("load",)

ALLOWED = {
    "foundation": FOUNDATION,
    "quant": (*FOUNDATION, "quant"),
    "devices": (*FOUNDATION, "devices"),
    "partition": (
        *FOUNDATION, "partition", "quant.formats", "quant.model_spec", "quant.parts.cuts",
        "quant.parts.rules", "quant.tensor_file", "devices.profile", "devices.topology",
    ),
    "runtime": (
        "edgert", "partition.manifest", "partition.manifest_file", "partition.residency",
        "partition.expert_slots", "quant", "devices.profile", "devices.steady",
    ),
    "interface": PACKAGES,
}  # fmt: skip


def layer_of(module: str) -> str:
    if module in FOUNDATION:
        return "foundation"
    if module.split(".")[0] != "edgert":
        return module.split(".")[0]
    return "interface" if _inside(module, INTERFACE) else "runtime"


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    found = []
    for module, path in modules(root):
        if module == "edgert":
            continue  # resolves public names lazily, for whoever asks
        layer = layer_of(module)
        for name in imports(ast.parse(path.read_text())):
            ours = name.split(".")[0] in PACKAGES
            below = layer_of(name) != "interface" or layer == "interface"
            if ours and not (_may(name, layer) and below):
                found.append(f"{module} ({layer}) imports {name}")
    return found


def _may(name: str, layer: str) -> bool:
    if layer in ("runtime", "interface"):
        return _inside(name, ALLOWED[layer])
    # Below the runtime, `edgert` itself is only a lazy door.
    return name == "edgert" or _inside(name, tuple(a for a in ALLOWED[layer] if a != "edgert"))


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_point_downwards() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("quant/planted.py", "import devices.host"),
        ("quant/planted.py", "from edgert import engine"),
        ("devices/planted.py", "from quant.formats import FORMATS"),
        ("partition/planted.py", "from edgert.llama.backend import Backend"),
        ("partition/planted.py", "def f():\n    from devices import host"),
        ("edgert/planted.py", "from partition import search"),
        ("edgert/planted.py", "from devices.host import n_usable_cpus"),
        ("edgert/llama/planted.py", "import edgert.cli.main"),
        ("edgert/errors.py", "import edgert.units, edgert.engine"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, module: str, statement: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("quant/planted.py", "from edgert.errors import FormatError\nimport quant.formats, numpy"),
        ("partition/planted.py", "from devices.profile import Rate\nimport quant.formats"),
        ("edgert/planted.py", "from devices.profile import Rate\nfrom quant import tensor_file"),
        ("edgert/cli/planted.py", "import devices.host, partition.search, edgert.llama.lib"),
    ],
)
def test_allowed_imports_are_not_violations(tmp_path: Path, module: str, statement: str) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert violations(tmp_path) == []


def _sources() -> list[Path]:
    folders = [ROOT / name for name in (*PACKAGES, "scripts", "tests")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_no_file_is_too_long() -> None:
    found = {
        str(path.relative_to(ROOT)): n_lines
        for path in _sources()
        if (n_lines := len(path.read_text().splitlines())) > MOST_FILE_LINES
    }
    assert not {name: n for name, n in found.items() if name not in LONG_FILES}


def test_no_function_is_too_long_or_takes_too_much() -> None:
    found = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found += [f"{where}: {problem}" for problem in _problems(node)]
    assert found == []


def _problems(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    doc_lines = len((ast.get_docstring(node) or "").splitlines())
    n_lines = (node.end_lineno or node.lineno) - node.lineno + 1 - doc_lines
    if n_lines > MOST_FUNCTION_LINES:
        yield f"{n_lines} lines without docstring"
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    n_parameters = sum(argument.arg not in ("self", "cls") for argument in arguments)
    if n_parameters > MOST_PARAMETERS and node.name not in MANY_PARAMETERS:
        yield f"{n_parameters} parameters"


def test_every_module_says_what_it_owns() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in _sources()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert missing == []


def test_no_module_is_named_for_nothing() -> None:
    vague = {"utils", "common", "helpers", "misc"}
    assert [path for path in _sources() if path.stem in vague] == []


def test_only_tops_of_the_program_of_callbacks_and_of_threads_catch_everything() -> None:
    found = [
        module
        for module, path in modules(ROOT)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node)
    ]
    # An error in a callback must not cross llama.cpp's frames: the tap raises it afterwards.
    # A reader thread hands its error to whoever waits for the read; without it they would wait on.
    # So does the thread that computes for many sessions.
    assert found == [
        "edgert.cli.main", "edgert.experts.loads", "edgert.hosts.cloud.shared_part",
        "edgert.llama.tap", "edgert.weights.flash",
    ]  # fmt: skip


def _catches_everything(node: ast.ExceptHandler) -> bool:
    broad = node.type is None or (
        isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    )
    last = node.body[-1]
    return broad and not (isinstance(last, ast.Raise) and last.exc is None)


def test_no_assert_outside_tests() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, path in modules(ROOT)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
