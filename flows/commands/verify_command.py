"""`ditty verify`: is everything that was committed still what it was?"""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditty.results.audit import audit
from ditty.store.artifacts import Store

console = Console(highlight=False)


def verify(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A run's name, a folder, or a URI of copies (s3://..., file:///...); none: all of "
            "DITTY_HOME."
        ),
    ] = None,
) -> None:
    """Read everything again, and name what is damaged, missing, or in no manifest."""
    read, faults = 0, 0
    with console.status("reading") as status:
        for audited in audit(what, Store()):
            read += 1
            status.update(f"reading ({read} so far: {escape(audited.where)})")
            for fault in audited.faults:
                faults += 1
                console.print(f"[red]✗[/] {escape(fault.what)}", soft_wrap=True)
                console.print(f"  {escape(fault.then)}", soft_wrap=True, style="dim")
    counted = f"{read} committed directories read"
    if faults:
        console.print(f"{counted}, [red]{faults} faults[/]")
        raise typer.Exit(1)
    console.print(f"{counted}: [green]all is as it was committed[/]")
