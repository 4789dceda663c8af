"""`edgert quantize`: a copy of a model whose experts can be read at several widths."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, BinaryIO

from edgert.atomic_file import write_stream
from edgert.cli.opening import model_path, read_text, user_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError
from edgert.events import Notice, WorkProgress
from edgert.units import format_bytes
from quant.model_spec import read_model_spec
from quant.nested.encoder import ModelEncoder
from quant.nested.file import NestedModel, read_nested
from quant.nested.gains import UNIT
from quant.nested.layout import check_widths
from quant.nested.source import TensorReader, expert_stacks
from quant.nested.writer import NestedRequest, hash_files, write_nested
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.divergence import Divergence
    from edgert.cli.options import QuantizeOptions
    from edgert.events import Listener

_FORM = "edgert quantize model.gguf --nested 2..8 -o nested.gguf"


def run(options: QuantizeOptions, context: Context) -> int:
    """Write the nested model, say what it is and return the exit code."""
    widths = parse_widths(options.nested)
    source = model_path(options.model, context.env)
    if source is None or options.out is None:
        raise ConfigError("the model or the file to write is not named", hint=_FORM)
    out = user_path(options.out)
    with ProgressListener(context, quiet=options.output.json) as progress:
        encoder = _write(source, out, widths, options, progress)
        model = read_nested(open_tensor_file(out))
        if model is None:
            raise ValueError(f"{out} was written without nested tensors")
        scores = _scores(model, options, context, progress)
    facts = _facts(model, encoder, scores)
    if options.output.json:
        print(json.dumps({"nested": str(out)} | facts))
    else:
        print(out)
        print(_words(facts))
    return 0


def parse_widths(text: str | None) -> tuple[int, int]:
    """Return base and top of `BASE..TOP`; ConfigError if they cannot be nested."""
    match = re.fullmatch(r"(\d)\.\.(\d)", text or "")
    if match is None:
        raise ConfigError(f"--nested is {text!r}, wanted BASE..TOP", hint=_FORM)
    base, top = int(match[1]), int(match[2])
    try:
        check_widths(base, top)
    except ValueError as error:
        raise ConfigError(f"--nested: {error}", hint=_FORM) from error
    return base, top


def _write(
    source: Path,
    out: Path,
    widths: tuple[int, int],
    options: QuantizeOptions,
    listener: Listener,
) -> ModelEncoder:
    file = open_tensor_file(source)
    read_model_spec(file)
    stacks = expert_stacks(file)
    moments = {}
    if options.evaluated is not None and not read_text(options.evaluated):
        raise ConfigError(f"{options.evaluated}: the text is empty")  # before the work, not after
    if options.calib is not None:
        from edgert.cli.nested_inputs import gather

        moments = gather(file, stacks, options.calib, options.model, listener)
    request = NestedRequest(*widths, hash_files(file), calibrated=bool(moments))
    with TensorReader(file) as reader:
        encoder = ModelEncoder(reader, widths, moments)

        def write(stream: BinaryIO) -> None:
            write_nested(
                stream, reader, request, encoder,
                lambda done, total: listener(WorkProgress("nest", done, total)),
            )  # fmt: skip

        write_stream(out, write, replace=False)
    n_unknown = sum(map(len, encoder.uncalibrated.values()))
    if n_unknown:
        n_all = sum(stack.n_expert for stack in stacks.values())
        words = f"{n_unknown} of {n_all} matrices are of experts that the text never chose"
        listener(Notice(f"{words}: they are not calibrated"))
    return encoder


def _scores(
    model: NestedModel, options: QuantizeOptions, context: Context, listener: Listener
) -> dict[int, Divergence]:
    if options.evaluated is None:
        return {}
    from edgert.cli.nested_eval import evaluate_widths

    evaluated = (options.evaluated, options.chunks)
    return evaluate_widths(model, options.model, evaluated, context.env, listener)


def _facts(
    model: NestedModel, encoder: ModelEncoder, scores: dict[int, Divergence]
) -> dict[str, object]:
    tensors = model.tensors.values()
    n_weights = sum(t.layout.n_rows * t.layout.row_length * t.n_expert for t in tensors)
    noise = encoder.losses.relative()
    lines = []
    for width in range(model.base, model.top + 1):
        n_bytes = sum(t.layout.prefix_bytes(width) * t.n_expert for t in tensors)
        line: dict[str, object] = {
            "width": width,
            "expert_bytes": n_bytes,
            "bits_per_weight": 8 * n_bytes / n_weights,
            "noise": {kind: shares[width] for kind, shares in noise.items()},
        }
        if model.calibrated:
            line["gain"] = sum(t.gain(width) for t in tensors) / len(tensors) / UNIT
        if width in scores:
            line["score"] = asdict(scores[width])
        lines.append(line)
    return {
        "widths": lines,
        "calibrated": model.calibrated,
        "down_extra_bits": model.down_extra_bits,
        "uncalibrated": encoder.uncalibrated,
        "file_bytes": model.file.shards[0].size_bytes,
    }


def _words(facts: dict[str, object]) -> str:
    """Return a line for each width: its bytes, its noise by kind of stack, its score."""
    lines = []
    for line in facts["widths"]:  # type: ignore[attr-defined]
        text = f"{line['width']} bits: {format_bytes(line['expert_bytes'])} of experts, "
        text += f"{line['bits_per_weight']:.2f} bits a weight; noise "
        text += ", ".join(f"{kind} {100 * share:.3g} %" for kind, share in line["noise"].items())
        if "gain" in line:
            text += f"; gain {line['gain']:.4f}"
        if "score" in line:
            score = line["score"]
            change = score["perplexity"] / score["reference_perplexity"] - 1
            text += f"; perplexity {score['perplexity']:.4f} ({100 * change:+.2f} %)"
            text += f", divergence {score['kl']:.5f}"
        lines.append(text)
    extra_bits = facts["down_extra_bits"]
    if extra_bits:
        lines.append(f"down-projections are best kept {extra_bits} bits wider than the others")
    return "\n".join(lines)
