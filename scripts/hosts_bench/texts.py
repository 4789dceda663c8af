"""Greedy tokens of the trained model, over several hosts and on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hosts_bench.bench import ROOMY, Bench
from hosts_bench.fleet import fleet
from hosts_bench.plans import Wanted, groups_of
from hosts_bench.programs import Job, say

EMBEDDED = Path(__file__).resolve().parents[2] / "edgert" / "models" / "tiny-chat.gguf"
NEAR_TIE = 0.25  # of a logit
_TEXT_TOKENS = 60
_LEAST_TOKENS = 200
TEXTS = tuple(
    f"<|user|>{text}<|end|><|assistant|>"
    for text in (
        "Hello! How are you?", "What is your name?", "What do you like to do?", "Can you sing?",
        "Tell me about the weather.", "Do you have a friend?", "Why is the sky blue?",
        "How old are you?", "Where do you live?", "What is your favorite food?", "Thank you!",
        "Good night!",
        "Do you like music?", "I am sad today.", "What did you do today?", "Tell me a joke.",
        "Are you a robot?", "I have a dog.", "Do you like to read?", "What is your job?",
        "I am hungry.", "Do you like cats?", "It is raining.", "Let us play a game.",
        "Tell me a story about a dog.", "Tell me a story about the sea.", "Who are you?",
        "Tell me a story about a boy and a ball.", "Tell me a story about a cat.", "Goodbye!",
    )
)  # fmt: skip


def same_tokens(bench: Bench, shares: Sequence[int]) -> Job:
    """Compare greedy tokens of the trained model with those of one host.

    A text counts up to where one host has two candidates so close that the order of additions
    decides between them: activations are rounded to 8 bits, which makes differences of the last
    bit as large as 0.1 of a logit. How many whole texts are alike is reported beside it.
    """
    manifest = bench.manifest(Wanted(EMBEDDED, tuple(shares), ROOMY))
    with fleet(bench.work, len(shares)) as hosts:
        sides = (hosts.alone(EMBEDDED), hosts.split(EMBEDDED, manifest))
        one, two = (side.ask(do="greedy", texts=TEXTS, n=_TEXT_TOKENS) for side in sides)
    n_counted = n_alike = 0
    for mine, theirs, margins in zip(one["made"], two["made"], one["margins"], strict=True):
        n_clear = next((i for i, gap in enumerate(margins) if gap < NEAR_TIE), len(mine))
        pairs = list(zip(mine[:n_clear], theirs, strict=False))
        n_counted += n_clear
        n_alike += sum(a == b for a, b in pairs)
    whole = [a == b for a, b in zip(one["made"], two["made"], strict=True)]
    row: Job = {
        "shares": groups_of(manifest),
        "identical": n_alike == n_counted >= _LEAST_TOKENS,
        "n_tokens": n_counted,
        "n_alike": n_alike,
        "whole_texts_alike": f"{sum(whole)} of {len(whole)}",
        "whole_texts_tokens": sum(map(len, one["made"])),
    }
    say(f"tokens of {row['shares']}: {n_alike} of {n_counted} alike, {row['whole_texts_alike']}")
    return row
