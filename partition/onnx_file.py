"""Reads ONNX files and checks them: versions, domains, names, weights, external data.

Weights are sized, not loaded. Whatever a file claims is compared with what it holds before onnx's
own C++ code sees it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath
from typing import NoReturn

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from edgert.errors import ConfigError, FormatError
from partition.onnx_model import ELEMENT_BITS, TYPE_NAMES

MOST_NODES = 200_000
_MOST_FILE_BYTES = (1 << 31) - 1  # protobuf's own limit
_MOST_ELEMENTS = 1 << 48
_MOST_RANK = 64
_SMALL_ELEMENTS = 1024  # shapes, axes and the like, which shape inference computes with
# Domains whose operations ONNX Runtime has kernels for (contrib and machine learning ones too).
KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"}
    | {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
)
_RAW_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def load_model(path: Path) -> ModelProto:
    """Read a model, check it, and drop the data of its large weights.

    Returns:
        The model with types and shapes of all weights, and data of the small ones only.

    Raises:
        ConfigError: no such file, or no regular one.
        FormatError: no ONNX model, of a newer version, with operations of unknown domains,
            malformed weights, or external data that is missing, too short or outside its folder.
    """
    model = _parse(path, _read(path))
    _check_texts(path, model)
    _check_versions(path, model)
    functions = {(function.domain, function.name) for function in model.functions}
    _check_functions(path, model)
    imported = {entry.domain for entry in model.opset_import}
    for node in _all_nodes(model.graph):
        _check_domain(path, node, imported, functions)
    for tensor in _all_initializers(model.graph):
        check_tensor(path, tensor)
        _forget(tensor)
    return model


def external_files(model: ModelProto) -> tuple[str, ...]:
    """Return the files with weights of a checked model, relative to its folder, sorted."""
    locations = {
        entry.value.replace("\\", "/")
        for tensor in _all_initializers(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(str(PurePosixPath(location)) for location in locations))


def check_tensor(path: Path, tensor: TensorProto) -> None:
    """Compare what a tensor says about itself with the data it has.

    Raises:
        FormatError: unknown type, bad dimensions, or other data than it claims.
    """
    type_name = TYPE_NAMES.get(tensor.data_type)
    if type_name is None:
        _fail(path, f"data type {tensor.data_type} is unknown", tensor=tensor.name)
    dims = tuple(tensor.dims)
    n_elements = prod(dims)
    if len(dims) > _MOST_RANK or any(d < 0 for d in dims) or n_elements > _MOST_ELEMENTS:
        shown = f"{dims[:8]}"
        _fail(path, f"shape {shown}, wanted dimensions from 0 up", tensor=tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(path, tensor, type_name)
        return
    if type_name == "string":
        saw, wanted = len(tensor.string_data), n_elements
    elif tensor.HasField("raw_data"):
        saw, wanted = len(tensor.raw_data), -(-n_elements * ELEMENT_BITS[type_name] // 8)
    else:
        saw = sum(len(getattr(tensor, field)) for field in _RAW_FIELDS)
        bits = ELEMENT_BITS[type_name]
        wanted = n_elements * 2 if type_name in ("c64", "c128") else n_elements
        wanted = -(-n_elements * bits // 8) if bits < 8 else wanted
    if saw != wanted:
        _fail(path, f"holds {saw:,} values or bytes, its shape wants {wanted:,}", tensor.name)


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="check the path") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file", hint="name an .onnx file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > _MOST_FILE_BYTES:
            _fail(
                path,
                f"has {status.st_size:,} bytes, protobuf allows {_MOST_FILE_BYTES:,}",
                hint="save it with external data",
            )
        return file.read()


def _parse(path: Path, content: bytes) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise FormatError(
            f"not an ONNX model: {error}", path=path, hint="the file is damaged or of another kind"
        ) from error
    if not model.HasField("graph") or not model.ir_version:
        _fail(path, "not an ONNX model: no graph", hint="the file is of another kind")
    return model


def _check_texts(path: Path, message: Message) -> None:
    """Refuse text that is not UTF-8, which protobuf hands out as bytes."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == field.TYPE_STRING:
            wrong = [text for text in values if isinstance(text, bytes)]
            if wrong:
                _fail(path, f"{field.full_name} is {wrong[0][:80]!r}, wanted UTF-8")
        elif field.type == field.TYPE_MESSAGE:
            for inner in values:
                _check_texts(path, inner)


