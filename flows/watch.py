"""What can be seen of a training process from outside: levels of its log, heartbeats, stacks."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ditty.errors import Crashed
from ditty.processes.signals import STACK_SIGNAL, stack_file
from ditty.store.files import read_json

# As `ditty.worker` formats them; rank 1 of torchrun has a prefix.
LINE = re.compile(r"(?:\[\S+\]:)?(DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: (.*)")
STEP_LINE = re.compile(r"step \d+/\d+ loss ")

# Seconds that a phase may last before the processes count as hung. A step may take
# SLOW_STEP times the slowest one so far; before there is one, it may compile kernels.
PHASE_SECONDS = {"data": 600.0, "step": 900.0}
OTHER_PHASE_SECONDS = 3600.0
SLOW_STEP = 20.0
SHORTEST_SECONDS = 60.0

STACK_SECONDS = 3.0  # for the ranks to show their stacks; they take a hundredth
FRAMES = 12  # of each rank, in the report
NO_ANSWER = ("gone", psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DISK_SLEEP)


def level_of(line: str) -> tuple[int, str]:
    """(logging level, message) of a line of a worker's output.

    One line a step is too much for an API; metrics.jsonl has them all.
    """
    match = LINE.fullmatch(line)
    if not match:
        return logging.INFO, line
    level = "DEBUG" if STEP_LINE.match(match[2]) else match[1]
    return logging.getLevelNamesMapping()[level], match[2]


class StallWatch:
    """Raises where a rank has not got on for too long, e.g. stopped or stuck in a collective.

    Args:
        directory: the attempt's `heartbeat`.
        clock: seconds that do not jump.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic):
        self.directory, self.clock = directory, clock
        self.slowest_step = 0.0
        self._beats: dict[Path, tuple[Any, float]] = {}

    def limit(self, phase: str) -> float:
        """Seconds that `phase` may last."""
        if phase == "step" and self.slowest_step:
            return max(SHORTEST_SECONDS, SLOW_STEP * self.slowest_step)
        return PHASE_SECONDS.get(phase, OTHER_PHASE_SECONDS)

    def check(self) -> None:
        """Look at the heartbeats once.

        Raises:
            Crashed: a rank is overdue; the caller ends its processes.
        """
        now = self.clock()
        for path in sorted(self.directory.glob("rank_*.json")):
            beat = read_json(path)
            last, since = self._beats.get(path, (None, now))
            if beat != last:
                self._beats[path] = (beat, now)
            elif beat and now - since > self.limit(beat["phase"]):
                limit = self.limit(beat["phase"])
                raise Crashed(
                    f"{path.stem} (pid {beat['pid']}) has been in phase {beat['phase']} of step "
                    f"{beat['step']} for {now - since:.0f} s; at most {limit:.0f} s were expected: "
                    f"it hangs, and was ended.\n{what_ranks_do(self.directory)}"
                )


def what_ranks_do(directory: Path) -> str:
    """Each rank's phase and Python stack; one that waits for another is not the one that hangs.

    Args:
        directory: the attempt's `heartbeat`.
    """
    ranks = [_Rank(path) for path in sorted(directory.glob("rank_*.json"))]
    end = time.monotonic() + STACK_SECONDS
    while not all(rank.answered() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)
    return "\n".join(rank.describe() for rank in ranks)


class _Rank:
    """One rank, asked for its stack."""

    def __init__(self, heartbeat: Path):
        self.name, self.beat = heartbeat.stem, read_json(heartbeat) or {}
        self.stack = stack_file(heartbeat)
        self.shown = self._size()  # by an earlier question
        self.state = self._ask()

    def _ask(self) -> str:
        """Send the signal; the process's state. Another process may have its number by now."""
        try:
            process = psutil.Process(self.beat["pid"])
            if abs(process.create_time() - self.beat["pid_start"]) > 1.0:
                return "gone"
            state: str = process.status()
            if self.stack.exists():  # else the signal would end it
                process.send_signal(STACK_SIGNAL)
            return state
        except (KeyError, psutil.Error):
            return "gone"

    def _size(self) -> int:
        return self.stack.stat().st_size if self.stack.exists() else 0

    def answered(self) -> bool:
        """Is its stack there, or not to be had?"""
        return self.state in NO_ANSWER or self._current() is not None

    def _current(self) -> list[str] | None:
        """Frames of the thread that runs Python code or waits in it, the innermost first."""
        if not self.stack.exists():
            return None
        shown = self.stack.read_bytes()[self.shown :].decode(errors="replace")
        _, found, current = shown.partition("Current thread ")
        frames = current.partition("\n\n")[0].splitlines()[1:]
        return frames[:FRAMES] if found and current.endswith("\n") else None

    def describe(self) -> str:
        where = f"{self.name}: phase {self.beat.get('phase')} of step {self.beat.get('step')}"
        frames = self._current()
        if not frames:
            return f"{where}, {self.state}: it shows no stack"
        return "\n".join([f"{where}, all threads in {self.stack}:", *frames])
