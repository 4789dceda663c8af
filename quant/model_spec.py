"""What a model's metadata says about it, checked against its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from edgert.errors import FormatError
from quant.architecture_check import check_architecture
from quant.architectures import (
    EXPERTS_USED_BY_LAYER,
    KNOWN_ARCHITECTURES,
    RECURRENT_ARCHITECTURES,
    UNTOLD_EXPERTS,
)
from quant.formats import GgmlType, format_of, row_bytes, type_named
from quant.keys import Keys
from quant.tensor_file import TensorEntry, TensorFile
from quant.tokenizer_check import check_tokenizer

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp aborts beyond
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_LARGEST_LENGTH = 1 << 24  # no width comes near; keeps llama.cpp's 32-bit products from wrapping
# Formats of activations and indices; ggml has no kernels for such weights and would crash.
_NOT_WEIGHTS = frozenset(
    {GgmlType.Q8_1, GgmlType.Q8_K, GgmlType.F64}
    | {GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64}
)
# The gate of a shared expert is one row, stored without its second dimension.
_ONE_ROW_MATRIX = "ffn_gate_inp_shexp.weight"
# A model converted before experts were stacked has one tensor for each of them.
_SINGLE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
# Tables of ids, looked up and never multiplied: vocabulary maps of draft models, hashed routing.
_TABLES = ("d2t.weight", "d2t", "t2d.weight", "t2d", "tid2eid.weight")
_KV_CELLS_STEP = 256  # llama-context.cpp pads n_ctx to this


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and identity of a model.

    `n_head_kv` is a tuple, one number a layer, where the file states an array (0 for layers without
    attention).
    `n_layer` counts every layer of the file, prediction layers (`nextn_predict_layers`) included.
    """

    architecture: str
    name: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int | tuple[int, ...]
    key_length: int
    value_length: int
    n_ctx_train: int
    n_vocab: int
    n_expert: int
    n_expert_used: int
    tokenizer_model: str
    chat_template: str | None
    tied_embeddings: bool
    weight_bytes: int
    file_type: int | None

    @property
    def n_head_kv_per_layer(self) -> tuple[int, ...]:
        """KV heads of each layer."""
        if isinstance(self.n_head_kv, tuple):
            return self.n_head_kv
        return (self.n_head_kv,) * self.n_layer

    @property
    def choices_are_told(self) -> bool:
        """Whether who watches the graph can tell which experts a token chooses."""
        return self.architecture not in UNTOLD_EXPERTS


def read_model_spec(tensor_file: TensorFile) -> ModelSpec:
    """Read the shape of a model and refuse what llama.cpp would abort on or misread.

    Raises:
        FormatError: unknown architecture, missing tokenizer, missing or absurd keys, or keys that
            contradict tensors.
    """
    architecture = _architecture(tensor_file)
    keys = Keys(tensor_file, architecture)
    n_layer = keys.number("block_count", at_least=1, at_most=MAX_LAYERS)
    n_embd = keys.number("embedding_length", at_least=1, at_most=_LARGEST_LENGTH)
    head_counts, n_head_kv = _heads(keys, n_layer, architecture)
    n_expert, n_expert_used = _experts(keys, n_layer)
    tokenizer_model, n_vocab = check_tokenizer(keys)
    key_length, value_length = _head_lengths(keys, n_embd, head_counts[0])
    check_architecture(keys, key_length, value_length, n_expert)
    spec = ModelSpec(
        architecture=architecture,
        name=keys.text("general.name", default=tensor_file.path.stem),
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=max(head_counts),
        n_head_kv=n_head_kv,
        key_length=key_length,
        value_length=value_length,
        n_ctx_train=keys.number("context_length", at_least=1),
        n_vocab=n_vocab,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        tokenizer_model=tokenizer_model,
        chat_template=keys.optional_text("tokenizer.chat_template"),
        tied_embeddings="output.weight" not in tensor_file.by_name,
        weight_bytes=tensor_file.weight_bytes,
        file_type=keys.optional_number("general.file_type"),
    )
    _check_tensors(tensor_file, spec, keys)
    return spec


