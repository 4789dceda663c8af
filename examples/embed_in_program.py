"""Use edgert inside a program: a conversation, a stream, JSON by schema, a saved session.

Run it with a GGUF file, or without for the small model inside edgert:
    python examples/embed_in_program.py [MODEL.gguf]
"""
# ruff: noqa: T201  an example shows its results

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import edgert

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}},
    "required": ["colour"],
}


def main(model: str | None = None) -> None:
    """Talk to a model in the ways a program needs."""
    threads = 1 if model is None else None  # the small model is fastest on one
    with edgert.load(model, draft="ngram", seed=1, threads=threads) as engine:
        # one answer
        messages = [{"role": "user", "content": "Hello! How are you?"}]
        reply = engine.chat(messages, max_tokens=60)
        print(f"{engine.model_name}: {reply.text}")
        print(f"  {reply.stats.decode_tokens_per_s:.0f} tokens/s, ended by {reply.finish_reason}")

        # the next one as a stream; the first turn is not computed again
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": "Tell me a story."},
        ]
        text = ""
        with engine.chat(messages, stream=True, max_tokens=80) as stream:
            for chunk in stream:
                text += chunk.text
                print(chunk.text, end="", flush=True)
        print(f"\n  {stream.stats().n_prefilled_tokens} new tokens in the prompt")

        # an answer that is always valid JSON
        sampling = edgert.SamplingParams(temperature=0.0, json_schema=COLOUR)
        answer = json.loads(engine.complete("My favourite colour:", sampling=sampling).text)
        print("colour:", answer["colour"])

        # saved with its KV cache, and resumed
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "talk.session"
            engine.save_session(path, [*messages, {"role": "assistant", "content": text}])
            print(len(engine.load_session(path)), "messages resumed")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else None)
    except edgert.EdgertError as error:
        sys.exit(f"{error}\n{error.hint or ''}")
