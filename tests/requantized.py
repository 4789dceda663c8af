"""Copies of models with other types of weights, for tests of several precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

_LEAST_DIMENSIONS = 2


def requantize(
    model: Path, out: Path, kind: GGMLQuantizationType, chosen: Callable[[str], bool] = bool
) -> Path:
    """Write a copy of a model in which the matrices of the chosen names are of another type."""
    reader = GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, str(architecture))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value_type = field.types[0]
            sub_type = field.types[-1] if value_type is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), value_type, sub_type)
    for tensor in reader.tensors:
        data, own = tensor.data, tensor.tensor_type
        if len(tensor.shape) >= _LEAST_DIMENSIONS and chosen(tensor.name):
            data, own = quantize(dequantize(data, own).astype(np.float32), kind), kind
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
