"""Train the models embedded in edgert and write them as GGUF with their cards.

The chat model comes first, the draft model (`--draft`) and the mixture of experts (`--moe`) after
it with the same `--run` folder, which holds the tokenizer and the checkpoints; a run that was
interrupted continues from there. At the end each is measured through llama.cpp, next to the
baseline if `--baseline` names one; the mixture next to the chat model.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer

from tiny.card import DIALOGUE_WINDOW_BYTES, Facts, write_card
from tiny.data import SEPARATOR, Corpus, Packer, encode, load_corpus
from tiny.export import write_gguf
from tiny.held_out import check_parity, expert_shares
from tiny.measure import DEFAULT_WINDOW_BYTES, check_tokenizer, read_windows
from tiny.model import CHAT, DRAFT, MOE, Shape, TinyLlama, n_parameters
from tiny.tokenizer import load_tokenizer, train_tokenizer
from tiny.train import Budget, Trainer, TrainingResult

logger = logging.getLogger("train_tiny")

DESCRIPTION = "A tiny model to try the machinery with, not an assistant."
HELD_OUT_DIALOGUES = "held-out-dialogues.txt"
F16, Q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
N_CHECKED_WINDOWS = 100


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train, and the type of its matrices."""

    name: str
    shape: Shape
    kind: gguf.GGMLQuantizationType


RECIPES = {
    "chat": Recipe("tiny-chat", CHAT, Q8_0),
    "draft": Recipe("tiny-draft", DRAFT, Q8_0),
    # The original of quantized ones.
    "moe": Recipe("tiny-moe", MOE, F16),
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/, chat/, qa/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the GGUF and its card")
    parser.add_argument("--run", type=Path, required=True, help="tokenizer and checkpoints")
    which = parser.add_mutually_exclusive_group()
    for kind, help_text in (("draft", "the small draft model"), ("moe", "the model of experts")):
        which.add_argument(
            f"--{kind}",
            dest="kind",
            action="store_const",
            const=kind,
            default="chat",
            help=f"train {help_text}",
        )
    parser.add_argument("--minutes", type=float, default=31.0, help="training time")
    parser.add_argument("--steps", type=int, help="stop after as many steps")
    parser.add_argument("--seed", type=int, default=1, help="of the data's order")
    parser.add_argument("--baseline", type=Path, help="GGUF to compare bits per byte with")
    parser.add_argument("--limit", type=int, help="measure on as many bytes of the held-out text")
    parser.add_argument("--threads", type=int, help="of llama.cpp, while measuring")
    return parser.parse_args()


def main() -> int:
    """Train, export, check, measure."""
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(os.cpu_count() or 1)
    for folder in (options.run, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(options.data, options.seed)
    tokenizer = prepare_tokenizer(corpus, options.run / "tokenizer.json")
    dialogues = options.run / HELD_OUT_DIALOGUES
    dialogues.write_text(SEPARATOR.join(corpus.held_out_dialogues), encoding="utf-8")

    documents = {name: encode(tokenizer, texts) for name, texts in corpus.sources.items()}
    for name, ids in documents.items():
        logger.info("%s: %d documents, %d tokens", name, len(ids), sum(map(len, ids)))
    recipe = RECIPES[options.kind]
    packer = Packer(documents, options.seed)
    trainer = Trainer(recipe.shape, packer, options.run / f"{recipe.name}.pt")
    result = trainer.run(Budget(options.minutes * 60, options.steps))

    shipped = options.out / f"{recipe.name}.gguf"
    write_gguf(shipped, trainer.model, tokenizer, recipe.kind, DESCRIPTION)
    stories = options.data / "text" / "tinystories" / "valid.txt"
    texts = [*corpus.held_out_dialogues, stories.read_text(encoding="utf-8")[:100_000]]
    check_tokenizer(shipped, lambda text: tokenizer.encode(text).ids, texts)
    plain = options.run / f"{recipe.name}-f16.gguf"
    write_gguf(plain, trainer.model, tokenizer, F16, DESCRIPTION)
    corpus_tokens = {name: sum(map(len, ids)) for name, ids in documents.items()}
    facts = gather_facts(options, trainer.model, plain, result, corpus_tokens)
    chat = options.out / f"{RECIPES['chat'].name}.gguf"
    beside = chat if options.kind == "moe" else plain
    compared = [path for path in (beside, options.baseline) if path is not None]
    write_card(shipped, facts, compared, chat if options.kind == "draft" else None)
    return 0


def gather_facts(
    options: argparse.Namespace,
    model: TinyLlama,
    plain: Path,
    result: TrainingResult,
    corpus_tokens: dict[str, int],
) -> Facts:
    """Check the model against its GGUF and return what the card says."""
    stories = options.data / "text" / "tinystories" / "valid.txt"
    dialogues = options.run / HELD_OUT_DIALOGUES
    windows = read_windows(stories, DEFAULT_WINDOW_BYTES)[:N_CHECKED_WINDOWS]
    windows += read_windows(dialogues, DIALOGUE_WINDOW_BYTES)[:N_CHECKED_WINDOWS]
    return Facts(
        shape=model.shape,
        n_parameters=n_parameters(model),
        parity=check_parity(plain, model, windows),
        expert_shares=expert_shares(plain, model, windows) if model.shape.n_experts else None,
        result=result,
        corpus_tokens=corpus_tokens,
        command=command_line(options),
        stories=stories,
        dialogues=dialogues,
        limit_bytes=options.limit,
        n_threads=options.threads,
    )


def prepare_tokenizer(corpus: Corpus, path: Path) -> Tokenizer:
    """Load the run's tokenizer, or train it on the corpus."""
    if path.exists():
        return load_tokenizer(path)
    sources = corpus.sources
    texts = sources["stories"] + sources["extra"]
    return train_tokenizer(texts + sources["chat"][:3000] + sources["self_dialogue"][:1500], path)


def command_line(options: argparse.Namespace) -> str:
    """Return the command that made the model, without this machine's folders."""
    words = ["python", "scripts/train_tiny.py", "--data", "DATA", "--out", "edgert/models"]
    words += ["--run", "RUN", *([] if options.kind == "chat" else [f"--{options.kind}"])]
    words += ["--minutes", f"{options.minutes:g}"]
    if options.steps:
        words += ["--steps", str(options.steps)]
    words += ["--seed", str(options.seed)]
    if options.baseline:
        words += ["--baseline", options.baseline.name]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
