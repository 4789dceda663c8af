"""The training documents: stories, dialogues and story requests, as token sequences.

Expects the texts as `DATA/text/tinystories`, `DATA/chat` and `DATA/qa/rasbt-instruction`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiny.persona import PERSONA, STORY_REQUESTS, SYSTEM_PROMPTS, TOPIC_REQUESTS, TOPICS
from tiny.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

Turn = tuple[str, str]
Dialogue = list[Turn]

SEPARATOR = "<|endoftext|>"
HELD_OUT_EVERY = 50
CHAT_REPEATS = 10
N_SELF_DIALOGUES = 12_000
# Shares of the trained tokens.
SHARES = {"stories": 0.32, "requests": 0.18, "extra": 0.20, "chat": 0.16, "self_dialogue": 0.14}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training texts by source, and the held-out dialogues."""

    sources: dict[str, list[str]]
    held_out_dialogues: list[str]


def render(turns: Dialogue, system: str | None = None) -> str:
    """Return a dialogue with its control tokens; the chat template in the GGUF does the same."""
    roles = {"user": USER, "assistant": ASSISTANT}
    head = f"{SYSTEM}{system}{END}" if system else ""
    return BEGIN + head + "".join(f"{roles[role]}{text}{END}" for role, text in turns)


def read_stories(path: Path) -> list[str]:
    """Return the documents of a TinyStories file."""
    documents = path.read_text(encoding="utf-8").split(SEPARATOR)
    return [text for text in (document.strip() for document in documents) if len(text) > 80]


def read_dialogues(path: Path) -> list[Dialogue]:
    """Return the dialogues of a JSON-lines file."""
    dialogues = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            turns = json.loads(line)["turns"]
            dialogues.append([(turn["role"], turn["text"].strip()) for turn in turns])
    return [turns for turns in dialogues if all(text for _, text in turns)]


def read_instructions(path: Path) -> list[Dialogue]:
    """Return instruction and answer pairs as dialogues."""
    dialogues: list[Dialogue] = []
    for item in json.loads(path.read_text(encoding="utf-8")):
        request = "\n".join(part for part in (item["instruction"], item["input"]) if part)
        dialogues.append([("user", request), ("assistant", item["output"])])
    return dialogues


def drop_seen(documents: list[str], held_out: list[str], n_words: int = 8) -> list[str]:
    """Drop documents which share a third of their word sequences with the held-out text."""

    def sequences(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[i : i + n_words]) for i in range(len(words) - n_words + 1)]

    seen = {sequence for text in held_out for sequence in sequences(text)}
    kept = []
    for text in documents:
        found = [sequence in seen for sequence in sequences(text)]
        if sum(found) * 3 < max(1, len(found)):
            kept.append(text)
    return kept


def restore_case(documents: list[str], model_texts: list[str]) -> list[str]:
    """Capitalize lower-cased text: sentence starts, "I", and words mostly capitalized elsewhere."""
    inner: Counter[str] = Counter()
    for text in model_texts:
        inner.update(re.findall(r"(?<=[a-z,] )[A-Za-z]+", text))
    capitalized = {
        word.lower()
        for word, count in inner.items()
        if word[0].isupper() and count > 2 * inner[word.lower()]
    }

    def one_word(match: re.Match[str]) -> str:
        word = match.group()
        return word.capitalize() if word in capitalized or word == "i" else word

    restored = []
    for document in documents:
        text = re.sub(r"(?<!')\b[a-z]+", one_word, document)
        text = re.sub(r"(^|[.!?][\"']?\s+\"?|\n\"?|[,:] \")([a-z])", _upper_last, text)
        restored.append(text[0].upper() + text[1:])
    return restored


def _upper_last(match: re.Match[str]) -> str:
    return match.group(1) + match.group(2).upper()


def story_request(story: str, chance: random.Random) -> Dialogue:
    """Return a dialogue which asks for `story`, by a topic the story names if it has one."""
    words = Counter(re.findall(r"[a-z]+", story.lower()))
    topics = [topic for topic in TOPICS if words[topic] + words[topic + "s"] >= 2]
    name = re.search(r"(?:named|called) ([A-Z][a-z]+)", story[:300])
    if topics and chance.random() < 0.7:
        topic = max(topics, key=lambda word: words[word] + words[word + "s"])
        thing = ("an " if topic[0] in "aeiou" else "a ") + topic
        request = chance.choice(TOPIC_REQUESTS).format(thing)
    elif name and chance.random() < 0.3:
        request = chance.choice(TOPIC_REQUESTS).format(name.group(1))
    else:
        request = chance.choice(STORY_REQUESTS)
    return [("user", request), ("assistant", story)]


