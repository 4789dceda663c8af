"""Which models can be taken apart, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping

from edgert.errors import ConfigError
from quant.architectures import RECURRENT_ARCHITECTURES
from quant.formats import format_of
from quant.model_spec import ModelSpec
from quant.parts.cuts import are_alike, columns, stem, why_not_cut
from quant.parts.spec import OUTPUT_BIAS, HeadRows, Names, PartSpec, Share
from quant.tensor_file import TensorFile

# Graphs whose parts were seen to compute what the whole model does.
SHARES_VERIFIED = frozenset(
    {"ernie4_5", "exaone", "llama", "mistral3", "qwen2", "qwen3", "seed_oss"}
)
LAYERS_VERIFIED = SHARES_VERIFIED | {"phi3", "qwen3moe"}

# Tensors of no layer that every part with layers has.
_OF_ALL_LAYERS = frozenset({"rope_freqs.weight", "rope_factors_long.weight"}) | {
    "rope_factors_short.weight"
}
_OF_ENDS = frozenset({"token_embd.weight", "output.weight", "output_norm.weight", OUTPUT_BIAS})

_SCALED = "it scales what enters its first layer, which states from another part are already"
_WINDOWS = "which of its layers have a sliding window follows from their numbers"
_ROTATION = "which of its layers rotate by position follows from their numbers"
_STATE = "its layers keep a recurrent state"
_TIED_LAYERS = "some of its layers use what others computed"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("gemma", "gemma2", "minicpm", "granite", "granitemoe", "grok"), _SCALED),
    **dict.fromkeys(("gemma3", "gpt-oss", "cohere2", "exaone4", "llama4"), _WINDOWS),
    **dict.fromkeys(("olmo2", "phimoe", "plamo3", "smallthinker", "step35"), _WINDOWS),
    **dict.fromkeys(("gemma3n", "gemma4"), _TIED_LAYERS),
    "smollm3": _ROTATION,
    **dict.fromkeys(("falcon-h1", "granitehybrid", "jamba", "kimi-linear", "lfm2"), _STATE),
    **dict.fromkeys(("lfm2moe", "nemotron_h", "nemotron_h_moe", "plamo2", "qwen3next"), _STATE),
    **dict.fromkeys(RECURRENT_ARCHITECTURES, _STATE),
}  # fmt: skip
_HINT = "plan for one host, or copy the whole model to it"


def check_part(file: TensorFile, model: ModelSpec, spec: PartSpec) -> None:
    """Refuse a part that cannot be made, or would not compute what the whole model does.

    Raises:
        ConfigError: with the reason.
    """
    reason = _why_no_part(file, model, spec)
    if reason is None and spec.share is not None:
        reason = _why_no_share(file, model, spec.share)
    if reason is not None:
        raise ConfigError(
            f"{file.path}: no part of {spec.describe() or 'nothing'} can be made: {reason}",
            hint=_HINT,
        )


def why_not_apart(architecture: str, *, shares: bool) -> str | None:
    """Return why models of an architecture are not taken apart, None where they are.

    Args:
        architecture: As the file spells it.
        shares: Into shares of every layer; else into layers.
    """
    if architecture not in LAYERS_VERIFIED:
        reason = _REASONS.get(architecture, "nobody has verified that its parts compute alike")
        return f"{reason} (architecture {architecture})"
    if shares and architecture not in SHARES_VERIFIED:
        return f"shares of architecture {architecture} are not verified"
    return None


def _why_no_part(file: TensorFile, model: ModelSpec, spec: PartSpec) -> str | None:
    reason = why_not_apart(model.architecture, shares=False)
    if reason is not None:
        return reason
    if not 0 <= spec.first_layer <= spec.end_layer <= model.n_layer:
        return f"it has {model.n_layer} layers"
    if file.metadata.get(f"{model.architecture}.nextn_predict_layers"):
        return "its last layers predict ahead and belong to no part"
    for entry in file.tensors:
        if entry.layer_index is None and entry.name not in _OF_ALL_LAYERS | _OF_ENDS:
            return f"tensor {entry.name} belongs to no layer and no end"
    if "output_norm.weight" not in file.by_name or "token_embd.weight" not in file.by_name:
        return "it has no output_norm.weight or no token_embd.weight"
    return _why_no_ends(file, model, spec)


def _why_no_ends(file: TensorFile, model: ModelSpec, spec: PartSpec) -> str | None:
    head = spec.head
    if isinstance(head, HeadRows) and not 0 <= head.first < head.end <= model.n_vocab:
        return f"it has {model.n_vocab} tokens"
    if isinstance(head, HeadRows) and spec.embedding:
        return "embeddings have the rows of all tokens, as many as there are logits"
    if spec.n_layer == 0 and spec.embedding == (head != "none"):
        return "without layers it is the embeddings or the head, each in a file of its own"
    stands_in = Names(spec, False, model.architecture).part_architecture != model.architecture
    if head != "none" and stands_in and OUTPUT_BIAS in file.by_name:
        return f"{OUTPUT_BIAS} has no place in the graph of such a part"
    return None


def _why_no_share(file: TensorFile, model: ModelSpec, share: Share) -> str | None:
    heads = model.n_head_kv_per_layer
    n_groups, per_group = share.n_groups, model.n_head // max(1, share.n_groups)
    if model.n_expert:
        return "experts are not split: a mixture's layers go to one host each"
    reason = why_not_apart(model.architecture, shares=True)
    if reason is not None:
        return reason
    if not 0 <= share.first_group < share.end_group <= n_groups:
        return "groups begin before they end"
    if len(set(heads)) != 1 or _per_layer(file, model, "attention.head_count"):
        return "its layers are not alike: each would need a split of its own"
    if n_groups > heads[0] or heads[0] % n_groups or model.n_head % heads[0]:
        return f"{heads[0]} KV heads of {model.n_head} are no {n_groups} equal groups"
    downs = [e for e in file.tensors if stem(e.name) == "ffn_down" and len(e.shape) > 1]
    if not are_alike(((e.shape[0], format_of(e.ggml_type).block_length) for e in downs), n_groups):
        return "its FFNs would be cut at different columns: blocks of their types differ"
    for entry in file.tensors:
        if entry.layer_index is None:
            continue
        reason = why_not_cut(entry.name, entry.shape, model.key_length)
        if reason is not None:
            return reason
        block = format_of(entry.ggml_type).block_length
        if stem(entry.name) == "attn_output" and len(entry.shape) > 1:
            if entry.shape[0] != model.n_head * model.value_length:
                return f"{entry.name} has not the columns of {model.n_head} heads"
            if per_group * model.value_length % block:
                return f"blocks of {block} weights of {entry.name} reach over {n_groups} groups"
        if stem(entry.name) == "ffn_down" and len(entry.shape) > 1:
            first, end = columns(entry.shape[0], block, share)
            if first == end:
                return f"{entry.name} is too narrow for {n_groups} groups"
    return None


def _per_layer(file: TensorFile, model: ModelSpec, key: str) -> bool:
    value = file.metadata.get(f"{model.architecture}.{key}")
    return value is not None and not isinstance(value, int)
