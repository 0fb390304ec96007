"""Progress on a terminal: a line a finished stage, a bar for one that runs; Prefect is quiet."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TaskID as BarID

from flows.events import Event, EventState

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key: section.key=value. May be given several times."),
]
"""`--set` of each command that reads a spec."""

QUIET_SECONDS = 10.0  # between progress lines where the output is no terminal


class StageLines:
    """Draws events; a callback for `flows.events.listen`, and a context manager."""

    def __init__(self, console: Console):
        self.console = console
        self.started: dict[str, float] = {}
        self.bars: dict[str, BarID] = {}
        self.last_line = 0.0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[message]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> "StageLines":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if event.state is EventState.STARTED:
            self._start(event)
        elif event.state is EventState.PROGRESS:
            self._advance(event)
        else:
            self._finish(event)

    def _start(self, event: Event) -> None:
        self.started[event.stage] = time.monotonic()
        if event.stage not in self.bars:
            title = escape(event.stage)
            bar = self.progress.add_task(title, total=None, steps="", message=event.message)
            self.bars[event.stage] = bar

    def _advance(self, event: Event) -> None:
        if event.stage not in self.bars:
            self._start(event)
        steps = f"{event.done}/{event.total}" if event.total else ""
        self.progress.update(
            self.bars[event.stage],
            completed=event.done,
            total=event.total or None,
            steps=steps,
            message=escape(event.message),
        )
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line >= QUIET_SECONDS:
            self.last_line = now
            self.console.print(f"  {escape(event.stage)} {steps} {escape(event.message)}")

    def _finish(self, event: Event) -> None:
        if event.stage in self.bars:
            self.progress.remove_task(self.bars.pop(event.stage))
        started = self.started.pop(event.stage, None)
        seconds = "" if started is None else f"{time.monotonic() - started:.1f} s"
        mark, word = {
            EventState.CACHED: ("[green]●[/]", "cached"),
            EventState.DONE: ("[green]✓[/]", seconds),
        }.get(event.state, ("[red]✗[/]", f"failed {seconds}"))
        title = escape(event.stage)
        line = f"{mark} {title:<44} [bold]{word:>8}[/]  {escape(event.message)}"
        self.console.print(line, soft_wrap=True)


@contextmanager
def quiet_console() -> Iterator[None]:
    """Keep Prefect's log lines off the terminal within the block; they still reach its API."""
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.getLogger(name) for name in ("", "prefect", "uvicorn", "fastapi")]
    consoles = {h for logger in loggers for h in logger.handlers} - {None}
    levels = {h: h.level for h in consoles if isinstance(h, PrefectConsoleHandler)}
    for handler in levels:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
