"""Measure a finished model and write its card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiny.data import SHARES
from tiny.measure import DEFAULT_WINDOW_BYTES, agreement, read_windows, reply, score

if TYPE_CHECKING:
    from pathlib import Path

    from tiny.measure import Score
    from tiny.model import Shape
    from tiny.train import TrainingResult

# Nearly every held-out dialogue is scored whole.
DIALOGUE_WINDOW_BYTES = 1536
AGREEMENT_WINDOWS = 200
SAMPLE_TEMPERATURE = 0.7
REQUESTS = (
    "Hello",
    "How are you?",
    "What is your name?",
    "What is the capital of France?",
    "Do you like music?",
    "Thank you",
    "Tell me a short story about a dog",
    "Tell me a story.",
)
LICENCES = """\
| data | share of tokens | origin and licence, as its sources state them |
|---|---|---|
| TinyStories, whole stories | {stories:.0%} | R. Eldan and Y. Li, roneneldan/TinyStories, \
CDLA-Sharing-1.0 (per its dataset card) |
| the same stories as answers to "Tell me a story about ..." | {requests:.0%} | the requests are \
synthetic, the stories as above |
| TinyStories pieces, lower case, capitals restored by rule | {extra:.0%} | as above |
| short chats: small talk, instructions, short story requests, the model's own name | {chat:.0%} | \
chatterbot-corpus (BSD-3-Clause), BotBuilder-PersonalityChat (MIT), TinyTalks (CC BY 4.0), \
instruction data of rasbt/LLMs-from-scratch (Apache-2.0), hand-written lines of this repository |
| self-dialogues | {self_dialogue:.0%} | jfainberg/self_dialogue_corpus (BSD-3-Clause) |
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says beside the measurements.

    `parity` is by which share llama.cpp's loss differs from PyTorch's, and `expert_shares` are
    those of each layer's choices, (layers, experts).
    """

    shape: Shape
    n_parameters: int
    parity: float
    expert_shares: list[list[float]] | None
    result: TrainingResult
    corpus_tokens: dict[str, int]
    command: str
    stories: Path
    dialogues: Path
    limit_bytes: int | None
    n_threads: int | None


def write_card(model: Path, facts: Facts, compared: list[Path], chat: Path | None) -> None:
    """Measure `model` and write its card beside it.

    Args:
        model: the GGUF to describe.
        facts: shape and training figures.
        compared: further GGUF files for the stories table, any tokenizer.
        chat: the chat model a draft model serves, None for the chat model itself.
    """
    parts = [_head(model, facts, chat), _data(facts), _training(facts)]
    parts.append(_quality(model, facts, compared, chat))
    if facts.expert_shares is not None:
        parts.append(_experts(facts.expert_shares))
    parts.append(_samples(model, facts.n_threads))
    parts.append(_limits(facts))
    model.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _head(model: Path, facts: Facts, chat: Path | None) -> str:
    shape = facts.shape
    n_active = facts.n_parameters - shape.n_idle_parameters
    active = f", of which {n_active:,} compute a token" if shape.n_experts else ""
    matrices = "f16, norms and routers" if shape.n_experts else "q8_0, norms"
    use = f"It drafts tokens for `{chat.name}`, whose tokenizer it shares. " if chat else ""
    return f"""\
# {model.stem}

A tiny model to try the machinery with, not an assistant. {use}Made from scratch by
`scripts/train_tiny.py`.

| | |
|---|---|
| architecture | {_architecture(shape)} |
| parameters | {facts.n_parameters:,}{active} |
| file | {model.stat().st_size:,} bytes: matrices {matrices} f32 |
| context | {shape.n_context} tokens, trained at that length |
| tokenizer | byte-level BPE of {shape.n_vocab:,}, pre-tokenizer gpt-2, the same ids in llama.cpp |
| chat | `<\\|begin\\|><\\|user\\|>Hello<\\|end\\|><\\|assistant\\|>`, begin token once, ends with \
`<\\|end\\|>`; the template in the file says the same and writes the begin token itself |
"""


def _architecture(shape: Shape) -> str:
    name, fed = "llama", f"feed-forward {shape.n_ff}"
    if shape.n_experts:
        name = "qwen3moe"
        fed = f"{shape.n_experts} experts of {shape.n_ff}, {shape.n_experts_used} for a token"
    return (
        f"{name}, {shape.n_layers} layers, {shape.n_embd} wide, {shape.n_heads} heads, "
        f"{shape.n_kv_heads} key-value heads, {fed}, tied embeddings"
    )


def _data(facts: Facts) -> str:
    seen = facts.result.tokens_by_source
    total = sum(seen.values())
    shares = {name: seen[name] / total for name in SHARES}
    passes = ", ".join(f"{n} {seen[n] / facts.corpus_tokens[n]:.1f}" for n in SHARES)
    return f"""\
