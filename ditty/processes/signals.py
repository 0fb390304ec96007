"""Being told to stop, without being interrupted; being asked what one is doing."""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STACK_SIGNAL = signal.SIGUSR1


def stack_file(heartbeat: Path) -> Path:
    """Where the process of a heartbeat shows its stack."""
    return heartbeat.with_suffix(".stack")


def show_stack_when_asked(heartbeat: Path) -> None:
    """From now on STACK_SIGNAL appends the Python stack of each thread to the `stack_file`.

    The handler is in C: it answers also where Python waits for a call that does not return, as a
    collective that a peer has left.
    """
    path = stack_file(heartbeat)
    path.parent.mkdir(parents=True, exist_ok=True)
    # faulthandler keeps the file, which is open for as long as we live.
    faulthandler.register(STACK_SIGNAL, file=open(path, "ab"), all_threads=True)  # noqa: SIM115


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to within the block, however often they come."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda n, _frame: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
