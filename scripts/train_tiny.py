"""Train the models embedded in edgert and write them as GGUF with their cards.

The chat model comes first, the draft model (`--draft`) after it with the same `--run` folder, which
holds the tokenizer and the checkpoints; a run that was interrupted continues from there. At the end
both are measured through llama.cpp, next to the baseline if `--baseline` names one.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer

from tiny.card import Facts, write_card
from tiny.data import SEPARATOR, Corpus, Packer, encode, load_corpus
from tiny.export import write_gguf
from tiny.measure import check_tokenizer
from tiny.model import CHAT, DRAFT, n_parameters
from tiny.tokenizer import load_tokenizer, train_tokenizer
from tiny.train import Budget, Trainer

logger = logging.getLogger("train_tiny")

CHAT_NAME, DRAFT_NAME = "tiny-chat", "tiny-draft"
DESCRIPTION = "A tiny model to try the machinery with, not an assistant."
HELD_OUT_DIALOGUES = "held-out-dialogues.txt"


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/, chat/, qa/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the GGUF and its card")
    parser.add_argument("--run", type=Path, required=True, help="tokenizer and checkpoints")
    parser.add_argument("--draft", action="store_true", help="train the small draft model")
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
    name = DRAFT_NAME if options.draft else CHAT_NAME
    packer = Packer(documents, options.seed)
    trainer = Trainer(DRAFT if options.draft else CHAT, packer, options.run / f"{name}.pt")
    result = trainer.run(Budget(options.minutes * 60, options.steps))

    kinds = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    plain, shipped = options.run / f"{name}-f16.gguf", options.out / f"{name}.gguf"
    write_gguf(plain, trainer.model, tokenizer, kinds["f16"], DESCRIPTION)
    write_gguf(shipped, trainer.model, tokenizer, kinds["q8_0"], DESCRIPTION)
    stories = options.data / "text" / "tinystories" / "valid.txt"
    texts = [*corpus.held_out_dialogues, stories.read_text(encoding="utf-8")[:100_000]]
    check_tokenizer(shipped, lambda text: tokenizer.encode(text).ids, texts)
    facts = Facts(
        shape=trainer.model.shape,
        n_parameters=n_parameters(trainer.model),
        result=result,
        corpus_tokens={name: sum(map(len, ids)) for name, ids in documents.items()},
        command=command_line(options),
        stories=stories,
        dialogues=dialogues,
        limit_bytes=options.limit,
        n_threads=options.threads,
    )
    compared = [path for path in (plain, options.baseline) if path is not None]
    chat = options.out / f"{CHAT_NAME}.gguf" if options.draft else None
    write_card(shipped, facts, compared, chat)
    return 0


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
    words += ["--run", "RUN", *(["--draft"] if options.draft else [])]
    words += ["--minutes", f"{options.minutes:g}"]
    if options.steps:
        words += ["--steps", str(options.steps)]
    words += ["--seed", str(options.seed)]
    if options.baseline:
        words += ["--baseline", options.baseline.name]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
