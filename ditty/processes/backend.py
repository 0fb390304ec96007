"""Where a stage's processes run: what every place has to offer. Without torch.

A new place is a module with a `Backend` in it, a member of `ditty.config.choices.Where`, a line in
`ditty.processes.launch.backend_of`, and what it needs of the spec in `ditty.config`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ditty.config.launchspec import LaunchSpec


@dataclass(frozen=True)
class StageRun:
    """One attempt at a stage.

    Attributes:
        attempt: its directory, with job.json in it; the output goes to log.txt there.
        launch: of this stage: one process on one machine, where it is not `distributed`.
        distributed: through accelerate, as one world of `launch.world_size` processes.
    """

    stage: str
    attempt: Path
    launch: LaunchSpec
    distributed: bool


@dataclass(frozen=True)
class Ended:
    """How the processes of an attempt ended; what it means stands in its result.json.

    Attributes:
        how: for people, e.g. "exit code 137 (SIGKILL)".
        cancelled: somebody cancelled them where they ran: they are not to be started again.
    """

    how: str
    cancelled: bool = False


class Processes(Protocol):
    """The processes of an attempt, started or found."""

    def wait(self, seconds: float) -> Ended | None:
        """Wait so long at most; None: some are there, or are going to be."""

    def stop(self) -> None:
        """Have them save and end. Returns when none is left, or their place will see to it."""


class Backend(Protocol):
    """A place where processes run."""

    def check(self, launch: LaunchSpec) -> None:
        """Return if such a launch can be tried here.

        Raises:
            SpecError: it does not fit this place.
        """

    def describe(self, launch: LaunchSpec) -> str:
        """Where it would run, for people."""

    def find(self, name: str, stage: str, attempts: Path) -> Path | None:
        """The attempt of that folder whose processes outlived the flow that started them.

        Raises:
            SpecError: this machine has not what it takes to ask.
            RemoteError: the place does not answer.
        """

    def start(self, run: StageRun) -> AbstractContextManager[Processes]:
        """Start the processes of `run`, or take up those that `find` has found.

        Raises:
            SpecError: see `check`.
            RemoteError: the place does not answer.
        """