## Data

{LICENCES.format(**shares)}
Stories sharing a third of their 8-word sequences with the held-out stories were dropped. Passes
over each source: {passes} (the chats are {facts.corpus_tokens["chat"]:,} tokens with each short \
dialogue ten times).
"""


def _training(facts: Facts) -> str:
    result = facts.result
    balanced = ", a balancing loss on the routers" if facts.shape.n_experts else ""
    return f"""\
## Training

{result.steps:,} steps of 4,096 tokens, {result.tokens / 1e6:.1f} M tokens in \
{result.seconds / 60:.1f} minutes on {os.cpu_count()} processor cores \
({result.tokens / result.seconds:,.0f} tokens/s), Muon and AdamW, bfloat16 autocast{balanced}; \
last training loss {result.loss:.3f} nats per token
(running mean, all sources{", with dropout" if facts.shape.dropout else ""}). The schedule follows \
the clock, so another machine makes a somewhat different model:

```
{facts.command}
```
"""


def _quality(model: Path, facts: Facts, compared: list[Path], chat: Path | None) -> str:
    stories = read_windows(facts.stories, DEFAULT_WINDOW_BYTES, facts.limit_bytes)
    dialogues = read_windows(facts.dialogues, DIALOGUE_WINDOW_BYTES)
    n_threads = facts.n_threads
    results = [score(path, stories, n_threads=n_threads) for path in (model, *compared)]
    spoken = score(model, dialogues, control_tokens=True, n_threads=n_threads)
    beside = _dialogues_beside(facts, compared, dialogues)
    text = f"""\
## Bits per byte

Measured by `scripts/bench_tiny.py`'s protocol through llama.cpp, all models in one run on the same
{len(stories):,} windows of held-out TinyStories ({results[0].text_bytes:,} bytes, windows of at
most {DEFAULT_WINDOW_BYTES} bytes, each from an empty context).

| model | file bytes | nats per token | bits per byte |
|---|---|---|---|
{"".join(_row(result) for result in results)}
Held-out dialogues ({spoken.text_bytes:,} bytes of small talk, instructions and self-dialogues, \
control tokens not counted): {spoken.bits_per_byte:.3f} bits per byte{beside}.

PyTorch's loss, with the matrices in f32, differs from llama.cpp's with f16 by {facts.parity:.2%} \
on the first windows of both.
"""
    if chat is None:
        return text
    on_stories = agreement(chat, model, stories[:AGREEMENT_WINDOWS], n_threads=n_threads)
    on_dialogues = agreement(chat, model, dialogues, control_tokens=True, n_threads=n_threads)
    return f"""{text}
The most likely token is that of `{chat.name}` at {on_stories:.1%} of the positions of held-out
stories and {on_dialogues:.1%} of the held-out dialogues.
"""


def _dialogues_beside(facts: Facts, compared: list[Path], dialogues: list[str]) -> str:
    """Return what the dense chat model makes of the dialogues, where experts are beside it."""
    if not facts.shape.n_experts:
        return ""
    dense = score(compared[0], dialogues, control_tokens=True, n_threads=facts.n_threads)
    return f", `{dense.model}` {dense.bits_per_byte:.3f}"


def _experts(shares: list[list[float]]) -> str:
    rows = "".join(
        f"| {layer} | {max(used):.1%} | {min(used):.1%} |\n" for layer, used in enumerate(shares)
    )
    return f"""\
## Use of the experts

Share of the layer's choices on held-out stories and dialogues; {1 / len(shares[0]):.1%} each would
be even.

| layer | most used expert | least used expert |
|---|---|---|
{rows}"""


def _row(result: Score) -> str:
    return (
        f"| {result.model} | {result.file_bytes:,} | {result.nats_per_token:.4f} "
        f"| {result.bits_per_byte:.4f} |\n"
    )


def _samples(model: Path, n_threads: int | None) -> str:
    lines = ["## Replies\n", "First answers, not picked: greedy, the stories also sampled.\n"]
    asked = [(request, 0.0) for request in REQUESTS]
    asked += [(request, SAMPLE_TEMPERATURE) for request in REQUESTS[-2:]]
    for request, temperature in asked:
        answer = reply(model, request, temperature, n_threads).replace("\n", "\n> ")
        how = f" (temperature {temperature})" if temperature else ""
        lines.append(f"**{request}**{how}\n\n> {answer}\n")
    return "\n".join(lines)


def _limits(facts: Facts) -> str:
    return f"""\
## Limits

English only. It knows next to nothing: facts, sums and instructions come out wrong or invented. It
answers small talk and writes children's stories whose thread often breaks and which are often not
about what was asked for. It was never trained past {facts.shape.n_context} tokens. It has had no
safety training of any kind.
"""
