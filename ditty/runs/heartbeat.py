"""Signs of life, written by the training thread itself: a timer would beat through a hang."""

import json
import os
import time
from pathlib import Path

import psutil


class Heartbeat:
    """Writes {pid, pid_start, phase, step, time} at each change of phase.

    Args:
        path: the file, replaced whole each time; None writes nothing.

    `began` has when each phase was entered first, in seconds since 1970.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.pid = os.getpid()
        self.pid_start = psutil.Process().create_time()
        self.began: dict[str, float] = {}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, step: int) -> None:
        """Say what this process is about to do."""
        now = time.time()
        self.began.setdefault(phase, now)
        if self.path is None:
            return
        beat = {
            "pid": self.pid,
            "pid_start": self.pid_start,
            "phase": phase,
            "step": step,
            "time": now,
        }
        # No fsync: a heartbeat that a power cut takes with it is not missed.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat))
        os.replace(temporary, self.path)
