"""The commands of the program as a typer application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import edgert
from edgert.cli import bench_options, host_options, options, plan_options
from edgert.cli.command import Command, attach
from edgert.errors import ConfigError

COMMANDS = (
    Command("chat", "Chat with a model; -p answers once.", "edgert.cli.chat", options.ChatOptions),
    Command("run", "Answer one prompt: -p, -f or stdin.", "edgert.cli.run", options.ChatOptions),
    Command(
        "bench", "Measure prefill and decode, shaped like llama-bench.",
        "edgert.cli.bench", bench_options.BenchOptions,
    ),
    Command(
        "plan", "Decide where every weight lives, and write that as a manifest.",
        "edgert.cli.plan", plan_options.PlanOptions,
    ),
    Command(
        "eval", "Perplexity and bits per byte of a text.", "edgert.cli.eval", options.EvalOptions
    ),
    Command(
        "show", "What a model is made of and what fits in memory.",
        "edgert.cli.show", options.ShowOptions,
    ),
    Command(
        "pack", "Write what each host of a manifest needs, or a model's packed weights.",
        "edgert.cli.pack", options.PackOptions,
    ),
    Command(
        "quantize", "Write experts in nested precision: one file, every width a prefix.",
        "edgert.cli.quantize", options.QuantizeOptions,
    ),
    Command(
        "experts", "Replay what routers chose: which experts to drop first, and what that misses.",
        "edgert.cli.experts", options.ExpertsOptions,
    ),
    Command(
        "keys", "Keys that sign manifests, this host's identity, and hosts it trusts.",
        "edgert.cli.keys", options.KeysOptions,
    ),
    Command(
        "worker", "Run parts of other hosts' models, until it is stopped.",
        "edgert.cli.worker", host_options.WorkerOptions,
    ),
    Command(
        "ps", "What workers run, and how fast.", "edgert.cli.ps", host_options.PsOptions
    ),
    Command(
        "sign", "Sign a manifest with a private key.", "edgert.cli.sign", options.SignOptions
    ),
    Command(
        "schema", "Print the JSON Schema of a file format.",
        "edgert.cli.schema", options.SchemaOptions,
    ),
    Command(
        "devices", "What this host has and how fast it is; --measure finds out.",
        "edgert.cli.devices", options.DevicesOptions,
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


def call(arguments: Sequence[str]) -> int:
    """Run what the arguments name and return its exit code; without any, show the help.

    Raises:
        ConfigError: the arguments are wrong.
        BrokenPipeError: who reads stdout has left.
    """
    try:
        code = make_app()(
            args=list(arguments) or ["--help"], prog_name="edgert", standalone_mode=False
        )
    except typer.TyperException as error:
        usage = getattr(getattr(error, "ctx", None), "command_path", "edgert")
        raise ConfigError(error.format_message(), hint=f"{usage} --help") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the parser leaves with 1 for that
            raise BrokenPipeError from error
        raise
    return code if isinstance(code, int) else 0
