"""The `edgert` program: the one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from edgert.cli.terminal import printable
from edgert.errors import Cancelled, CapacityError, EdgertError

_STDERR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code."""
    _fill_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding is no error
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    try:
        from edgert.cli import app  # here, so that Ctrl-C is heard while it is imported

        code = app.call(arguments)
        sys.stdout.flush()
    except Cancelled as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    except EdgertError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        return _fail("out of memory", "a smaller --ctx-size, or --memory", CapacityError.exit_code)
    except OSError as error:
        _forget_stdout()
        return _fail(str(error), None, 1)
    except Exception as error:  # noqa: BLE001 - the one place that may: reported, not hidden
        return _report_bug(error)
    return code


def _fill_closed_streams() -> None:
    """Put /dev/null where a standard stream is closed, or the next open file would be taken for it.

    A model or session with the number of stderr would receive what native code prints.
    """
    descriptor = 0
    while descriptor <= _STDERR:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (_STDERR, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _forget_stdout() -> None:
    """Send what is still buffered nowhere: the reader left, or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str | None, exit_code: int) -> int:
    text = f"error: {message}\nhint: {hint}" if hint else f"error: {message}"
    print(printable(text, sys.stderr), file=sys.stderr)
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
