"""Progress of loading and prefill on stderr: bars on a terminal, notices always."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.events import Event, LoadProgress, Notice, PrefillProgress, WorkProgress

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress, TaskID

    from edgert.cli.command import Context

_SHORTEST_PREFILL_TOKENS = 64


class ProgressListener:
    """Listener of engine events; the bar of a phase goes away when the phase is done."""

    def __init__(self, context: Context, *, quiet: bool = False) -> None:
        self._context = context
        self._shown = context.stderr.isatty() and not quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> ProgressListener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case LoadProgress(done, total):
                self._advance("load", done, total)
            case PrefillProgress(done, total):
                if total >= _SHORTEST_PREFILL_TOKENS:
                    self._advance("prefill", done, total)
            case WorkProgress(label, done, total):
                self._advance(label, done, total)
            case Notice(text):
                self.clear()
                self._context.say(f"note: {text}")

    def clear(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _advance(self, label: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if done >= total:
            self.clear()
            return
        if self._bar is None or self._label != label:
            self.clear()
            self._start(label)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def _start(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(file=self._context.stderr, no_color=not self._context.color())
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(),
            console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._label = label
        self._task = self._bar.add_task(label)
        self._bar.start()
