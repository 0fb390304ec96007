"""The commands `ditty serve` and `ditty deploy`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ditty.errors import RunError

if TYPE_CHECKING:  # prefect takes seconds to import, and most commands do without
    from flows.serving.deploy import Applied

console = Console(highlight=False)

DEFAULT_PORT = 4200

Notify = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE/NAME",
        help="Block that tells of failed and stalled runs and of promotions: slack-webhook/team.",
    ),
]


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = DEFAULT_PORT,
    notify: Notify = None,
) -> None:
    """Serve runs from the browser: server, worker and deployments on this machine.

    PREFECT_SERVER_DATABASE_CONNECTION_URL names a PostgreSQL; by default it is an SQLite file.
    """
    from flows.serving import serve as serving

    def on_up(served: "serving.Served") -> None:
        _print_applied(served.applied)
        console.print(f"database {served.database}; logs in {served.logs}", soft_wrap=True)
        console.print(f"\n[bold]open[/] {served.url}/v2/deployments and press Run. Ctrl-C ends it")

    console.print("starting Prefect's server")
    serving.serve(host, port, on_up, notify)
    console.print("stopped; a training that ran has saved a checkpoint")


def deploy(notify: Notify = None) -> None:
    """Put ditty's work pool, limit, automations and deployments on the server of PREFECT_API_URL.

    What is there is brought up to date. A machine that trains then runs
    `prefect worker start --pool ditty`.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise RunError(
            "`ditty deploy` needs a server: set PREFECT_API_URL=http://host:4200/api. For one on "
            "this machine: `ditty serve`"
        )
    from flows.serving.deploy import POOL, apply

    _print_applied(apply(notify))
    console.print(f"\nat {url}. On each machine that trains: prefect worker start --pool {POOL}")


def _print_applied(applied: "Applied") -> None:
    for made in [*applied.made, *(f"deployment {name}" for name in applied.deployments)]:
        console.print(f"[green]✓[/] {made}")