def _check_versions(path: Path, model: ModelProto) -> None:
    if model.ir_version > onnx.IR_VERSION:
        _fail(path, f"IR version {model.ir_version}, known up to {onnx.IR_VERSION}")
    newest = {"": onnx.defs.onnx_opset_version(), "ai.onnx": onnx.defs.onnx_opset_version()}
    if not model.opset_import:
        _fail(path, "opset_import is empty, wanted the version of its operations")
    seen: set[str] = set()
    for entry in model.opset_import:
        if entry.domain in seen:
            _fail(path, f"opset_import names domain {entry.domain!r} twice")
        seen.add(entry.domain)
        most = newest.get(entry.domain, 1 << 31)
        if not 1 <= entry.version <= most:
            _fail(path, f"opset {entry.version} of {entry.domain!r}, known are 1 to {most}")


def _check_domain(
    path: Path, node: NodeProto, imported: set[str], functions: set[tuple[str, str]]
) -> None:
    label = node_label(node)
    if (node.domain, node.op_type) in functions:
        return
    if node.domain not in KNOWN_DOMAINS:
        _fail(
            path,
            f"node {label}: operation {node.op_type} of domain {node.domain!r} is no standard one "
            "and no function of this model",
            hint="custom operations are not supported",
        )
    if {"", "ai.onnx"} & {node.domain}:
        known = bool({"", "ai.onnx"} & imported)
    else:
        known = node.domain in imported
    if not known:
        _fail(path, f"node {label}: opset_import lacks its domain {node.domain!r}")


def _check_functions(path: Path, model: ModelProto) -> None:
    """Refuse functions that call themselves, or that grow into more nodes than a model may have."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    for start in functions:
        stack = [(start, False)]
        entered: set[tuple[str, str]] = set()
        while stack:
            key, leaving = stack.pop()
            if key in sizes:
                continue
            nodes = [n for node in functions[key].node for n in (node, *_inside(node))]
            called = [k for n in nodes if (k := (n.domain, n.op_type)) in functions]
            if leaving:
                sizes[key] = len(nodes) + sum(sizes.get(k, MOST_NODES) for k in called)
                continue
            if key in entered:
                _fail(path, f"function {key[1]} of {key[0]!r} calls itself")
            entered.add(key)
            stack.append((key, True))
            for name in set(called):
                if name in entered and name not in sizes:
                    _fail(path, f"function {name[1]} of {name[0]!r} calls itself")
                stack.append((name, False))
    n_nodes = sum(sizes.get((n.domain, n.op_type), 1) for n in _all_nodes(model.graph))
    if n_nodes > MOST_NODES:
        _fail(path, f"{n_nodes:,} nodes, wanted at most {MOST_NODES:,}")


def _check_external(path: Path, tensor: TensorProto, type_name: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    relative = Path(location.replace("\\", "/"))
    unsafe = relative.is_absolute() or ".." in relative.parts or ":" in location
    if not location or unsafe or "\0" in location:
        _fail(
            path,
            f"external data at {location[:200]!r}, wanted a file below the model's folder",
            tensor=tensor.name,
        )
    # Where a link to a model lies counts, not what it leads to: ONNX Runtime looks there too.
    folder = path.parent.resolve()
    target = (folder / relative).resolve()
    if not target.is_relative_to(folder):
        _fail(path, f"external data {location!r} leads out of its folder", tensor=tensor.name)
    if not target.is_file():
        message, hint = f"external data file {location!r} is missing", "copy it beside the model"
        _fail(path, message, tensor=tensor.name, hint=hint)
    if type_name == "string":
        _fail(path, "strings cannot be external data", tensor=tensor.name)
    wanted = -(-prod(tensor.dims) * ELEMENT_BITS[type_name] // 8)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", wanted))
    except ValueError:
        _fail(path, "offset or length of external data is no number", tensor=tensor.name)
    size = target.stat().st_size
    if offset < 0 or length != wanted or offset + length > size:
        _fail(
            path,
            f"external data [{offset:,}, {offset + length:,}) of {size:,} bytes in {location!r}, "
            f"its shape wants {wanted:,}",
            tensor=tensor.name,
        )


def _forget(tensor: TensorProto) -> None:
    """Drop the data of a large weight: only small ones say anything about shapes."""
    if tensor.data_type == TensorProto.STRING or prod(tensor.dims) <= _SMALL_ELEMENTS:
        return
    for name in ("raw_data", *_RAW_FIELDS):
        tensor.ClearField(name)


def node_label(node: NodeProto) -> str:
    """Return what to call a node in messages: its name, or its type and first result."""
    return node.name or f"{node.op_type} of {(list(node.output) or ['nothing'])[0]}"


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """Yield the graphs among a node's attributes, by attribute name."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    for _, graph in subgraphs(node):
        yield from _all_nodes(graph)


def _all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        yield from _inside(node)


def _all_initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
        for _, inner in subgraphs(node):
            yield from _all_initializers(inner)


def _fail(path: Path, message: str, tensor: str | None = None, hint: str | None = None) -> NoReturn:
    raise FormatError(message, path=path, tensor=tensor, hint=hint)
