"""The metadata of a part: the model's, with what a part has made explicit, and our own keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quant.header_writer import Pair, number_array, pair, string_array
from quant.metadata import ArrayField, ValueType
from quant.model_spec import ModelSpec
from quant.parts.cuts import head_rows
from quant.parts.plan import EXIT_LENGTH, N_ZERO_ROWS, ffn_width
from quant.parts.spec import HeadRows, Names, PartSpec
from quant.tensor_file import TensorFile

KEY = "edgert.part."
VERSION = 1

_DROPPED = ("split.", KEY)
_NESTED = "edgert.nested."
_PER_LAYER = frozenset(
    {"attention.head_count", "attention.head_count_kv", "feed_forward_length", "expert_used_count"}
)
_OF_EXITS = ("context_length", "embedding_length", "attention.layer_norm_rms_epsilon")


def part_pairs(
    file: TensorFile, model: ModelSpec, names: Names, source_sha256: str
) -> tuple[Pair, ...]:
    """Return the metadata of a part.

    Args:
        file: The model.
        model: Its shape.
        names: What the part has.
        source_sha256: Identity of the model's files, see `source_identity`.
    """
    made = _made_pairs(file, model, names)
    own = {stored.key for stored in made}
    kept = [
        stored
        for stored in _kept_pairs(file, model, names)
        if stored.key not in own and not stored.key.startswith(_DROPPED)
    ]
    return (*kept, *made, *_own_pairs(model, names, source_sha256))


def _kept_pairs(file: TensorFile, model: ModelSpec, names: Names) -> Iterator[Pair]:
    """Yield the model's keys as far as they are a part's; lists by layer lose the other layers."""
    prefix, spec = f"{model.architecture}.", names.spec
    nested = _nested_tensors(file)
    has_nested = any(names.part_name(name) is not None for name in nested)
    for key, value in file.metadata.items():
        of_model = key.startswith(prefix)
        own_key = f"{names.part_architecture}.{key.removeprefix(prefix)}" if of_model else key
        if (
            (key.startswith("tokenizer.") and not spec.embedding)
            or (key.startswith(_NESTED) and not has_nested)
            or (spec.is_exit and of_model and key.removeprefix(prefix) not in _OF_EXITS)
        ):
            continue
        if isinstance(value, ArrayField):
            if of_model and key.removeprefix(prefix) in _PER_LAYER and not spec.is_entrance:
                yield _chosen(own_key, value, range(spec.first_layer, spec.end_layer))
                continue
            if key.startswith(_NESTED):
                yield _of_nested(key, value, nested, names)
                continue
        yield pair(own_key, file.value_types[key], value)


def _nested_tensors(file: TensorFile) -> list[str]:
    """Return the names of nested tensors, in the order of the lists that describe them."""
    value = file.metadata.get(f"{_NESTED}tensors")
    return [str(name) for name in value.read()] if isinstance(value, ArrayField) else []


def _of_nested(key: str, value: ArrayField, nested: list[str], names: Names) -> Pair:
    """Return a list about nested tensors without those that the part has not."""
    kept = [place for place, name in enumerate(nested) if names.part_name(name) is not None]
    if key == f"{_NESTED}tensors":
        return string_array(key, [names.part_name(nested[place]) or "" for place in kept])
    n_each = value.count // len(nested)
    return _chosen(key, value, [n_each * place + i for place in kept for i in range(n_each)])


def _chosen(key: str, value: ArrayField, places: Sequence[int]) -> Pair:
    elements = value.read()
    if value.element_type is ValueType.STRING:
        return string_array(key, [str(elements[place]) for place in places])
    numbers = [number for number in elements if not isinstance(number, str)]
    return number_array(key, value.element_type, [numbers[place] for place in places])


def _made_pairs(file: TensorFile, model: ModelSpec, names: Names) -> list[Pair]:
    """Return what takes the place of the model's keys, or of what llama.cpp derives from them."""
    spec, architecture = names.spec, names.part_architecture
    numbers = _exit_numbers() if spec.is_exit else _layer_numbers(file, model, spec)
    made = [pair("general.architecture", ValueType.STRING, architecture)]
    if not spec.embedding:
        numbers["vocab_size"] = _n_rows(model, spec)
        made.append(pair("tokenizer.ggml.model", ValueType.STRING, "none"))
    made += [pair(f"{architecture}.{key}", ValueType.UINT32, n) for key, n in numbers.items()]
    return made


def _layer_numbers(file: TensorFile, model: ModelSpec, spec: PartSpec) -> dict[str, int]:
    if spec.is_entrance:
        return {}
    numbers = {
        "block_count": spec.n_layer,
        "attention.key_length": model.key_length,
        "attention.value_length": model.value_length,
    }
    if f"{model.architecture}.rope.dimension_count" not in file.metadata:
        numbers["rope.dimension_count"] = model.key_length
    if spec.share is not None:
        counts = {"head_count": model.n_head, "head_count_kv": model.n_head_kv_per_layer[0]}
        for key, count in counts.items():
            first, end = head_rows(count, spec.share)
            numbers[f"attention.{key}"] = end - first
        width = ffn_width(file, spec.first_layer, spec.share)
        if width is not None:
            numbers["feed_forward_length"] = width
    return numbers


def _exit_numbers() -> dict[str, int]:
    lengths = ("feed_forward_length", "attention.key_length", "attention.value_length")
    heads = ("block_count", "attention.head_count", "attention.head_count_kv")
    numbers = dict.fromkeys((*lengths, "rope.dimension_count"), EXIT_LENGTH)
    return numbers | dict.fromkeys(heads, 1)


def _n_rows(model: ModelSpec, spec: PartSpec) -> int:
    if isinstance(spec.head, HeadRows):
        return spec.head.end - spec.head.first
    return model.n_vocab if spec.head == "whole" else N_ZERO_ROWS


def _own_pairs(model: ModelSpec, names: Names, source_sha256: str) -> list[Pair]:
    spec, head = names.spec, names.spec.head
    numbers = {"version": VERSION, "n_layer": model.n_layer, "n_vocab": model.n_vocab}
    texts = {"source": source_sha256, "architecture": model.architecture}
    texts["head"] = "rows" if isinstance(head, HeadRows) else head
    lists = {"layers": [spec.first_layer, spec.end_layer]}
    if spec.share is not None:
        share = spec.share
        lists["share"] = [share.first_group, share.end_group, share.n_groups]
    if isinstance(head, HeadRows):
        lists["head_rows"] = [head.first, head.end]
    flags = {"embedding": spec.embedding, "tied": names.tied}
    return [
        *(pair(KEY + key, ValueType.UINT32, number) for key, number in numbers.items()),
        *(pair(KEY + key, ValueType.STRING, text) for key, text in texts.items()),
        *(number_array(KEY + key, ValueType.UINT32, values) for key, values in lists.items()),
        *(pair(KEY + key, ValueType.BOOL, flag) for key, flag in flags.items()),
    ]
