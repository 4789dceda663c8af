"""The `edgert` program: its commands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import edgert
from edgert.cli import options
from edgert.cli.command import Command, attach
from edgert.errors import Cancelled, CapacityError, EdgertError

COMMANDS = (
    Command("chat", "Chat with a model; -p answers once.", "edgert.cli.chat", options.ChatOptions),
    Command("run", "Answer one prompt: -p, -f or stdin.", "edgert.cli.run", options.ChatOptions),
    Command(
        "bench", "Measure prefill and decode, shaped like llama-bench.",
        "edgert.cli.bench", options.BenchOptions,
    ),
    Command(
        "eval", "Perplexity and bits per byte of a text.", "edgert.cli.eval", options.EvalOptions
    ),
    Command(
        "show", "What a model is made of and what fits in memory.",
        "edgert.cli.show", options.ShowOptions,
    ),
    Command(
        "pack", "Write the packed copy of a model's weights.",
        "edgert.cli.pack", options.PackOptions,
    ),
    Command(
        "doctor", "Check this machine and installation.",
        "edgert.cli.doctor", options.ShowOptions,
    ),
)  # fmt: skip


def make_app() -> typer.Typer:
    """Build the typer application; imports no command module."""
    app = typer.Typer(
        name="edgert",
        help="Run language models that do not fit in memory.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    app.callback()(_top)
    for command in COMMANDS:
        attach(app, command, COMMANDS)
    return app


def _print_version(wanted: bool | None) -> None:
    if wanted:
        print(f"edgert {edgert.__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = None,
) -> None:
    del version


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    try:
        code = make_app()(args=list(arguments), prog_name="edgert", standalone_mode=False)
        sys.stdout.flush()
    except Cancelled as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except EdgertError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except typer.TyperException as error:
        usage = getattr(getattr(error, "ctx", None), "command_path", "edgert")
        return _fail(error.format_message(), f"{usage} --help", error.exit_code)
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError:
        return _fail("out of memory", "a smaller --ctx-size, or --memory", CapacityError.exit_code)
    except OSError as error:
        _forget_stdout()
        return _fail(str(error), None, 1)
    except Exception as error:  # noqa: BLE001 - the one place that may: reported, not hidden
        return _report_bug(error)
    return code if isinstance(code, int) else 0


def _forget_stdout() -> None:
    """Send what is still buffered nowhere: the reader left, or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str | None, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return exit_code


def _report_bug(error: Exception) -> int:
    if os.environ.get("EDGERT_DEBUG"):
        import traceback

        traceback.print_exc()
    return _fail(
        f"this is a bug in edgert: {type(error).__name__}: {error}",
        None if os.environ.get("EDGERT_DEBUG") else "EDGERT_DEBUG=1 shows where it happened",
        1,
    )


if __name__ == "__main__":
    main()
