"""A llama.cpp context: one KV cache and one computation at a time, cancellable."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError, Cancelled, CapacityError, ConfigError
from edgert.llama.lib import Handle
from edgert.llama.model import LlamaModel
from edgert.llama.options import CACHE_TYPE_IDS, DEFAULT_CONTEXT, LoadOptions
from quant.tensor_file import TensorFile

_ABORTED, _NO_ROOM = 2, 1
_NO_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of one sequence, in a batch with those of others.

    Attributes:
        sequence: Which.
        first_position: In the sequence; everything before it is cached.
        n_tokens: How many.
        n_rows: Of how many of the last ones the output is wanted.
    """

    sequence: int
    first_position: int
    n_tokens: int
    n_rows: int


class LlamaContext:
    """One sequence over a model, or several that share a KV cache.

    The abort callback is libc's `strlen` over a two-byte flag: llama.cpp asks it after every node,
    it costs nanoseconds, needs no GIL, and answers true as soon as the flag's first byte is set.

    Args:
        model: The model; must outlive the context.
        options: Context, batch, threads and KV types.
        eval_callback: A `ggml_backend_sched_eval_callback`, or None for no tap.

    Raises:
        CapacityError: llama.cpp could not allocate the KV cache or the compute buffers.
    """

    def __init__(
        self, model: LlamaModel, options: LoadOptions, eval_callback: Handle | None = None
    ) -> None:
        self.model = model
        self._api = model.library.api
        self._flag = ctypes.create_string_buffer(2)
        self._eval_callback = eval_callback
        self._embeddings = False
        self.handle = self._create(options)
        self._memory = self._api.llama_get_memory(self.handle)
        if not self._memory:
            self._api.llama_free(self.handle)
            raise ConfigError(
                f"{model.file.path} is an encoder or a diffusion model: it does not continue text",
                hint="use a model that generates, such as a llama or qwen one",
            )
        # llama.cpp rounds the context up; a table of learned positions ends where it ends.
        self.n_ctx: int = min(self._api.llama_n_ctx(self.handle), _position_rows(model.file))
        self.n_batch: int = self._api.llama_n_batch(self.handle)
        self.n_ubatch: int = self._api.llama_n_ubatch(self.handle)
        self.n_threads = max(options.threads())
        self.n_sequences = options.n_sequences
        self.n_logits_max = min(options.n_logits_max, self.n_batch)
        self._batch = self._api.llama_batch_init(self.n_batch, 0, 1)

    def close(self) -> None:
        """Free the context; calling again does nothing."""
        if self.handle is not None:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self.handle)
            self.handle = None

    def abort(self, stop: bool) -> None:
        """Set or clear the flag that makes the running computation stop after its node."""
        self._flag[0] = b"\x01" if stop else b"\x00"

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run tokens; see `Backend.decode`."""
        self._check(len(tokens), first_position, n_logits)
        batch, n_tokens = self._batch, len(tokens)
        batch.n_tokens = n_tokens
        for index, token in enumerate(tokens):
            if not 0 <= token < self.model.vocab.n_tokens:
                raise ConfigError(f"token {token} does not exist in the vocabulary")
            batch.token[index] = token
            batch.pos[index] = first_position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= n_tokens - n_logits
        self._raise_on(self._api.llama_decode(self.handle, batch), n_tokens)
        return self.last_logits(n_logits)

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one token of each of several sequences together.

        Args:
            tokens: One for each.
            positions: Of each in its own sequence.
            sequences: Which, all different, below the number that the context was made for.

        Returns:
            (n_tokens, n_vocab) logits, a view that the next decode overwrites.
        """
        n_tokens = len(tokens)
        if not n_tokens == len(positions) == len(sequences) == len(set(sequences)):
            raise ValueError(f"{n_tokens} tokens, {len(positions)} positions, {sequences}")
        if min(sequences) < 0 or max(sequences) >= self.n_sequences:
            raise ValueError(f"sequences {sequences}, wanted 0 to {self.n_sequences - 1}")
        self._check(n_tokens, max(max(positions) + 1 - n_tokens, 0), n_tokens)
        batch = self._batch
        batch.n_tokens = n_tokens
        for index, token in enumerate(tokens):
            if not 0 <= token < self.model.vocab.n_tokens:
                raise ConfigError(f"token {token} does not exist in the vocabulary")
            batch.token[index], batch.pos[index] = token, positions[index]
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequences[index]
            batch.logits[index] = True
        self._raise_on(self._api.llama_decode(self.handle, batch), n_tokens)
        return self.last_logits(n_tokens)

    def decode_hidden(
        self, hidden: NDArray[np.float32], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run hidden states in place of tokens (the tap's primitive *inject*).

        Args:
            hidden: (n_tokens, n_embd) states that enter the first layer.
            first_position: As in `decode`.
            n_logits: As in `decode`.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.model.n_embd:
            raise ValueError(f"hidden states {hidden.shape}, wanted (n, {self.model.n_embd})")
        return self.decode_pieces(hidden, [Piece(0, first_position, hidden.shape[0], n_logits)])

    def decode_pieces(
        self, hidden: NDArray[np.float32], pieces: Sequence[Piece]
    ) -> NDArray[np.float32]:
        """Run hidden states of several sequences together.

        Args:
            hidden: (n_tokens, n_embd), those of the pieces one after the other.
            pieces: Of which sequences they are, each sequence once.

        Returns:
            (n_logits, n_vocab) logits of all pieces, in their order.

        Raises:
            CapacityError: the positions do not fit; nothing has changed then.
        """
        n_tokens = sum(piece.n_tokens for piece in pieces)
        n_logits = sum(piece.n_rows for piece in pieces)
        if n_tokens != len(hidden) or len({p.sequence for p in pieces}) != len(pieces):
            raise ValueError(f"{len(hidden)} hidden states for {pieces}")
        for piece in pieces:
            if not 0 <= piece.sequence < self.n_sequences or piece.n_rows > piece.n_tokens:
                raise ValueError(f"{piece}, there are {self.n_sequences} sequences")
            self._check(piece.n_tokens, piece.first_position, piece.n_rows)
        self._check(n_tokens, 0, n_logits)
        batch = self._api.llama_batch_init(n_tokens, self.model.n_embd, 1)
        try:
            batch.n_tokens = n_tokens
            states = np.ascontiguousarray(hidden, np.float32)
            ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
            index = 0
            for piece in pieces:
                for offset in range(piece.n_tokens):
                    batch.pos[index] = piece.first_position + offset
                    batch.n_seq_id[index], batch.seq_id[index][0] = 1, piece.sequence
                    batch.logits[index] = offset >= piece.n_tokens - piece.n_rows
                    index += 1
            self._raise_on(self._api.llama_decode(self.handle, batch), n_tokens)
        finally:
            self._api.llama_batch_free(batch)
        return self.last_logits(n_logits)

    def last_logits(self, n_logits: int) -> NDArray[np.float32]:
        """Return the logits of the last decode, (n_logits, n_vocab), without copying."""
        n_vocab = self.model.vocab.n_tokens
        if n_logits == 0:
            return np.empty((0, n_vocab), np.float32)
        pointer = self._api.llama_get_logits(self.handle)
        if not pointer:
            raise BackendError("llama.cpp returned no logits")
        return np.ctypeslib.as_array(pointer, shape=(n_logits, n_vocab))

    def embed(
        self, tokens: Sequence[int], run: Callable[[Sequence[int], int], None]
    ) -> NDArray[np.float32]:
        """Return the mean of the last hidden states, (n_embd,); forgets every position.

        Args:
            tokens: The text.
            run: Decodes tokens at a position with logits for each of them.
        """
        self.clear()
        total = np.zeros(self.model.n_embd, np.float64)
        self._api.llama_set_embeddings(self.handle, True)
        step = self.n_logits_max
        try:
            for start in range(0, len(tokens), step):
                part = tokens[start : start + step]
                run(part, start)
                for index in range(len(part)):
                    pointer = self._api.llama_get_embeddings_ith(self.handle, index)
                    if not pointer:
                        raise BackendError("llama.cpp returned no embeddings")
                    total += np.ctypeslib.as_array(pointer, shape=(self.model.n_embd,))
        finally:
            self._api.llama_set_embeddings(self.handle, False)
            self.clear()
        return (total / max(len(tokens), 1)).astype(np.float32)

    def clear(self, *, wipe: bool = False) -> None:
        """Forget every position of every sequence; `wipe` overwrites what was kept of them."""
        self._api.llama_memory_clear(self._memory, wipe)

    def truncate(self, n_positions: int, sequence: int | None = None) -> None:
        """Forget positions of a sequence from `n_positions` on; None is every sequence."""
        if n_positions == 0 and (sequence is None or self.n_sequences == 1):
            self.clear()
            return
        chosen = range(self.n_sequences) if sequence is None else (sequence,)
        remove = self._api.llama_memory_seq_rm
        if not all(remove(self._memory, one, n_positions, -1) for one in chosen):
            raise BackendError(
                f"this model's memory cannot forget positions from {n_positions} on",
                hint="recurrent models cannot step back; start a new conversation",
            )

    def can_shift(self) -> bool:
        """Say whether positions can be renumbered."""
        return bool(self._api.llama_memory_can_shift(self._memory))

    def shift(self, keep: int, discard: int, sequence: int = 0) -> None:
        """Forget [keep, keep + discard) of a sequence and renumber its later positions."""
        if not self.can_shift():
            raise BackendError("this model's memory cannot shift positions")
        self._api.llama_memory_seq_rm(self._memory, sequence, keep, keep + discard)
        self._api.llama_memory_seq_add(self._memory, sequence, keep + discard, -1, -discard)

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Write the KV cache and its tokens to a file, a layer at a time.

        Raises:
            BackendError: llama.cpp could not write it all; the file is left as it is.
        """
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        written = self._api.llama_state_seq_save_file(
            self.handle, os.fsencode(path), 0, ids, len(tokens)
        )
        if not written:
            raise BackendError(f"cannot write the KV cache to {path}")

    def load_state_file(self, path: Path) -> list[int]:
        """Replace the KV cache by a file's; return the tokens it holds.

        Raises:
            BackendError: the file does not fit this model and context; nothing is cached then.
        """
        self.clear()
        ids = (ctypes.c_int32 * self.n_ctx)()
        count = ctypes.c_size_t()
        read = self._api.llama_state_seq_load_file(
            self.handle, os.fsencode(path), 0, ids, self.n_ctx, ctypes.byref(count)
        )
        if not read:
            self.clear()
            raise BackendError(f"the KV cache in {path} does not fit this model and context")
        return list(ids[: count.value])

    def _check(self, n_tokens: int, first_position: int, n_logits: int) -> None:
        if not 1 <= n_tokens <= self.n_batch:
            raise ValueError(f"{n_tokens} tokens, wanted 1 to {self.n_batch}")
        if not 0 <= n_logits <= min(n_tokens, self.n_logits_max):
            raise ValueError(f"{n_logits} logits of {n_tokens}, at most {self.n_logits_max}")
        if first_position < 0 or first_position + n_tokens > self.n_ctx:
            raise CapacityError(
                f"positions {first_position}..{first_position + n_tokens} are outside the context "
                f"of {self.n_ctx}",
                needed_bytes=None,
                hint="raise --ctx-size or shorten the conversation",
            )

    def _raise_on(self, code: int, n_tokens: int) -> None:
        if code == _ABORTED:
            raise Cancelled("cancelled")
        if code == _NO_ROOM:
            raise CapacityError(f"no room in the KV cache for {n_tokens} tokens")
        if code:
            reason = self.model.library.log.last_problem()
            raise BackendError(f"llama_decode failed with {code}: {reason}")

    def _create(self, options: LoadOptions) -> Handle:
        api = self._api
        params = api.llama_context_default_params()
        params.n_ctx = options.n_ctx or min(self.model.n_ctx_train, DEFAULT_CONTEXT)
        n_rows = _position_rows(self.model.file)
        if params.n_ctx > n_rows:
            raise ConfigError(
                f"--ctx-size {params.n_ctx} is more than the {n_rows} positions this model has",
                hint=f"use --ctx-size {n_rows}",
            )
        params.n_ctx = options.n_cells or params.n_ctx
        params.n_batch = min(options.n_batch, params.n_ctx)
        params.n_ubatch = min(options.n_ubatch or options.n_batch, params.n_batch)
        params.n_outputs_max = min(options.n_logits_max, params.n_batch)
        params.n_outputs_max_per_seq = 0
        params.n_seq_max, params.kv_unified = options.n_sequences, True
        params.n_threads, params.n_threads_batch = options.threads()
        params.type_k = CACHE_TYPE_IDS[options.type_k]
        params.type_v = CACHE_TYPE_IDS[options.type_v]
        params.no_perf = True
        params.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        # An accelerator would be given copies of weights before they have arrived.
        params.offload_kqv = params.op_offload = False
        if self._eval_callback is not None:
            params.cb_eval = self._eval_callback
        strlen = ctypes.cast(self.model.library.libc.strlen, ctypes.c_void_p).value
        params.abort_callback = type(params.abort_callback)(strlen)
        params.abort_callback_data = ctypes.addressof(self._flag)
        self.model.library.log.problems.clear()
        handle = api.llama_init_from_model(self.model.handle, params)
        if not handle:
            raise CapacityError(
                f"llama.cpp cannot create a context of {params.n_ctx} positions: "
                f"{self.model.library.log.last_problem()}",
                hint="lower --ctx-size, or use --cache-type-k q8_0 --cache-type-v q8_0",
            )
        return handle


def _position_rows(file: TensorFile) -> int:
    """Return how many positions a model with learned positions has; no limit for others."""
    table = next((e for e in file.tensors if e.name == "position_embd.weight"), None)
    return _NO_LIMIT if table is None else table.shape[1]