def is_whole(story: str) -> bool:
    """Tell whether a story has its beginning and its end, and is short enough to ask for."""
    begins = story.startswith(("Once", "One ", "There ", "In a ", "It was "))
    return begins and story.endswith((".", "!", "?", '"')) and len(story) < 1500


def group_chats(pool: list[Dialogue], repeats: int, chance: random.Random) -> list[str]:
    """Return `pool` `repeats` times over, one to four short dialogues joined to one document."""
    documents = []
    for _ in range(repeats):
        chance.shuffle(pool)
        start = 0
        while start < len(pool):
            end = start + chance.choice((1, 1, 2, 3, 4))
            turns = [turn for dialogue in pool[start:end] for turn in dialogue]
            system = chance.choice(SYSTEM_PROMPTS) if chance.random() < 0.2 else None
            documents.append(render(turns, system))
            start = end
    return documents


def load_corpus(data: Path, seed: int) -> Corpus:
    """Read the texts under `data` and return the training documents by source."""
    chance = random.Random(seed)
    folder = data / "text" / "tinystories"
    held_out = read_stories(folder / "valid.txt")
    stories = drop_seen(read_stories(folder / "train.txt"), held_out)
    extra = drop_seen(read_stories(folder / "train_lowercase_extra.txt"), held_out)
    extra = restore_case(extra, stories)
    chats = read_dialogues(data / "chat" / "smalltalk.jsonl")
    chats += read_instructions(data / "qa" / "rasbt-instruction" / "instruction-data.json")
    spoken = read_dialogues(data / "chat" / "self_dialogue.jsonl")
    chance.shuffle(chats)
    chance.shuffle(spoken)
    held_chats, chats = chats[::HELD_OUT_EVERY], _without_held_out(chats)
    held_spoken, spoken = spoken[:100], spoken[100 : 100 + N_SELF_DIALOGUES]
    requests = [story_request(story, chance) for story in stories if is_whole(story)]
    short = [turns for turns in requests if len(turns[1][1]) < 700]
    pool = chats + PERSONA * 3 + short[:250]
    sources = {
        "stories": [BEGIN + story + END for story in stories],
        "requests": [render(turns) for turns in requests],
        # Pieces of stories, neighbours often of one story: they get no begin and no end.
        "extra": ["\n".join(extra[i : i + 4]) + "\n" for i in range(0, len(extra), 4)],
        "chat": group_chats(pool, CHAT_REPEATS, chance),
        "self_dialogue": [render(turns) for turns in spoken],
    }
    return Corpus(sources, [render(turns) for turns in held_chats + held_spoken])


def _without_held_out(chats: list[Dialogue]) -> list[Dialogue]:
    """Drop the held-out dialogues and every copy of them."""
    held_out = {str(turns) for turns in chats[::HELD_OUT_EVERY]}
    return [turns for turns in chats if str(turns) not in held_out]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.uint16]]:
    """Return the token ids of every text."""
    batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in batch]


class Packer:
    """Endless rows of training tokens, the sources mixed by their shares.

    Every row begins with a document; the tail of the last one is cut off and not used, since each
    pass over a source cuts elsewhere.
    """

    def __init__(self, documents: dict[str, list[NDArray[np.uint16]]], seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._documents = documents
        self._names = list(documents)
        means = [np.mean([len(ids) for ids in documents[name]]) for name in self._names]
        rates = np.array([SHARES[name] for name in self._names]) / np.array(means)
        self._rates = rates / rates.sum()
        self._orders: dict[str, list[int]] = {name: [] for name in self._names}
        self.tokens_by_source = dict.fromkeys(self._names, 0)

    def rows(self, n_rows: int, n_tokens: int) -> NDArray[np.int64]:
        """Return (n_rows, n_tokens) token ids."""
        return np.stack([self._row(n_tokens) for _ in range(n_rows)])

    def _row(self, n_tokens: int) -> NDArray[np.int64]:
        row = np.empty(n_tokens, dtype=np.int64)
        filled = 0
        while filled < n_tokens:
            name = self._names[int(self._random.choice(len(self._names), p=self._rates))]
            ids = self._next_document(name)[: n_tokens - filled]
            row[filled : filled + len(ids)] = ids
            filled += len(ids)
            self.tokens_by_source[name] += len(ids)
        return row

    def _next_document(self, name: str) -> NDArray[np.uint16]:
        order = self._orders[name]
        if not order:
            order.extend(self._random.permutation(len(self._documents[name])).tolist())
        return self._documents[name][order.pop()]
