"""The commands that look at runs: `ditty status` and `ditty logs`."""

import io
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ditty.runs.goodput import describe, read_goodput, total
from ditty.runs.logs import Attempt, Event, LoggedStage, NoLog, read_logs
from ditty.runs.rundir import RunDir
from ditty.runs.status import Runs, RunStatus, find_run
from ditty.runs.timeleft import duration
from ditty.store.artifacts import Store

WATCH_SECONDS = 1.0
FOLLOW_SECONDS = 0.3

COLUMNS = ("run", "state", "step", "loss", "held-out", "checkpoints")
WATCHED_COLUMNS = ("tokens/s", "left")

console = Console(highlight=False)


def status(
    name: Annotated[str | None, typer.Argument(help="A run's name; none lists all.")] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Show it once a second, until the run ends, or Ctrl-C."),
    ] = False,
) -> None:
    """Say how far runs are."""
    store = Store()
    runs = Runs(store, name)
    if watch:
        with suppress(KeyboardInterrupt):  # the way to end it
            _watch(runs)
    else:
        lines = runs.read()
        console.print(_table(lines, COLUMNS) if lines else _none(store))
        _print_details(runs, lines)


def logs(
    name: Annotated[str, typer.Argument(help="A run's name.")],
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Go on as it grows, also with newer attempts, until the run ends, or Ctrl-C.",
        ),
    ] = False,
    stage: Annotated[
        LoggedStage | None, typer.Option(help="Of this stage; by default the one begun last.")
    ] = None,
) -> None:
    """Print the log of a run's newest attempt."""
    run = find_run(Store(), name)
    # What a terminal's encoding cannot show must not end the log.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with suppress(KeyboardInterrupt):  # the way to end it
            _print_events(read_logs(run, stage, _pause if follow else None), name, follow)
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has what it wanted. Python flushes once more as it exits: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_events(events: Iterable[Event], name: str, follow: bool) -> None:
    for event in events:
        if isinstance(event, NoLog):
            waiting = ": waiting for it, Ctrl-C ends" if follow else f"; see `ditty status {name}`"
            console.print(f"[dim]run {escape(name)} has no log yet{waiting}[/]", soft_wrap=True)
        elif isinstance(event, Attempt):
            title = f"{event.stage} {event.directory.name}: {event.log}"
            console.print(f"[dim]── {escape(title)}[/]", soft_wrap=True)
        else:
            sys.stdout.write(event.text + "\n")


def _pause() -> None:
    sys.stdout.flush()
    time.sleep(FOLLOW_SECONDS)


def _watch(runs: Runs) -> None:
    lines = runs.read()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            shown = _table(lines, COLUMNS + WATCHED_COLUMNS) if lines else _none(runs.store)
            live.update(shown, refresh=True)
            if runs.name and not lines[0].alive:
                break
            time.sleep(WATCH_SECONDS)
            lines = runs.read()
    _print_details(runs, lines)


def _table(lines: list[RunStatus], columns: tuple[str, ...]) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for line in lines:
        cells = (
            line.name,
            line.state,
            f"{line.step}/{line.total_steps}" if line.total_steps else str(line.step),
            _loss(line.loss),
            _loss(line.eval_loss),
            ", ".join(str(s) for s in line.checkpoints) or "-",
            "-" if line.tokens_per_second is None else f"{line.tokens_per_second:,.0f}",
            "-" if line.seconds_left is None else duration(line.seconds_left),
        )
        table.add_row(*cells[: len(columns)])
    return table


def _none(store: Store) -> str:
    return f"no runs in {store.home}; start one with `ditty demo`"


def _print_details(runs: Runs, lines: list[RunStatus]) -> None:
    """Of the one run that was asked for: where it is, and how it ended."""
    for line in lines if runs.name else []:
        console.print(f"directory  {line.directory}", soft_wrap=True)
        if parts := read_goodput(RunDir(line.directory)):
            console.print(f"goodput    {describe(total(parts))}", soft_wrap=True)
        if line.message:
            console.print(escape(line.message), soft_wrap=True)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
