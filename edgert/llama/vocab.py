"""A model's vocabulary: text to token ids and back, through llama.cpp's tokenizers."""

from __future__ import annotations

import ctypes

from edgert.errors import BackendError, ConfigError
from edgert.llama.lib import Handle, LlamaLibrary

_LARGEST_TEXT_BYTES = 64 << 20


class Vocab:
    """The vocabulary of a loaded model; valid as long as that model is.

    Args:
        library: The checked libraries.
        handle: A `llama_vocab` pointer.
    """

    def __init__(self, library: LlamaLibrary, handle: Handle) -> None:
        api = library.api
        self.handle = handle
        self._library = library
        self.n_tokens: int = api.llama_vocab_n_tokens(handle)
        self.bos = self._optional(api.llama_vocab_bos(handle))
        self.eos = self._optional(api.llama_vocab_eos(handle))
        self.eot = self._optional(api.llama_vocab_eot(handle))
        self.add_bos: bool = bool(api.llama_vocab_get_add_bos(handle))
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Split text into token ids.

        Args:
            text: Any text without surrogates.
            add_special: Add BOS and the like as the model wants them.
            parse_special: Read control tokens such as `<|end|>` in the text as such.

        Raises:
            ConfigError: the text is not valid Unicode or larger than 64 MiB.
            BackendError: the tokenizer failed.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"text is not valid Unicode at character {error.start}",
                hint="pass UTF-8 text",
            ) from error
        if len(data) > _LARGEST_TEXT_BYTES:
            raise ConfigError(f"text has {len(data):,} bytes, at most {_LARGEST_TEXT_BYTES:,}")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        api = self._library.api
        count = api.llama_tokenize(
            self.handle, data, len(data), ids, room, add_special, parse_special
        )
        if count < -room:
            room = -count
            ids = (ctypes.c_int32 * room)()
            count = api.llama_tokenize(
                self.handle, data, len(data), ids, room, add_special, parse_special
            )
        if count < 0:
            raise BackendError(f"llama_tokenize failed on {len(data):,} bytes ({count})")
        return list(ids[:count])

    def piece(self, token_id: int, special: bool = False) -> bytes:
        """Return the bytes of a token; control tokens are empty unless `special`.

        Raises:
            ConfigError: no such token.
        """
        key = (token_id, special)
        known = self._pieces.get(key)
        if known is None:
            known = self._pieces[key] = self._piece(token_id, special)
        return known

    def is_eog(self, token_id: int) -> bool:
        """Say whether a token ends a generation."""
        return bool(self._library.api.llama_vocab_is_eog(self.handle, token_id))

    def _piece(self, token_id: int, special: bool) -> bytes:
        if not 0 <= token_id < self.n_tokens:
            raise ConfigError(f"token {token_id} does not exist, wanted 0 to {self.n_tokens - 1}")
        api = self._library.api
        buffer = ctypes.create_string_buffer(64)
        size = api.llama_token_to_piece(self.handle, token_id, buffer, 64, 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = api.llama_token_to_piece(self.handle, token_id, buffer, -size, 0, special)
        return buffer.raw[:size]

    @staticmethod
    def _optional(token_id: int) -> int | None:
        return token_id if token_id >= 0 else None
