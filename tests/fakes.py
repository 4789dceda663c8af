"""Fakes of the backend: a byte vocabulary, and a model whose logits hash the last tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError, Cancelled, ConfigError
from edgert.llama.backend import Counters
from edgert.llama.vocab import Vocab

SPECIALS = (b"<s>", b"</s>", b"<|system|>", b"<|user|>", b"<|assistant|>", b"<|end|>")
WORDS = (b" the", b" a", b"ing", b"hello", b"\xc3\xa9t\xc3\xa9")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)


class FakeVocab(Vocab):
    """256 bytes, six control tokens, five words. No control token is read unless asked for."""

    def __init__(self, n_letters: int = 256) -> None:
        self.handle = None
        self.n_letters = n_letters
        self.words = WORDS if n_letters == 256 else ()
        self.n_tokens = n_letters + len(SPECIALS) + len(self.words)
        self.bos = n_letters
        self.eos = n_letters + 1
        self.eot = n_letters + 5
        self.add_bos = True

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        known = dict(enumerate(self.words, self.n_letters + len(SPECIALS)))
        if parse_special:
            known |= dict(enumerate(SPECIALS, self.n_letters))
        data, ids = text.encode(), [self.bos] if add_special and self.bos is not None else []
        at = 0
        while at < len(data):
            match = next((i for i, w in known.items() if data.startswith(w, at)), None)
            ids.append(data[at] % self.n_letters if match is None else match)
            at += 1 if match is None else len(known[match])
        return ids

    def piece(self, token_id: int, special: bool = False) -> bytes:
        if not 0 <= token_id < self.n_tokens:
            raise ConfigError(f"token {token_id} does not exist")
        if token_id < self.n_letters:
            return bytes([token_id])
        index = token_id - self.n_letters
        if index < len(SPECIALS):
            return SPECIALS[index] if special else b""
        return self.words[index - len(SPECIALS)]

    def is_eog(self, token_id: int) -> bool:
        return token_id in (self.eos, self.eot)


def hashed_logits(vocab: FakeVocab, window: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Logits that depend on the window alone; control tokens never win, except the end one."""
    digest = hashlib.blake2b(repr((seed, window)).encode(), digest_size=8).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    logits = random.normal(0.0, 2.0, vocab.n_tokens).astype(np.float32)
    logits[vocab.n_letters : vocab.n_letters + len(SPECIALS)] -= 20.0
    return logits


@dataclass
class FakeBackend:
    """A model over `order` tokens of context that refuses every call a real one could not take.

    Attributes:
        noise: Added to logits of passes over several tokens, as other kernels do.
        before_pass: Called before each pass with its number; may raise or cancel.
        can_forget: False for a recurrent model: only a whole truncation works.
    """

    vocab: FakeVocab = field(default_factory=FakeVocab)
    n_ctx: int = 256
    n_batch: int = 32
    n_logits_max: int = 17
    order: int = 2
    seed: int = 0
    noise: float = 0.0
    can_forget: bool = True
    shiftable: bool = True
    logits: Callable[[tuple[int, ...]], NDArray[np.float32]] | None = None
    before_pass: Callable[[int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    passes: list[list[int]] = field(default_factory=list)
    n_rows: int = 0
    now_s: float = 0.0
    broken: bool = False
    closed: bool = False
    cancelled: bool = False

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        self._check(tokens, first_position, n_logits)
        self.passes.append(list(tokens))
        self.now_s += 1.0 + 0.01 * len(tokens)  # as if reading weights took nearly all the time
        self.broken = True  # positions are undefined until the pass is through
        if self.before_pass is not None:
            self.before_pass(len(self.passes))
        if self.cancelled:
            self.cancelled = False
            raise Cancelled("stopped")
        self.broken = False
        self.tokens += tokens
        rows = [self._row(len(self.tokens) - n_logits + i + 1) for i in range(n_logits)]
        out = np.array(rows, np.float32).reshape(n_logits, self.vocab.n_tokens)
        if len(tokens) > 1 and self.noise:
            wave = np.sin(np.arange(out.size, dtype=np.float32) * 7 + len(self.passes))
            out += self.noise * wave.reshape(out.shape)
        return out

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> NDArray[np.float32]:
        if sequences != list(range(len(tokens))) or len(set(positions)) != 1:
            raise BackendError(f"texts {sequences} at {positions}, wanted all in step")
        if positions[0] * len(tokens) != len(self.tokens):
            raise BackendError(f"position {positions[0]} after {len(self.tokens)} tokens")
        return self.decode(tokens, len(self.tokens), len(tokens))

    def clock(self) -> float:
        """Seconds that passes have taken; no real time is involved."""
        return self.now_s

    def truncate(self, n_positions: int) -> None:
        if not 0 <= n_positions <= len(self.tokens):
            raise BackendError(f"truncate to {n_positions} of {len(self.tokens)}")
        if not self.can_forget and n_positions > 0 and (n_positions < len(self.tokens)):
            raise BackendError("this memory cannot forget a part")
        del self.tokens[n_positions:]
        self.broken = False

    def shift(self, keep: int, discard: int) -> None:
        if not self.shiftable or self.broken or keep + discard > len(self.tokens):
            raise BackendError("cannot shift")
        del self.tokens[keep : keep + discard]

    def expect(self, n_candidates: int | None) -> None:
        self.n_candidates = n_candidates

    def can_shift(self) -> bool:
        return self.shiftable

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.tokens = []
        return np.full(4, float(sum(tokens)), np.float32)

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        if self.broken or list(tokens) != self.tokens:
            raise BackendError("other tokens than cached, or undefined positions")
        ids = np.array([len(tokens), *tokens], "<i4")
        path.write_bytes(b"FAKE" + ids.tobytes())

    def load_state_file(self, path: Path) -> list[int]:
        data = path.read_bytes()
        if not data.startswith(b"FAKE"):
            self.tokens = []
            raise BackendError("state does not fit")
        count = int(np.frombuffer(data[4:8], "<i4")[0])
        self.tokens = np.frombuffer(data[8 : 8 + 4 * count], "<i4").tolist()
        self.broken = False
        return list(self.tokens)

    def cancel(self) -> None:
        self.cancelled = True

    def counters(self) -> Counters:
        n = len(self.passes)
        return Counters(n, sum(map(len, self.passes)), 0.0, 0.0, n, 1, 1, 1, None, False, "file")

    def applied(self) -> dict[str, str]:
        return {"weights": "fake"}

    def close(self) -> None:
        self.closed = True

    def _row(self, n_seen: int) -> NDArray[np.float32]:
        self.n_rows += 1
        window = tuple(self.tokens[max(0, n_seen - self.order) : n_seen])
        if self.logits is not None:
            return self.logits(window)
        return hashed_logits(self.vocab, window, self.seed)

    def _check(self, tokens: Sequence[int], first_position: int, n_logits: int) -> None:
        if self.closed or self.broken:
            raise BackendError("closed, or undefined positions were not truncated")
        if not 1 <= len(tokens) <= self.n_batch:
            raise BackendError(f"{len(tokens)} tokens in a batch of {self.n_batch}")
        if first_position != len(self.tokens):
            raise BackendError(f"position {first_position} after {len(self.tokens)}")
        if first_position + len(tokens) > self.n_ctx:
            raise BackendError(f"{first_position + len(tokens)} positions of {self.n_ctx}")
        if not 0 <= n_logits <= min(len(tokens), self.n_logits_max):
            raise BackendError(f"{n_logits} logits of {len(tokens)} tokens")
        if any(not 0 <= token < self.vocab.n_tokens for token in tokens):
            raise BackendError("no such token")
