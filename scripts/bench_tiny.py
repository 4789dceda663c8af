"""Measure bits per byte of GGUF files on a text, through llama.cpp on the processor.

Protocol, the same for every model so that tokenizers can be compared:

1. The text is split into documents at lines reading `<|endoftext|>`, a document into windows of at
   most `--window` bytes, cut before white space. Every model gets exactly the same windows, chosen
   in bytes without looking at any tokenizer.
2. A window starts from an empty context and the model's own begin token, if the model asks for
   one. No window reads another's text, so a model with fewer tokens to a byte gains nothing from a
   longer view back.
3. The result is the negative log2 probability of all tokens of the window after the begin token,
   divided by the window's bytes. A space which a tokenizer puts before the text adds its tokens,
   not a byte; the end of a document is not scored.

With `--control-tokens` the text is dialogues in the tiny models' own markup: control tokens are
context, only the bytes and tokens of the turns count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tiny.measure import DEFAULT_WINDOW_BYTES, Score, read_windows, score


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW_BYTES, help="bytes")
    parser.add_argument("--limit", type=int, help="stop after this many bytes of the text")
    parser.add_argument("--threads", type=int, help="threads of llama.cpp, default one a core")
    parser.add_argument("--control-tokens", action="store_true", help="the text is dialogues")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    return parser.parse_args()


def main() -> int:
    """Measure, print the table, and the JSON line if asked."""
    options = parse_arguments()
    windows = read_windows(options.text, options.window, options.limit)
    if not windows:
        print(f"{options.text}: no text in it", file=sys.stderr)
        return 2
    print(f"{options.text.name}: {len(windows)} windows of at most {options.window} bytes")
    print(f"{'model':32} {'file MB':>8} {'tokens':>9} {'nats/token':>10} {'bits/byte':>9}")
    rows = []
    for path in options.models:
        started_s = time.monotonic()
        try:
            result = score(
                path,
                windows,
                control_tokens=options.control_tokens,
                n_threads=options.threads,
            )
        except ValueError as error:
            print(error, file=sys.stderr)
            return 3
        print_row(result)
        rows.append(row(result) | {"seconds": round(time.monotonic() - started_s, 2)})
    if options.output == "json":
        print(json.dumps({"text": options.text.name, "window_bytes": options.window, "rows": rows}))
    return 0


def print_row(result: Score) -> None:
    """Print one line of the table."""
    print(
        f"{result.model:32} {result.file_bytes / 1e6:8.2f} {result.tokens:9d} "
        f"{result.nats_per_token:10.4f} {result.bits_per_byte:9.4f}"
    )


def row(result: Score) -> dict[str, str | int | float]:
    """Return the JSON form of a result."""
    return {
        "model": result.model,
        "file_bytes": result.file_bytes,
        "text_bytes": result.text_bytes,
        "tokens": result.tokens,
        "nats_per_token": round(result.nats_per_token, 5),
        "bits_per_byte": round(result.bits_per_byte, 5),
    }


if __name__ == "__main__":
    raise SystemExit(main())
