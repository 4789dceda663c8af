"""`edgert show`: what a model is made of, what its context costs, what a budget would keep."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgert.cli.opening import embedded_model, model_path
from edgert.cli.terminal import printable
from edgert.units import format_bytes, parse_bytes
from partition.workload import Workload, describe_workload, split_for_budget
from quant.model_spec import ModelSpec, kv_bytes, read_model_spec
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ModelFlags, ShowOptions

_DEFAULT_CONTEXT = 4096
_PROGRAM_BYTES = 150 * 10**6  # interpreter, libraries and compute buffers, assumed


def run(options: ShowOptions, context: Context) -> int:
    """Print the description and return the exit code."""
    path = model_path(options.model, context.env) or embedded_model()
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    workload = describe_workload(file.tensors)
    facts = _facts(spec, workload, options.model)
    facts["file"] = ", ".join(str(shard.path) for shard in file.shards)
    if options.output.json:
        print(json.dumps(facts | {"layers": [asdict(layer) for layer in workload.layers]}))
        return 0
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        text = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        print(printable(f"{name:{width}}  {_words(text)}", sys.stdout))
    return 0


def _facts(spec: ModelSpec, workload: Workload, flags: ModelFlags) -> dict[str, object]:
    n_ctx = flags.ctx_size or min(spec.n_ctx_train, _DEFAULT_CONTEXT)
    cache_bytes = kv_bytes(spec, n_ctx, flags.cache_type_k, flags.cache_type_v)
    facts: dict[str, object] = {
        "name": spec.name,
        "architecture": spec.architecture,
        "parameters": workload.n_parameters,
        "weight_bytes": workload.weight_bytes,
        "bits_per_weight": round(8 * workload.weight_bytes / workload.n_parameters, 2),
        "formats": dict(sorted(workload.by_type.items(), key=lambda item: -item[1])),
        "n_layer": spec.n_layer,
        "n_embd": spec.n_embd,
        "n_head": spec.n_head,
        "n_head_kv": spec.n_head_kv,
        "n_expert": spec.n_expert,
        "n_vocab": spec.n_vocab,
        "tokenizer": spec.tokenizer_model,
        "chat_template": spec.chat_template is not None,
        "n_ctx_train": spec.n_ctx_train,
        "largest_layer_bytes": max((x.total_bytes for x in workload.layers), default=0),
        "outside_layers": dict(workload.outside),
        "n_ctx": n_ctx,
        "kv_cache_bytes": cache_bytes,
    }
    return facts if flags.memory is None else facts | _fit(workload, flags.memory, cache_bytes)


def _fit(workload: Workload, memory: str, cache_bytes: int) -> dict[str, object]:
    """Estimate what a budget would keep; the run itself measures instead of assuming."""
    budget_bytes = parse_bytes(memory)
    split = split_for_budget(workload, budget_bytes - cache_bytes - _PROGRAM_BYTES)
    return {
        "budget_bytes": budget_bytes,
        "program_bytes": _PROGRAM_BYTES,
        "fits": split.fits,
        "pinned_layers": f"about {split.n_pinned_layers} of {len(workload.layers)}",
        "pinned_bytes": split.pinned_bytes,
        "window_bytes": split.window_bytes,
        "streamed_bytes": split.streamed_bytes,
        "missing_bytes": split.missing_bytes,
    }


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
