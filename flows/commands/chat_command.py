"""`ditty chat`: talk to a base model and to what a run has made of it, side by side."""

import subprocess
import sys
from typing import Annotated

import typer

from ditty.runs.status import find_trained
from ditty.store.artifacts import Store


def chat(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token each time.")
    ] = 0.0,
) -> None:
    """Talk to the base model and to a run's result, a line at a time; Ctrl-D ends."""
    find_trained(Store(), run)
    # In a process of its own: this one has no torch.
    command = [
        sys.executable,
        "-m",
        "ditty.evaluation.talk",
        run,
        str(max_tokens),
        str(temperature),
    ]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
