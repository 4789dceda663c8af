"""Child process of the fuzz tests: hands the files named on stdin to llama.cpp, one a line.

Loads, makes a context, tokenizes and decodes, as edgert would, and says how far it got. A process
of its own, because a file that slips through validation may abort it: what the tests look for.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp

PROMPT = "a tale \u00e9\u4e2d\x00\x07".encode() + b"\xff\xfe"


def try_model(path: str) -> str:
    """Return how far llama.cpp got with the file."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        return "refused"
    try:
        return _try_decode(model)
    finally:
        llama_cpp.llama_model_free(model)


def _try_decode(model: llama_cpp.llama_model_p) -> str:
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = 64
    context_params.n_batch = context_params.n_ubatch = 64
    context_params.n_threads = context_params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        return "no context"
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        tokens = (llama_cpp.llama_token * 64)()
        count = llama_cpp.llama_tokenize(vocab, PROMPT, len(PROMPT), tokens, 64, True, True)
        llama_cpp.llama_tokenize(vocab, b"", 0, tokens, 64, True, True)
        if count <= 0:
            return "no tokens"
        piece = ctypes.create_string_buffer(256)
        for token in tokens[:count]:
            llama_cpp.llama_token_to_piece(vocab, token, piece, 256, 0, True)
        batch = llama_cpp.llama_batch_get_one(tokens, count)
        return f"decoded {llama_cpp.llama_decode(context, batch)}"
    finally:
        llama_cpp.llama_free(context)


@llama_cpp.llama_log_callback
def _quiet(level: int, message: bytes, user_data: ctypes.c_void_p) -> None:
    """Swallow llama.cpp's log."""


def main() -> None:
    """Answer one line a file until stdin ends."""
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        sys.stdout.write(f"outcome: {try_model(line.rstrip(chr(10)))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
