"""Seeded mutations of GGUF files, and a child process that shows what llama.cpp makes of them."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import builders
from builders import Pair, RawGguf, RawTensor
from edgert.errors import FormatError
from quant.architectures import KNOWN_ARCHITECTURES
from quant.formats import FORMATS, GgmlType
from quant.metadata import SCALAR_CODES, ValueType
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

CHILD = Path(__file__).parent / "attacks" / "loader_child.py"
MARK = "outcome: "  # of loader_child.py
_CHILD_TIMEOUT_S = 300
_NUMBERS: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    16,
    31,
    64,
    127,
    128,
    255,
    256,
    286,
    512,
    513,
    1 << 16,
    1 << 20,
)
_NUMBERS += (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_ARCH_KEYS = (
    "vocab_size", "expert_count", "expert_used_count", "expert_group_count",
    "nextn_predict_layers", "expert_group_used_count", "attention.key_length",
    "attention.value_length", "pooling_type", "attention.sliding_window",
    "rope.dimension_count", "rope.scaling.factor", "rope.scaling.type", "rope.freq_base",
    "attention.layer_norm_epsilon", "attention.key_length_mla", "router.count",
    "attention.value_length_mla", "attention.causal", "embedding_length_out",
    "leading_dense_block_count", "attention.kv_lora_rank", "ssm.conv_kernel", "ssm.inner_size",
    "ssm.state_size", "logit_scale", "ssm.time_step_rank", "ssm.group_count",
    "attention.max_alibi_bias", "attention.clamp_kqv", "attention.sliding_window_pattern",
    "rope.dimension_sections", "attention.shared_kv_layers", "wkv.head_size",
    "full_attention_interval", "expert_feed_forward_length", "decoder_block_count",
    "rope.scaling.original_context_length", "rope.dimension_count_swa",
    "attention.key_length_swa", "interleave_moe_layer_step", "shortconv.l_cache",
    "token_shift_count", "embedding_length_per_layer_input",
)  # fmt: skip
_TOKENIZER_KEYS = (
    "model", "pre", "bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id",
    "add_eos_token", "seperator_token_id", "padding_token_id", "add_space_prefix",
    "add_sep_token", "merges", "precompiled_charsmap", "token_type_count", "suppress_tokens",
    "remove_extra_whitespaces",
)  # fmt: skip
_TEXTS: tuple[bytes, ...] = (
    b"",
    b"llama",
    b"gpt2",
    b"bert",
    b"t5",
    b"rwkv",
    b"plamo2",
    b"gemma4",
    b"none",
    b"linear",
    b"yarn",
)
_TEXTS += (
    b"longrope",
    b"llama-bpe",
    b"default",
    b"phi-3",
    b"\xff\xfe",
    b"test",
    b"whitespace",
    b"hybriddna",
)


def mutate_structure(model: RawGguf, rng: random.Random) -> RawGguf:
    """Return a copy with one to three fields changed, still laid out as a GGUF file."""
    for _ in range(rng.randint(1, 3)):
        model = rng.choice(_CHANGES)(model, rng)
    return model


def flip_bytes(content: bytes, header_length: int, rng: random.Random) -> bytes:
    """Return a copy with up to four bytes of the header changed, or cut short."""
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(header_length)
        mutated[position] = rng.choice(
            (rng.randrange(256), mutated[position] ^ 1 << rng.randrange(8))
        )
    if rng.random() < 0.1:
        del mutated[rng.randrange(len(mutated)) :]
    return bytes(mutated)


def passes_validation(path: Path) -> bool:
    """Return whether edgert would hand the file to llama.cpp; only FormatError means no."""
    try:
        read_model_spec(open_tensor_file(path))
    except FormatError:
        return False
    return True


def find_killers(paths: Iterable[Path], *, batch: int = 64) -> list[tuple[Path, int]]:
    """Hand files to child processes; return those a child died on, with its exit status."""
    waiting, killers = list(paths), []
    while waiting:
        chosen, waiting = waiting[:batch], waiting[batch:]
        answers, status = _ask_child(chosen)
        if status or len(answers) < len(chosen):
            killers.append((chosen[len(answers)], status))
            waiting = chosen[len(answers) + 1 :] + waiting
    return killers


def outcomes(paths: Iterable[Path]) -> list[str]:
    """Return how far llama.cpp got with each file, such as `refused` or `decoded 0`."""
    return _ask_child(list(paths))[0]


def _ask_child(paths: list[Path]) -> tuple[list[str], int]:
    process = subprocess.run(
        [sys.executable, str(CHILD)],
        input="".join(f"{path}\n" for path in paths),
        text=True,
        capture_output=True,
        timeout=_CHILD_TIMEOUT_S,
        check=False,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # a debugger's would take seconds
    )
    # ggml prints to stdout too when it aborts, so answers are marked.
    lines = process.stdout.splitlines()
    answers = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    return answers, process.returncode


def _random_value(rng: random.Random) -> tuple[int, bytes]:
    """Return a type id and payload of any sort."""
    kind = rng.random()
    if kind < 0.5:
        return ValueType.UINT32, struct.pack("<I", rng.choice(_NUMBERS))
    if kind < 0.65:
        return ValueType.STRING, builders.string(rng.choice(_TEXTS))
    if kind < 0.75:
        return ValueType.FLOAT32, struct.pack(
            "<f", rng.choice((0.0, 1.0, -1.0, 1e30, float("nan")))
        )
    if kind < 0.85:
        return ValueType.BOOL, bytes((rng.randrange(2),))
    element = rng.choice((ValueType.UINT32, ValueType.INT32, ValueType.FLOAT32, ValueType.STRING))
    count = rng.choice((0, 1, 2, 4, 286))
    if element is ValueType.STRING:
        pair = builders.array("", element, [b"a b", b"", b"b"][:count])
    else:
        numbers = [rng.choice((0, 1, 2, 4, 5, 300)) for _ in range(count)]
        pair = builders.array("", element, numbers)
    return pair.type_id, pair.payload


def _change_value(model: RawGguf, rng: random.Random) -> RawGguf:
    pair = rng.choice(model.pairs)
    try:
        value_type = ValueType(pair.type_id)
    except ValueError:
        return model
    if value_type in (ValueType.UINT32, ValueType.INT32) and rng.random() < 0.8:
        return model.with_pair(replace(pair, payload=struct.pack("<I", rng.choice(_NUMBERS))))
    if value_type in SCALAR_CODES and rng.random() < 0.5:
        return model.with_pair(replace(pair, payload=rng.randbytes(SCALAR_CODES[value_type].size)))
    type_id, payload = _random_value(rng)
    return model.with_pair(Pair(pair.key, type_id, payload))


def _add_key(model: RawGguf, rng: random.Random) -> RawGguf:
    key = f"{_architecture(model)}.{rng.choice(_ARCH_KEYS)}"
    if rng.random() < 0.3:
        key = f"tokenizer.ggml.{rng.choice(_TOKENIZER_KEYS)}"
    return model.with_pair(Pair(key, *_random_value(rng)))


def _drop_key(model: RawGguf, rng: random.Random) -> RawGguf:
    return model.without(rng.choice(model.pairs).key)


def _change_architecture(model: RawGguf, rng: random.Random) -> RawGguf:
    old, new = _architecture(model), rng.choice(sorted(KNOWN_ARCHITECTURES))
    pairs = [
        replace(pair, key=new + pair.key[len(old) :]) if pair.key.startswith(f"{old}.") else pair
        for pair in model.pairs
    ]
    model = replace(model, pairs=pairs).with_pair(builders.text("general.architecture", new))
    for key in rng.sample(_ARCH_KEYS, rng.randint(0, len(_ARCH_KEYS))):
        value = rng.choice((0, 1, 2, 4, 8, 16, 32, 64))
        model = model.with_pair(builders.u32(f"{new}.{key}", value))
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        model = model.with_pair(builders.scalar(f"{new}.{key}", ValueType.FLOAT32, 1e-5))
    return model


def _architecture(model: RawGguf) -> str:
    for pair in model.pairs:
        if pair.key == "general.architecture":
            return pair.payload[8:].decode("utf-8", "replace")
    return "llama"


def _change_token(model: RawGguf, rng: random.Random) -> RawGguf:
    texts, types = builders.spm_tokens()
    for _ in range(rng.randint(1, 3)):
        texts[rng.randrange(len(texts))] = rng.choice(
            (b"", b"a", b"\0x", b"<0x0A>", b"zz", b"\xff")
        )
        types[rng.randrange(len(types))] = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1))
    if rng.random() < 0.3:
        del texts[rng.randrange(len(texts)) :]
    model = model.with_pair(builders.array("tokenizer.ggml.tokens", ValueType.STRING, texts))
    return model.with_pair(builders.array("tokenizer.ggml.token_type", ValueType.INT32, types))


def _change_tensor_type(model: RawGguf, rng: random.Random) -> RawGguf:
    index = rng.randrange(len(model.tensors))
    tensor = model.tensors[index]
    return _retyped(model, index, tensor.dims, rng.choice(list(GgmlType)))


def _change_tensor_shape(model: RawGguf, rng: random.Random) -> RawGguf:
    index = rng.randrange(len(model.tensors))
    dims = list(model.tensors[index].dims)
    change = rng.randrange(4)
    if change == 0:
        dims.reverse()
    elif change == 1:
        dims.append(rng.choice((1, 2)))
    elif change == 2:
        dims[rng.randrange(len(dims))] = rng.choice((1, 2, 32, 63, 256))
    else:
        dims.insert(0, 1)
    return _retyped(model, index, tuple(dims[:4]), GgmlType(model.tensors[index].type_id))


def _retyped(model: RawGguf, index: int, dims: tuple[int, ...], ggml_type: GgmlType) -> RawGguf:
    entry = FORMATS[ggml_type]
    n_elements = 1
    for length in dims:
        n_elements *= length
    data = bytes(n_elements // entry.block_length * entry.block_bytes)
    return model.with_tensor(index, dims=dims, type_id=ggml_type, data=data)


def _change_tensor_name(model: RawGguf, rng: random.Random) -> RawGguf:
    index = rng.randrange(len(model.tensors))
    other = rng.choice(model.tensors).name
    names = (
        other,
        "rope_freqs.weight",
        "blk.0.attn_q.bias",
        "blk.7.ffn_up.weight",
        "output_norm.bias",
    )
    return model.with_tensor(index, name=rng.choice(names))


def _drop_tensor(model: RawGguf, rng: random.Random) -> RawGguf:
    dropped = rng.randrange(len(model.tensors))
    return replace(model, tensors=[t for i, t in enumerate(model.tensors) if i != dropped])


def _add_tensor(model: RawGguf, rng: random.Random) -> RawGguf:
    names = ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_gate.bias", "token_types.weight")
    tensor = RawTensor(rng.choice(names), (rng.choice((1, 8, 64, 128)),), rng.choice((0, 1, 26)))
    return _retyped(
        replace(model, tensors=[*model.tensors, tensor]),
        len(model.tensors),
        tensor.dims,
        GgmlType(tensor.type_id),
    )


def _change_alignment(model: RawGguf, rng: random.Random) -> RawGguf:
    alignment = rng.choice((1, 2, 8, 16, 64, 256, 4096))
    return replace(model, alignment=alignment).with_pair(
        builders.u32("general.alignment", alignment)
    )


_CHANGES: tuple[Callable[[RawGguf, random.Random], RawGguf], ...] = (
    _change_value,
    _change_value,
    _add_key,
    _add_key,
    _drop_key,
    _change_architecture,
    _change_token,
    _change_tensor_type,
    _change_tensor_shape,
    _change_tensor_name,
    _drop_tensor,
    _add_tensor,
    _change_alignment,
)
