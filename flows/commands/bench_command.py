"""`ditty bench`: how fast a spec trains on this machine, and TRL beside it."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from ditty.config.spec import RunSpec
from ditty.planning.benchmark import bench_spec, run_bench
from ditty.planning.shapes import SHAPES
from ditty.store.artifacts import Store
from flows.commands.console import Overrides

STEP = re.compile(r"step (\d+/\d+) loss")
NOTE = re.compile(r"(?:INFO|WARNING) ditty\.[\w.]+: (.*(?:compiled|held in memory).*)")

console = Console(highlight=False)


class Peer(StrEnum):
    """What to run beside ditty on the same work."""

    TRL = "trl"


def bench(
    shape: Annotated[
        str, typer.Argument(help=f"Random weights of this shape: {', '.join(SHAPES)}.")
    ],
    overrides: Overrides = None,
    compare: Annotated[
        Peer | None, typer.Option(help="Run this one too, on the same work, right after.")
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Rows hold documents of 64 to so many tokens. (by default one document a row)"
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="A file that gets a table of the GPU's kernels.")
    ] = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Save one halfway; say what it took.")
    ] = False,
) -> None:
    """Measure how fast a spec trains here: tokens/s, memory, share of what the card can do."""
    spec, home = bench_spec(overrides or []), Store().home
    options: dict[str, Any] = {"shape": shape, "longest": longest, "by": "ditty"}
    options["checkpoint"] = checkpoint
    if profile is not None:
        options["profile"] = str(profile.absolute())
    rows = {"ditty": _measured(spec, options, home)}
    if compare is not None:
        rows[compare.value] = _measured(spec, options | {"by": compare.value}, home)
    _print_table(rows)


def _measured(spec: RunSpec, options: dict[str, Any], home: Path) -> dict[str, Any]:
    with console.status(f"{options['by']}: starting") as status:
        return run_bench(spec, options, home, lambda line: _show(line, options["by"], status))


def _show(line: str, by: str, status: Status) -> None:
    if found := STEP.search(line):
        status.update(f"{by}: step {found[1]}")
    elif found := NOTE.search(line):
        console.print(f"{by}: {found[1]}", style="dim")


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    columns = ("", "tokens/s", "of the card", "peak GB", "first step", "loss")
    table = Table(*columns, box=None, pad_edge=False)
    for name, found in rows.items():
        share, first = found.get("share_of_ceiling"), found.get("first_step_seconds")
        table.add_row(
            name,
            f"{found['tokens_per_second']:,.0f}",
            "" if share is None else f"{share:.0%}",
            "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.1f}",
            "" if first is None else f"{first:.0f} s",
            "" if found["loss"] is None else f"{found['loss']:.3f}",
        )
    console.print(table)
    ours, *peers = (found["tokens_per_second"] for found in rows.values())
    for peer in peers:
        console.print(f"{ours / peer:.2f} times as fast")
    if "stalled_seconds" in rows["ditty"]:
        stalled, longer = rows["ditty"]["stalled_seconds"], rows["ditty"]["save_seconds"]
        console.print(f"a checkpoint: {stalled:.1f} s without a step, {longer:.1f} s in all")
    if "device" in rows["ditty"]:
        found = rows["ditty"]
        ceiling = f"{found['ceiling_tflops']:.0f} TFLOP/s in a bf16 product"
        console.print(f"on {found['device']}, {ceiling}", style="dim")
