"""`ditty compare`: two runs beside each other."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditty.errors import cut
from ditty.results.compare import Comparison, compare
from ditty.store.artifacts import Store

LONGEST = 60  # characters of a value of the spec

console = Console(highlight=False)


def compare_command(
    one: Annotated[str, typer.Argument(help="A run's name.")],
    two: Annotated[str, typer.Argument(help="Another one's.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show two runs beside each other: numbers, what their specs differ in, samples."""
    found = compare(one, two, Store())
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    console.print(_table("", found, {k: tuple(map(_number, v)) for k, v in found.numbers.items()}))
    console.print()
    if found.spec:
        differing = {k: tuple(cut(str(x), LONGEST) for x in v) for k, v in found.spec.items()}
        console.print(_table("spec", found, differing))
    else:
        console.print("their specs are the same")
    for sample in found.samples:
        _print_sample(found, sample.prompt, sample.reference, sample.completions)


def _table(title: str, found: Comparison, rows: dict[str, tuple[str, ...]]) -> Table:
    table = Table(title, *map(escape, found.names), box=None, pad_edge=False)
    for name, values in rows.items():
        table.add_row(escape(name), *map(escape, values))
    return table


def _print_sample(
    found: Comparison, prompt: str, reference: str, completions: tuple[str, str]
) -> None:
    console.print("\n[bold]a held-out prompt[/]")
    console.print(escape(prompt.strip()), style="dim")
    for name, text in zip((*found.names, "reference"), (*completions, reference), strict=True):
        console.print(f"[bold]{escape(name)}[/]: {escape(text.strip())}")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
