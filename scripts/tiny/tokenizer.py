"""Byte-level BPE tokenizer of the tiny models: training, loading, the control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterable

BEGIN, END, SYSTEM, USER, ASSISTANT = (
    "<|begin|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CONTROL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)
VOCAB_SIZE = 2048


def train_tokenizer(texts: Iterable[str], path: Path) -> Tokenizer:
    """Train the tokenizer on `texts`, write it to `path` as JSON and return it.

    The pre-tokenizer is GPT-2's, which llama.cpp knows as `gpt-2`; the control tokens take the
    first ids in the order of `CONTROL_TOKENS`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    tokenizer.save(str(path))
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer which `train_tokenizer` wrote."""
    return Tokenizer.from_file(str(path))
