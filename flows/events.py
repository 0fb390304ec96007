"""Events: what a flow tells whoever draws its progress.

With nobody listening an event goes nowhere; logs and the UI's artifacts do not depend on it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class EventState(StrEnum):
    """What became of a stage."""

    STARTED = "started"
    PROGRESS = "progress"
    CACHED = "cached"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Event:
    """A change of a stage.

    Attributes:
        stage: its title (`StageRef.title`).
        done, total: steps, of a stage that counts them; total 0: not known.
        message: for people, e.g. "loss 1.32, 5.1k tokens/s".
    """

    stage: str
    state: EventState
    done: int = 0
    total: int = 0
    message: str = ""


_listeners: list[Callable[[Event], None]] = []


@contextmanager
def listen(callback: Callable[[Event], None]) -> Iterator[None]:
    """Hand each event of this process to `callback`, in the thread that emits it."""
    _listeners.append(callback)
    try:
        yield
    finally:
        _listeners.remove(callback)


def emit(event: Event) -> None:
    """Tell whoever listens."""
    for callback in tuple(_listeners):
        callback(event)
