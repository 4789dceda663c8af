"""`edgert quantize`: a copy of a model whose experts can be read at several widths."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO

from edgert.atomic_file import write_stream
from edgert.cli.opening import find_model, user_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError
from edgert.events import WorkProgress
from edgert.units import format_bytes
from quant.model_spec import read_model_spec
from quant.nested.code import NestedMatrix, encode
from quant.nested.file import read_nested
from quant.nested.layout import check_widths
from quant.nested.source import ExpertStack, TensorReader, expert_stacks
from quant.nested.writer import NestedRequest, hash_files, write_nested
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.options import QuantizeOptions

_FORM = "edgert quantize model.gguf --nested 2..8 -o nested.gguf"


@dataclass(frozen=True, slots=True)
class WidthReport:
    """What one width of a nested file takes."""

    width: int
    expert_bytes: int
    bits_per_weight: float


def run(options: QuantizeOptions, context: Context) -> int:
    """Write the nested model, say what it is and return the exit code."""
    if options.path is None or options.out is None:
        raise ConfigError("the model or the file to write is not named", hint=_FORM)
    base, top = parse_widths(options.nested)
    source, out = find_model(options.path, context.env), user_path(options.out)
    with ProgressListener(context, quiet=options.output.json) as progress:
        file = open_tensor_file(source)
        read_model_spec(file)
        expert_stacks(file)
        request = NestedRequest(base, top, hash_files(file))
        with TensorReader(file) as reader:

            def code(stack: ExpertStack, expert: int) -> NestedMatrix:
                adopted = reader.adopt(stack, expert, base, top)
                return adopted or encode(reader.weights(stack, expert), base, top)

            def write(stream: BinaryIO) -> None:
                write_nested(
                    stream, reader, request, code,
                    lambda done, total: progress(WorkProgress("nest", done, total)),
                )  # fmt: skip

            write_stream(out, write, replace=False)
    _report(out, options.output.json)
    return 0


def parse_widths(text: str | None) -> tuple[int, int]:
    """Return base and top of `BASE..TOP`; ConfigError if they cannot be nested."""
    match = re.fullmatch(r"(\d)\.\.(\d)", text or "")
    hint = f"--nested 2..8; {_FORM}"
    if match is None:
        raise ConfigError(f"--nested is {text!r}, wanted BASE..TOP", hint=hint)
    base, top = int(match[1]), int(match[2])
    try:
        check_widths(base, top)
    except ValueError as error:
        raise ConfigError(f"--nested: {error}", hint=hint) from error
    return base, top


def _report(path: Path, as_json: bool) -> None:
    file = open_tensor_file(path)
    model = read_nested(file)
    if model is None:
        raise ValueError(f"{path} was written without nested tensors")
    widths = []
    n_weights = sum(t.layout.n_groups * 32 * t.n_expert for t in model.tensors.values())
    for width in range(model.base, model.top + 1):
        n_bytes = sum(t.layout.prefix_bytes(width) * t.n_expert for t in model.tensors.values())
        widths.append(WidthReport(width, n_bytes, 8 * n_bytes / n_weights))
    if as_json:
        print(json.dumps({"nested": str(path), "widths": [asdict(width) for width in widths]}))
        return
    print(path)
    for line in widths:
        print(
            f"{line.width} bits: experts {format_bytes(line.expert_bytes)}, "
            f"{line.bits_per_weight:.2f} bits a weight"
        )
