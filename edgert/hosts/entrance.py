"""Where text enters a model that several hosts run: its vocabulary and its token embeddings.

Rows of the table are read from the file when they are needed, as a token needs one of thousands.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgert.errors import ConfigError, FormatError
from edgert.llama.lib import LlamaLibrary
from edgert.llama.model import LlamaModel
from edgert.llama.vocab import Vocab
from quant.formats import GgmlType, row_bytes
from quant.tensor_file import TensorEntry, TensorFile

Floats = NDArray[np.float32]

_TABLE = "token_embd.weight"
_KEPT_ROWS = 4096


class Entrance:
    """Tokens of a text, and the hidden states they enter as.

    Args:
        library: The checked libraries.
        file: The whole model, or its entrance part.

    Raises:
        FormatError: the file has no table of embeddings, or one of a kind that has no rows.
        BackendError: llama.cpp refuses its vocabulary.
    """

    def __init__(self, library: LlamaLibrary, file: TensorFile) -> None:
        with ExitStack() as stack:
            self._model = LlamaModel(library, file, vocab_only=True)
            stack.callback(self._model.close)
            self._table = EmbeddingTable(file)
            stack.callback(self._table.close)
            self._resources = stack.pop_all()

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self._model.vocab

    @property
    def n_embd(self) -> int:
        """Width of a hidden state."""
        return self._table.n_embd

    def hidden(self, tokens: Sequence[int]) -> Floats:
        """Return the embeddings of tokens, (n_tokens, n_embd).

        Raises:
            ConfigError: a token does not exist.
            FormatError: the file changed or cannot be read any more.
        """
        return self._table.rows(tokens)

    def close(self) -> None:
        """Free the vocabulary and close the file; calling again does nothing."""
        self._resources.close()


class EmbeddingTable:
    """Rows of a model's token embeddings, read and decoded on demand; the last ones are kept.

    Args:
        file: Validated; has `token_embd.weight`.
    """

    def __init__(self, file: TensorFile) -> None:
        self._entry = _table_of(file)
        self.n_embd, self._n_rows = self._entry.shape[0], self._entry.shape[1]
        self._kind = gguf.GGMLQuantizationType(int(self._entry.ggml_type))
        self._row_bytes = row_bytes(GgmlType(self._entry.ggml_type), self.n_embd)
        self._shard = file.shards[self._entry.shard_index]
        self._stream = self._shard.path.open("rb", buffering=0)
        self._kept: OrderedDict[int, Floats] = OrderedDict()

    def rows(self, tokens: Sequence[int]) -> Floats:
        """Return rows, (n_tokens, n_embd); see `Entrance.hidden`."""
        self._shard.check_unchanged(self._stream.fileno())
        found = np.empty((len(tokens), self.n_embd), np.float32)
        for index, token in enumerate(tokens):
            found[index] = self._row(token)
        return found

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _row(self, token: int) -> Floats:
        if token in self._kept:
            self._kept.move_to_end(token)
            return self._kept[token]
        if not 0 <= token < self._n_rows:
            raise ConfigError(f"token {token} does not exist in the vocabulary")
        offset = self._entry.offset_bytes + token * self._row_bytes
        try:
            data = os.pread(self._stream.fileno(), self._row_bytes, offset)
        except OSError as error:
            raise FormatError(
                f"cannot read it: {error.strerror}", path=self._shard.path, tensor=_TABLE
            ) from error
        if len(data) != self._row_bytes:
            raise FormatError("the file ends inside it", path=self._shard.path, tensor=_TABLE)
        row: Floats = dequantize(np.frombuffer(data, np.uint8), self._kind).astype(np.float32)
        self._kept[token] = row
        if len(self._kept) > _KEPT_ROWS:
            self._kept.popitem(last=False)
        return row


def _table_of(file: TensorFile) -> TensorEntry:
    entry = file.by_name.get(_TABLE)
    path = file.shards[0].path
    if entry is None or len(entry.shape) != 2:
        raise FormatError("there is no table of embeddings to enter by", path=path, tensor=_TABLE)
    if not isinstance(entry.ggml_type, GgmlType):
        raise FormatError("its type has no rows", path=path, tensor=_TABLE)
    return entry
