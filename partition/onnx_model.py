"""An ONNX model as plain values: nodes in order, tensors with shapes, weights with sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

Attribute = int | float | str | tuple[int, ...]

# Bits of an element by type name; strings have none.
ELEMENT_BITS: dict[str, int] = {
    "f32": 32, "f16": 16, "bf16": 16, "f64": 64, "f8": 8, "f4": 4,
    "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4, "i2": 2,
    "u64": 64, "u32": 32, "u16": 16, "u8": 8, "u4": 4, "u2": 2,
    "bool": 8, "c64": 64, "c128": 128,
}  # fmt: skip

# `TensorProto.DataType`, onnx.proto.
TYPE_NAMES: dict[int, str] = {
    1: "f32", 2: "u8", 3: "i8", 4: "u16", 5: "i16", 6: "i32", 7: "i64", 8: "string", 9: "bool",
    10: "f16", 11: "f64", 12: "u32", 13: "u64", 14: "c64", 15: "c128", 16: "bf16",
    17: "f8", 18: "f8", 19: "f8", 20: "f8", 21: "u4", 22: "i4", 23: "f4", 24: "f8",
    25: "u2", 26: "i2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A value that flows between nodes.

    Attributes:
        name: In the graph.
        type_name: Such as `f32`; None when unknown.
        shape: Every dimension; None when any is unknown.
        why_unknown: The reason, where type or shape is.
    """

    name: str
    type_name: str | None
    shape: tuple[int, ...] | None
    why_unknown: str = ""

    @property
    def n_elements(self) -> int | None:
        """Elements, None when unknown."""
        return None if self.shape is None else prod(self.shape)

    @property
    def size_bytes(self) -> int | None:
        """Bytes, None when unknown; strings count as unknown."""
        if self.shape is None or self.type_name not in ELEMENT_BITS:
            return None
        return tensor_bytes(self.type_name, self.shape)


@dataclass(frozen=True, slots=True)
class OnnxWeight:
    """An initializer, or the value of a Constant node.

    Attributes:
        name: In the graph.
        type_name: Such as `f32`.
        shape: Every dimension.
        size_bytes: In the file, or in its external data.
        constant: Whether a Constant node holds it.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    size_bytes: int
    constant: bool = False


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One operation.

    Attributes:
        name: Of the node, or made from its type and number where it has none.
        op_type: Such as `Conv`.
        domain: Empty for the standard operations.
        inputs: Names in order; empty for an omitted one.
        outputs: The same.
        attributes: Numbers, lists of integers and strings.
        captured: What its subgraphs take from outside.
        subgraphs: By attribute name.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    captured: tuple[str, ...] = ()
    subgraphs: tuple[tuple[str, OnnxGraph], ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """Every name it reads."""
        return tuple(name for name in (*self.inputs, *self.captured) if name)

    def integers(self, name: str) -> tuple[int, ...]:
        """Return a list of integers among the attributes; empty when absent or of another kind."""
        value = self.attributes.get(name)
        return value if isinstance(value, tuple) else ()

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute, or the default."""
        value = self.attributes.get(name)
        return value if isinstance(value, int) else default


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """A graph.

    Attributes:
        nodes: In topological order, Constant nodes left out.
        tensors: Every input and result by name.
        weights: Initializers and constants by name.
        inputs: Names of what is fed, weights left out.
        outputs: Names of what is returned.
    """

    nodes: tuple[OnnxNode, ...]
    tensors: Mapping[str, OnnxTensor]
    weights: Mapping[str, OnnxWeight]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; elements of less than a byte are packed.

    Raises:
        KeyError: a type without a fixed size.
    """
    return -(-prod(shape) * ELEMENT_BITS[type_name] // 8)
