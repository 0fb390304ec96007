"""Fail points: where a test kills this process. Off unless the environment names one.

A point is an act on a path, `rename train/step_000000004`, and it is passed just before the act:
killed there, the process has done everything up to it and nothing after. All writes, fsyncs,
renames, puts and barriers on which something durable rests pass one (most in `ditty.store.files`).
"""

import os
import re
import signal
import threading
from collections import Counter
from pathlib import PurePath

VARIABLE = "DITTY_FAIL_POINT"  # the pass at which this process dies, `POINT #N` (N from 1)
LOG_VARIABLE = "DITTY_FAIL_POINT_LOG"  # a file that gets a line for each pass

_lock = threading.Lock()
_passed: Counter[str] = Counter()  # by this process


def fail_point(act: str, path: PurePath | str) -> None:
    """Be about to do `act` to `path`, of which the last two parts are told.

    A point that is passed by several threads at once has no certain number.
    """
    wanted, log = os.environ.get(VARIABLE), os.environ.get(LOG_VARIABLE)
    if wanted is None and log is None:
        return
    point = f"{act} {'/'.join(_stable(part) for part in PurePath(path).parts[-2:])}"
    with _lock:
        _passed[point] += 1
        passed = f"{point} #{_passed[point]}"
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{passed}\n")
    if passed == wanted:
        os.kill(os.getpid(), signal.SIGKILL)


def _stable(part: str) -> str:
    """A name without its random end, which those of staging directories and probes have."""
    return re.sub(r"(-\d{10})?-[0-9a-f]{12,32}$", "", part)
