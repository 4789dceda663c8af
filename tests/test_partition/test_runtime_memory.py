"""Memory besides weights: against what llama.cpp says about itself, and what it adds up from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from builders import RawGguf, RawTensor, llama, scalar, u32, with_byte_pairs
from edgert.llama.context import LlamaContext
from edgert.llama.lib import LlamaLibrary, load_library
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.weights.memory import cover_twin
from partition.language_workload import describe_language
from partition.runtime_memory import (
    ContextShape,
    buffer_bytes,
    context_bytes,
    scratch_bytes,
    vocabulary_bytes,
)
from quant.metadata import ValueType
from quant.model_spec import read_model_spec
from quant.tensor_file import TensorFile, open_tensor_file
from workload_builders import describe, mixture, renamed, tensor

MIB = 1 << 20
LOGGED_STEP = 53  # sizes are logged in ten-thousandths of a MiB
CONTEXTS = [
    ContextShape(n_ctx, n_tokens, n_logits, cache, cache)
    for n_ctx in (256, 512)
    for n_tokens, n_logits in ((1, 1), (32, 33), (256, 1), (256, 33))
    for cache in ("f16", "q8_0")
]


def with_head_norms(model: RawGguf) -> RawGguf:
    norms = [tensor(f"blk.{i}.attn_{x}_norm.weight", 16) for i in range(2) for x in "qk"]
    return replace(model, tensors=[*model.tensors, *norms])


def routed(architecture: str) -> RawGguf:
    """The mixture without shared experts, under another name."""
    model = renamed(mixture(), architecture, "qwen2moe")
    return replace(model, tensors=[t for t in model.tensors if "shexp" not in t.name])


def with_shared_expert() -> RawGguf:
    shapes = {"gate_shexp": (64, 64), "down_shexp": (64, 64), "gate_inp_shexp": (64,)}
    more = [tensor(f"blk.{i}.ffn_{n}.weight", *d) for i in range(2) for n, d in shapes.items()]
    model = mixture().with_pair(u32("qwen2moe.expert_shared_feed_forward_length", 64))
    return replace(model, tensors=[*model.tensors, *more])


def wide_heads() -> RawGguf:
    """A llama with one head of 64, which llama.cpp rotates before it quantizes it."""
    model = llama()
    shapes = {"attn_k": (64, 64), "attn_v": (64, 64)}

    def widened(entry: RawTensor) -> RawTensor:
        dims = shapes.get(entry.name.split(".")[2]) if entry.name.startswith("blk.") else None
        return tensor(entry.name, *dims) if dims else entry

    pairs = [
        replace(pair, payload=(64 if "dimension" in pair.key else 1).to_bytes(4, "little"))
        if pair.key.endswith((".head_count", ".head_count_kv", "rope.dimension_count"))
        else pair
        for pair in model.pairs
    ]
    return replace(model, pairs=pairs, tensors=[widened(entry) for entry in model.tensors])


MODELS = {
    "llama": llama(),
    "five layers": llama(5),
    "mixtral": routed("llama"),
    "qwen2": renamed(llama(), "qwen2"),
    "qwen3": with_head_norms(renamed(llama(), "qwen3")),
    "qwen3moe": with_head_norms(routed("qwen3moe")),
    "rotated": wide_heads(),
    "mistral3": renamed(llama(3), "mistral3"),
    "smollm3": renamed(llama(3), "smollm3"),
    "internlm2": renamed(llama(3), "internlm2"),
}


@contextmanager
def opened(file: TensorFile) -> Iterator[tuple[LlamaLibrary, LlamaModel]]:
    library = load_library()
    with ExitStack() as stack:
        model = LlamaModel(library, file)
        stack.callback(model.close)
        cover_twin(library.libc)
        model.forget_files()
        yield library, model


def logged_bytes(library: LlamaLibrary, model: LlamaModel, context: ContextShape) -> float:
    """Make a context, free it, and return the size of the compute buffer it had."""
    lines: list[str] = []
    library.log.listen(lines.append)
    try:
        options = LoadOptions(
            model.file.path,
            n_ctx=context.n_ctx,
            n_batch=context.n_ubatch,
            n_logits_max=context.n_logits_max,
            n_threads=1,
            type_k=context.type_k,
            type_v=context.type_v,
        )
        LlamaContext(model, options).close()
    finally:
        library.log.leave(lines.append)
    sizes = re.findall(r"compute buffer size is\s*([\d.]+) MiB", "\n".join(lines))
    assert sizes, "llama.cpp logs its buffers otherwise now"
    return sum(float(size) for size in sizes) * MIB


@pytest.mark.model
@pytest.mark.parametrize("name", MODELS)
def test_modelled_graphs_need_exactly_the_buffer_llama_makes(tmp_path: Path, name: str) -> None:
    file = open_tensor_file(MODELS[name].write(tmp_path / "model.gguf"))
    workload = describe_language(file, read_model_spec(file))
    with opened(file) as (library, model):
        for context in CONTEXTS:
            if "q8_0" in context.type_k and name != "rotated":
                continue  # a row of 16 is no multiple of the block
            logged = logged_bytes(library, model, context)
            assert buffer_bytes(workload, context) == pytest.approx(logged, abs=LOGGED_STEP)


@pytest.mark.model
@pytest.mark.parametrize("architecture", ["baichuan", "refact", "granite", "qwen2moe"])
def test_other_graphs_get_an_estimate_above(tmp_path: Path, architecture: str) -> None:
    model = with_shared_expert() if architecture == "qwen2moe" else renamed(llama(), architecture)
    if architecture == "granite":
        for key in ("embedding_scale", "residual_scale", "logit_scale", "attention.scale"):
            model = model.with_pair(scalar(f"granite.{key}", ValueType.FLOAT32, 1.0))
    file = open_tensor_file(model.write(tmp_path / "model.gguf"))
    workload = describe_language(file, read_model_spec(file))
    with opened(file) as (library, loaded):
        for context in (ContextShape(512, 32), ContextShape(512, 256, 33)):
            logged = logged_bytes(library, loaded, context)
            assert logged - LOGGED_STEP <= buffer_bytes(workload, context) <= 2.5 * logged


def test_logits_of_a_batch_are_the_output_buffer(tmp_path: Path) -> None:
    workload = describe(llama(), tmp_path)
    one, many = (context_bytes(workload, ContextShape(512, 64, n)) for n in (1, 33))
    assert many - one == 4 * 32 * 286
    # The context is made for all of a batch, however few of it are computed at a time.
    assert context_bytes(workload, ContextShape(512, 64, 500)) == one + 4 * 499 * 286
    small = ContextShape(512, 64, 500, n_batch=128)
    assert context_bytes(workload, small) == one + 4 * 127 * 286


def test_scratch_holds_the_widest_activations_as_blocks(tmp_path: Path) -> None:
    quantized = describe(mixture(), tmp_path)
    # Down product: 64 tokens x 2 experts of 128 elements as 34 bytes a 32, and eight bytes for each
    # of 8 experts and 128 rows; more than the 64 rows of 64 floats of dense products.
    context = ContextShape(512, 64)
    wanted = 64 * 2 * 128 * 34 // 32 + 8 * 8 * 128
    tiles = 4 * (128 * 32 + 2 * 64 * 64)
    assert scratch_bytes(quantized, context, 1) == max(wanted, tiles)
    assert scratch_bytes(quantized, context, 4) == 4 * tiles


def test_vocabulary_grows_with_tokens_merges_and_their_texts(tmp_path: Path) -> None:
    pieces = describe(llama(), tmp_path)
    pairs = describe(with_byte_pairs(llama()), tmp_path)
    assert pieces.spec.n_vocab == pairs.spec.n_vocab
    # 28 merges of three bytes; the texts of the tokens differ by less.
    assert vocabulary_bytes(pairs) > vocabulary_bytes(pieces) + 28 * 160 - 2000
