"""Measure GGUF files through llama.cpp: bits per byte, agreement of two models, replies.

Imports nothing of the training side, so that it runs where PyTorch is not installed.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

SEPARATOR = "<|endoftext|>"
BEGIN = "<|begin|>"
CONTROL = re.compile(r"<\|(?:begin|end|system|user|assistant)\|>")
DEFAULT_WINDOW_BYTES = 768
MIN_P = 0.05


@dataclass(frozen=True, slots=True)
class Score:
    """What one model makes of one text."""

    model: str
    file_bytes: int
    text_bytes: int
    tokens: int
    bits: float

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for a byte of the text."""
        return self.bits / self.text_bytes

    @property
    def nats_per_token(self) -> float:
        """Mean loss of a token, which depends on the tokenizer."""
        return self.bits * math.log(2) / self.tokens


class Scorer:
    """A GGUF opened with llama.cpp, giving logits of every position of a window."""

    def __init__(self, path: Path, n_threads: int | None = None) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # Repacked weights round differently from machine to machine; the plain kernels do not.
        parameters.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self.path = path
        self.n_context = llama_cpp.llama_model_n_ctx_train(self._model)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = self.n_context
        context.n_threads = context.n_threads_batch = n_threads or os.cpu_count() or 1
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise ValueError(f"{path}: llama.cpp cannot make a context for it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokenize(self, text: str, *, add_bos: bool, control_tokens: bool) -> list[int]:
        """Return llama.cpp's tokens of `text`."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        n_tokens = llama_cpp.llama_tokenize(
            self.vocab, raw, len(raw), ids, room, add_bos, control_tokens
        )
        if n_tokens < 0:
            raise ValueError(f"{self.path}: llama.cpp does not tokenize a text of {len(raw)} bytes")
        return list(ids[:n_tokens])

    def window_tokens(self, window: str, *, control_tokens: bool) -> list[int]:
        """Return the tokens of a window after the model's begin token."""
        begins = control_tokens and window.startswith(BEGIN)
        return self.tokenize(window, add_bos=not begins, control_tokens=control_tokens)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, (len(ids), n_vocab), from an empty context."""
        if len(ids) > self.n_context:
            raise ValueError(
                f"{self.path}: a window has {len(ids)} tokens, the model's context is "
                f"{self.n_context}; lower --window"
            )
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._decode(ids, 0)

    def next_logits(self, token: int, position: int) -> NDArray[np.float32]:
        """Return the logits after `token`, (n_vocab,), which follows what was decoded before."""
        return self._decode([token], position)[0]

    def _decode(self, ids: Sequence[int], first: int) -> NDArray[np.float32]:
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise ValueError(f"{self.path}: llama_decode returned {status}")
        start = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(start, shape=(len(ids), self.n_vocab)).copy()

    def render(self, request: str) -> str:
        """Return one user request in the model's chat template, begin token included."""
        template = llama_cpp.llama_model_chat_template(self._model, None)
        if not template:
            raise ValueError(f"{self.path}: no chat template in it")
        bos = llama_cpp.llama_vocab_bos(self.vocab)
        return str(
            ImmutableSandboxedEnvironment()
            .from_string(template.decode())
            .render(
                messages=[{"role": "user", "content": request}],
                bos_token=llama_cpp.llama_vocab_get_text(self.vocab, bos).decode(),
                add_generation_prompt=True,
            )
        )

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens left out."""
        pieces = []
        for token in ids:
            piece = ctypes.create_string_buffer(256)
            n_bytes = llama_cpp.llama_token_to_piece(self.vocab, token, piece, 256, 0, False)
            pieces.append(piece.raw[: max(0, n_bytes)])
        return b"".join(pieces).decode(errors="replace")

    def is_control(self, token: int) -> bool:
        """Tell whether `token` is a control token."""
        return bool(llama_cpp.llama_vocab_is_control(self.vocab, token))


@llama_cpp.llama_log_callback
def _SILENT(level: int, text: bytes, data: ctypes.c_void_p) -> None:  # noqa: N802
    """Drop llama.cpp's log."""


def read_windows(path: Path, window_bytes: int, limit_bytes: int | None = None) -> list[str]:
    """Return the windows of a text file; see `scripts/bench_tiny.py` for the protocol."""
    text = path.read_text(encoding="utf-8")
    windows: list[str] = []
    used = 0
    for document in text.split(SEPARATOR):
        for window in split_windows(document.strip(), window_bytes):
            used += len(window.encode())
            if limit_bytes is not None and used > limit_bytes:
                return windows
            windows.append(window)
    return windows


def split_windows(document: str, window_bytes: int) -> Iterator[str]:
    """Split a document before white space into pieces of at most `window_bytes` bytes."""
    piece = ""
    for word in re.findall(r"\s*\S+", document):
        if piece and len((piece + word).encode()) > window_bytes:
            yield piece
            piece = ""
        piece += word
    if piece:
        yield piece


def bits_of(scorer: Scorer, window: str, *, control_tokens: bool) -> tuple[float, int]:
    """Return the bits of a window and the number of tokens they belong to.

    Control tokens are context only: neither they nor the begin token are scored.
    """
    ids = scorer.window_tokens(window, control_tokens=control_tokens)
    logits = scorer.logits(ids).astype(np.float64)[:-1]
    top = logits.max(axis=1)
    targets = np.array(ids[1:])
    chosen = logits[np.arange(len(targets)), targets]
    losses = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - chosen
    scored = np.array([not scorer.is_control(token) for token in targets], dtype=bool)
    return float(losses[scored].sum() / math.log(2)), int(scored.sum())


def score(
    path: Path,
    windows: list[str],
    *,
    control_tokens: bool = False,
    n_threads: int | None = None,
) -> Score:
    """Measure a GGUF on `windows`.

    Args:
        path: the model.
        windows: texts, each scored from an empty context.
        control_tokens: whether the windows are dialogues with the control tokens of the tiny
            models; their bytes are not counted.
        n_threads: threads of llama.cpp, one a core without it.
    """
    bits, tokens, text_bytes = 0.0, 0, 0
    with Scorer(path, n_threads) as scorer:
        for window in windows:
            window_bits, window_tokens = bits_of(scorer, window, control_tokens=control_tokens)
            bits += window_bits
            tokens += window_tokens
            text = CONTROL.sub("", window) if control_tokens else window
            text_bytes += len(text.encode())
    return Score(path.name, path.stat().st_size, text_bytes, tokens, bits)


def agreement(
    path: Path,
    draft: Path,
    windows: list[str],
    *,
    control_tokens: bool = False,
    n_threads: int | None = None,
) -> float:
    """Return the share of positions where both models find the same token most likely."""
    same = total = 0
    with Scorer(path, n_threads) as large, Scorer(draft, n_threads) as small:
        for window in windows:
            ids = large.window_tokens(window, control_tokens=control_tokens)
            matches = large.logits(ids).argmax(axis=1) == small.logits(ids).argmax(axis=1)
            same += int(matches.sum())
            total += len(ids)
    return same / total


def reply(path: Path, request: str, temperature: float, n_threads: int | None = None) -> str:
    """Return the answer of a chat model to one request, through its chat template.

    Args:
        path: the model.
        request: what the user says.
        temperature: 0 for the most likely token, else sampled with min-p and a fixed seed.
        n_threads: threads of llama.cpp, one a core without it.
    """
    random = np.random.default_rng(1)
    with Scorer(path, n_threads) as model:
        ids = model.tokenize(model.render(request), add_bos=False, control_tokens=True)
        logits = model.logits(ids)[-1]
        answer: list[int] = []
        while len(ids) + len(answer) < model.n_context:
            token = pick(logits, temperature, random)
            if llama_cpp.llama_vocab_is_eog(model.vocab, token):
                break
            logits = model.next_logits(token, len(ids) + len(answer))
            answer.append(token)
        return model.text(answer).strip()


def pick(logits: NDArray[np.float32], temperature: float, random: np.random.Generator) -> int:
    """Return a token id; tokens below 5 % of the most likely one's probability are left out."""
    if temperature == 0:
        return int(logits.argmax())
    chances = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    chances[chances < MIN_P] = 0
    return int(random.choice(len(chances), p=chances / chances.sum()))


# What pre-tokenizers disagree on: white space, other scripts, emoji, digits, quotes, byte tokens.
TOKENIZER_PROBES = (
    "",
    " ",
    "\n",
    "a\n\nb\n \n  c\t\td   \n",
    "It's 2026, isn't it? I'LL we've  you're!!",
    "naïve café — “quoted” … «single» €100 ½ №5",
    "Привет, мир! 你好世界。 こんにちは שלום مرحبا नमस्ते ไทย",
    "😀👩‍👩‍👧‍👦 🇩🇪 ❤️ e\u0301 \u200b\ufeff \u00a0x\u3000y\r\nz\x00\x7f",
    "<|user|>Hi<|end|><|assistant|>\n  Hello<|end|> <|begin|> <|nothing|>",
    "x" * 300 + " " * 40 + "1234567890" * 5,
)


def check_tokenizer(path: Path, encode: Callable[[str], list[int]], texts: Sequence[str]) -> None:
    """Check that llama.cpp tokenizes every text as `encode` does.

    Raises:
        ValueError: with the first text on which they differ.
    """
    with Scorer(path) as scorer:
        for text in (*TOKENIZER_PROBES, *texts):
            wanted, saw = encode(text), scorer.tokenize(text, add_bos=False, control_tokens=True)
            if wanted != saw:
                at = next(
                    (i for i, (a, b) in enumerate(zip(wanted, saw, strict=False)) if a != b),
                    min(len(wanted), len(saw)),
                )
                raise ValueError(
                    f"{path}: token {at} of {text[:80]!r} differs: trained with "
                    f"{wanted[at : at + 4]}, llama.cpp gives {saw[at : at + 4]}"
                )