def kv_bytes(spec: ModelSpec, n_ctx: int, type_k: str, type_v: str) -> int:
    """Estimate the bytes of llama.cpp's KV cache for `n_ctx` positions.

    An upper estimate for attention layers: savings of sliding windows are ignored, and so is the
    state of recurrent layers, which does not grow with the context.

    Args:
        spec: The model.
        n_ctx: Positions; llama.cpp rounds them up to a multiple of 256.
        type_k: ggml type name of the keys, such as `f16` or `q8_0`.
        type_v: The same for the values.

    Raises:
        ValueError: unknown type, or rows that are not a multiple of its block.

    Source: `llama_kv_cache::llama_kv_cache`, src/llama-kv-cache.cpp.
    """
    n_cells = -(-n_ctx // _KV_CELLS_STEP) * _KV_CELLS_STEP
    per_cell = 0
    for n_head_kv in spec.n_head_kv_per_layer:
        per_cell += row_bytes(type_named(type_k), spec.key_length * n_head_kv)
        per_cell += row_bytes(type_named(type_v), spec.value_length * n_head_kv)
    return n_cells * per_cell


def _architecture(tensor_file: TensorFile) -> str:
    value = tensor_file.metadata.get("general.architecture")
    if isinstance(value, str) and value in KNOWN_ARCHITECTURES:
        return value
    if value is None:
        message, hint = "general.architecture is missing", "this GGUF file holds no language model"
    elif value == "clip":
        message = "architecture clip, wanted a language model"
        hint = "this is the vision part (mmproj) of a model; open the text model instead"
    else:
        shown = repr(value[:80]) if isinstance(value, str) else "no string"
        message = f"unknown architecture: general.architecture is {shown}"
        hint = "the model may need a newer llama.cpp; see the README for the tested version"
    raise FormatError(message, path=tensor_file.path, hint=hint)


def _heads(
    keys: Keys, n_layer: int, architecture: str
) -> tuple[tuple[int, ...], int | tuple[int, ...]]:
    recurrent = architecture in RECURRENT_ARCHITECTURES
    heads = keys.per_layer("attention.head_count", n_layer, default=0 if recurrent else None)
    heads_kv = keys.per_layer("attention.head_count_kv", n_layer, default=heads)
    head_list = heads if isinstance(heads, tuple) else (heads,) * n_layer
    kv_list = heads_kv if isinstance(heads_kv, tuple) else (heads_kv,) * n_layer
    if not recurrent and max(head_list) == 0:
        keys.fail("attention.head_count", "is 0, wanted at least 1")
    for layer, (n_head, n_head_kv) in enumerate(zip(head_list, kv_list, strict=True)):
        if n_head_kv > n_head or (n_head_kv and n_head % n_head_kv):
            keys.fail(
                "attention.head_count_kv",
                f"is {n_head_kv} in layer {layer}, wanted a divisor of its {n_head} heads",
            )
    return head_list, heads_kv


def _head_lengths(keys: Keys, n_embd: int, n_head: int) -> tuple[int, int]:
    """Return the widths of keys and values; llama.cpp derives them from the first layer's heads."""
    if not n_head:
        return 0, 0
    lengths = [
        keys.number(key, default=n_embd // n_head, at_least=1, at_most=_LARGEST_LENGTH)
        for key in ("attention.key_length", "attention.value_length")
    ]
    for key, length in zip(("key", "value"), lengths, strict=True):
        if length == 0:
            keys.fail(f"attention.{key}_length", f"is 0: {n_head} heads share {n_embd} columns")
    return lengths[0], lengths[1]


def _experts(keys: Keys, n_layer: int) -> tuple[int, int]:
    """Check the rules that `llama_model_base::load_hparams` asserts."""
    n_expert = keys.number("expert_count", default=0, at_most=MAX_EXPERTS)
    used = keys.per_layer("expert_used_count", n_layer, default=0)
    by_layer = used if isinstance(used, tuple) else (used,)
    n_used = max(by_layer)
    if n_used > n_expert or (n_expert and not n_used):
        keys.fail("expert_used_count", f"is {n_used}, wanted 1 to expert_count = {n_expert}")
    if min(by_layer) < n_used and keys.architecture not in EXPERTS_USED_BY_LAYER:
        keys.fail(
            "expert_used_count",
            f"is {min(by_layer)} to {n_used}, wanted one number for all layers",
            hint=f"llama.cpp's {keys.architecture} graph uses as many experts in every layer",
        )
    n_groups = keys.number("expert_group_count", default=0)
    n_groups_used = keys.number("expert_group_used_count", default=0)
    if n_groups and n_groups >= n_expert:
        keys.fail("expert_group_count", f"is {n_groups}, wanted fewer than {n_expert} experts")
    if n_groups > 1 and (n_expert % n_groups or not 0 < n_groups_used < n_groups):
        keys.fail(
            "expert_group_used_count",
            f"is {n_groups_used} of {n_groups} groups of {n_expert} experts, wanted fewer than all",
        )
    return n_expert, n_used


def _check_tensors(tensor_file: TensorFile, spec: ModelSpec, keys: Keys) -> None:
    if not tensor_file.tensors:
        raise FormatError(
            "the file holds no tensors",
            path=tensor_file.path,
            hint="this is a vocabulary only; open the model itself",
        )
    embedding = tensor_file.by_name.get("token_embd.weight")
    if embedding is not None and embedding.shape != (spec.n_embd, spec.n_vocab):
        raise FormatError(
            f"shape {embedding.shape}, wanted ({spec.n_embd}, {spec.n_vocab}) from "
            "embedding_length and the vocabulary",
            path=tensor_file.shards[embedding.shard_index].path,
            offset=embedding.offset_bytes,
            tensor=embedding.name,
            hint="metadata and tensors belong to different models",
        )
    for tensor in tensor_file.tensors:
        _check_type(tensor_file, tensor)
        if _SINGLE_EXPERT.fullmatch(tensor.name):
            raise FormatError(
                "a tensor of one expert, wanted the experts of a layer stacked in one",
                path=tensor_file.shards[tensor.shard_index].path,
                tensor=tensor.name,
                hint="the file is older than llama.cpp supports: convert the model again",
            )
    _check_layers(tensor_file, spec, keys)


def _check_type(tensor_file: TensorFile, tensor: TensorEntry) -> None:
    if tensor.name.endswith(_TABLES):
        return
    # ggml adds and multiplies activations by 32-bit floats only, and aborts on anything else.
    added = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", ".bias"))
    added = added and not tensor.name.endswith(_ONE_ROW_MATRIX)
    if tensor.ggml_type in _NOT_WEIGHTS or (added and tensor.ggml_type is not GgmlType.F32):
        saw = format_of(tensor.ggml_type).name
        raise FormatError(
            f"type {saw}, wanted {'f32' if added else 'a weight type'}",
            path=tensor_file.shards[tensor.shard_index].path,
            offset=tensor.offset_bytes,
            tensor=tensor.name,
        )


def _check_layers(tensor_file: TensorFile, spec: ModelSpec, keys: Keys) -> None:
    seen = {tensor.layer_index for tensor in tensor_file.tensors} - {None}
    if not seen:  # encoder-decoder models name their layers otherwise
        return
    n_predict = keys.number("nextn_predict_layers", default=0)
    if n_predict >= spec.n_layer:
        keys.fail("nextn_predict_layers", f"is {n_predict}, wanted fewer than {spec.n_layer}")
    beyond = [t for t in tensor_file.tensors if (t.layer_index or 0) >= spec.n_layer]
    if beyond:
        raise FormatError(
            f"layer {beyond[0].layer_index}, block_count says {spec.n_layer} layers",
            path=tensor_file.path,
            tensor=beyond[0].name,
        )
    missing = set(range(spec.n_layer - n_predict)) - seen
    if missing and spec.architecture != "deci":  # deci has layers without any weights
        _fail_missing(keys, spec.n_layer, min(missing))


def _fail_missing(keys: Keys, n_layer: int, layer: int) -> NoReturn:
    keys.fail("block_count", f"is {n_layer}, but layer {layer} has no tensors")
