"""Typed access to metadata; llama.cpp refuses or asserts on values of another type."""

from __future__ import annotations

from typing import NoReturn

from edgert.errors import FormatError
from quant.metadata import ArrayField, ValueType
from quant.tensor_file import TensorFile

_LARGEST_U32 = 2**32 - 1
_LARGEST_PER_LAYER = 1 << 24  # heads, experts and widths never come near


class Keys:
    """Reads the metadata of one model; names without a known prefix belong to its architecture."""

    def __init__(self, tensor_file: TensorFile, architecture: str) -> None:
        self.tensor_file = tensor_file
        self.architecture = architecture

    def full_name(self, key: str) -> str:
        """Return the key as the file spells it."""
        if key.startswith(("general.", "tokenizer.")):
            return key
        return f"{self.architecture}.{key}"

    def number(
        self,
        key: str,
        *,
        default: int | None = None,
        at_least: int = 0,
        at_most: int = _LARGEST_U32,
    ) -> int:
        """Return a uint32 value within bounds; FormatError if it is absent and has no default."""
        value = self.optional_number(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        if not at_least <= value <= at_most:
            self.fail(key, f"is {value:,}, wanted {at_least:,} to {at_most:,}")
        return value

    def optional_number(self, key: str) -> int | None:
        """Return a uint32 value, or None if the key is absent."""
        value = self._typed(key, ValueType.UINT32)
        return value if isinstance(value, int) else None

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a string value; FormatError if it is absent and has no default."""
        value = self.optional_text(key)
        if value is None:
            if default is None:
                self.fail(key, "is missing")
            return default
        return value

    def optional_text(self, key: str) -> str | None:
        """Return a string value, or None if the key is absent."""
        value = self._typed(key, ValueType.STRING)
        return value if isinstance(value, str) else None

    def optional_float(self, key: str) -> float | None:
        """Return a float32 value, or None if the key is absent."""
        value = self._typed(key, ValueType.FLOAT32)
        return value if isinstance(value, float) else None

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean value, or the default if the key is absent."""
        value = self._typed(key, ValueType.BOOL)
        return default if value is None else bool(value)

    def optional_array(self, key: str, *element_types: ValueType) -> ArrayField | None:
        """Return an array of one of the element types, or None if the key is absent."""
        value = self._typed(key, ValueType.ARRAY)
        if not isinstance(value, ArrayField):
            return None
        if value.element_type not in element_types:
            wanted = " or ".join(t.name.lower() for t in element_types)
            self.fail(key, f"is an array of {value.element_type.name.lower()}, wanted {wanted}")
        return value

    def per_layer(
        self, key: str, n_layer: int, *, default: int | tuple[int, ...] | None
    ) -> int | tuple[int, ...]:
        """Return one number for all layers, or a tuple of one a layer; errors as `number`."""
        name = self.full_name(key)
        value = self.tensor_file.metadata.get(name)
        if not isinstance(value, ArrayField):
            if value is None and default is not None:
                return default
            return self.number(key, at_most=_LARGEST_PER_LAYER)
        if value.element_type not in (ValueType.UINT32, ValueType.INT32):
            self.fail(
                key, f"is an array of {value.element_type.name.lower()}, wanted uint32 or int32"
            )
        if value.count != n_layer:
            self.fail(key, f"has {value.count:,} elements, wanted {n_layer}, one a layer")
        numbers = tuple(int(number) for number in value.read())
        for layer, number in enumerate(numbers):
            if not 0 <= number <= _LARGEST_PER_LAYER:
                self.fail(
                    key, f"is {number:,} in layer {layer}, wanted 0 to {_LARGEST_PER_LAYER:,}"
                )
        return numbers

    def fail(self, key: str, message: str, *, hint: str | None = None) -> NoReturn:
        """Raise the FormatError of a key."""
        raise FormatError(
            f"key {self.full_name(key)} {message}", path=self.tensor_file.path, hint=hint
        )

    def _typed(self, key: str, wanted: ValueType) -> object:
        name = self.full_name(key)
        saw = self.tensor_file.value_types.get(name)
        if saw is not None and saw is not wanted:
            self.fail(key, f"is a {saw.name.lower()}, wanted a {wanted.name.lower()}")
        return self.tensor_file.metadata.get(name)
