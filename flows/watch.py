"""What can be seen of a training process from outside: levels of its log, its heartbeats."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditty.errors import Crashed
from ditty.files import read_json

# As `ditty.worker` formats them; rank 1 of torchrun has a prefix.
LINE = re.compile(r"(?:\[\S+\]:)?(DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: (.*)")
STEP_LINE = re.compile(r"step \d+/\d+ loss ")

# Seconds that a phase may last before the processes count as hung. A step may take
# SLOW_STEP times the slowest one so far; before there is one, it may compile kernels.
PHASE_SECONDS = {"data": 600.0, "step": 900.0}
OTHER_PHASE_SECONDS = 3600.0
SLOW_STEP = 20.0
SHORTEST_SECONDS = 60.0


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
                    "it hangs, and was ended"
                )
