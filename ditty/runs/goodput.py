"""Goodput: how much of a training's wall time went into steps that count, and where the rest went.

Read from the run's directory: launch times and ends of the attempts, their last signs of life, and
metrics.jsonl with the steps that were lost and done again. The word: Google's ML Goodput.
"""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from ditty.runs.rundir import CRASH_FILE, RunDir, Status, read_result
from ditty.runs.tail import RecordTail
from ditty.store.files import read_json

Record = dict[str, Any]


@dataclass(frozen=True)
class Spent:
    """Seconds of one attempt at training and of the wait before it; each second in one of these.

    Attributes:
        start: from the end of the attempt before until its processes have met: retry, launcher,
            imports. Where nothing noted that end (the flow died too): from the last sign of life.
        load: model and checkpoint, up to the beginning of the first step.
        steps: steps that count.
        again: steps that were lost, and that a later attempt did again.
        other: between steps and after the last: evaluations, saves.
        detection: from the last sign of life of an attempt that failed until that was noted. The
            step that was cut short is in here.
    """

    start: float = 0.0
    load: float = 0.0
    steps: float = 0.0
    again: float = 0.0
    other: float = 0.0
    detection: float = 0.0

    @property
    def wall(self) -> float:
        """All of it."""
        return sum(astuple(self))

    @property
    def goodput(self) -> float:
        """The part of the wall time that went into steps that count; 0 where there was none."""
        return self.steps / self.wall if self.wall else 0.0


@dataclass(frozen=True)
class Attempt:
    """When what happened to an attempt; seconds since 1970.

    Attributes:
        began: it was launched.
        alive: the last sign of life that is not in the metrics: a heartbeat, or `began`.
        ended: its end was noted; None where nobody did.
        failed: it did not end by itself, done or saved.
    """

    began: float
    alive: float
    ended: float | None = None
    failed: bool = True


def read_goodput(run: RunDir) -> list[Spent]:
    """Of each attempt at training so far, oldest first; of several machines the first one's."""
    paths = [a for a in run.attempts("train") if (a / "job.json").exists() and _is_first(a)]
    records = [r for r in RecordTail(run.metrics_file).read() if r.keys() >= {"kind", "time"}]
    return spent([_read(path) for path in paths], records)


def total(parts: Sequence[Spent]) -> Spent:
    """The sums over attempts."""
    return Spent(*map(sum, zip(*map(astuple, parts), strict=True)))


def spent(attempts: Sequence[Attempt], records: Sequence[Record]) -> list[Spent]:
    """What each attempt's time went into; together all the time from the first launch on.

    Attempts may overlap: where its guard was killed, an old one saves while the next one is
    launched, and waits for the training lock. Then the next one's time begins at the end of that.

    Args:
        attempts: in the order of their launches.
        records: all of metrics.jsonl in the order they were written, lost steps too.
    """
    newest = {record["step"]: index for index, record in enumerate(records) if _is_step(record)}
    own: list[list[Record]] = [[] for _ in attempts]
    whose = 0
    for index, record in enumerate(records):
        if record["kind"] == "start":
            launched = [a.began <= record["load_time"] for a in attempts]
            whose = max(sum(launched) - 1, 0)
        if own:
            own[whose].append({**record, "counts": newest.get(record["step"]) == index})
    found, before = [], attempts[0].began if attempts else 0.0
    for attempt, its in zip(attempts, own, strict=True):
        found.append(_spent(attempt, its, before))
        before += found[-1].wall
    return found


def _spent(attempt: Attempt, records: Sequence[Record], before: float) -> Spent:
    """Of one attempt; `before`: the time up to which all is accounted for."""
    alive = max([before, attempt.alive, *(record["time"] for record in records)])
    steps = [record for record in records if _is_step(record)]
    began = [record for record in records if record["kind"] == "start"]
    first = steps[0]["time"] - steps[0]["seconds"] if steps else alive
    met = began[0]["load_time"] if began else first
    done, again = (
        sum(step["seconds"] for step in steps if step["counts"] is counts)
        for counts in (True, False)
    )
    rest = max(alive - first - done - again, 0.0)
    end = max((attempt.ended or alive) - alive, 0.0)
    return Spent(
        start=met - before,
        load=first - met,
        steps=done,
        again=again,
        other=rest if attempt.failed else rest + end,
        detection=end if attempt.failed else 0.0,
    )


def _is_step(record: Record) -> bool:
    return bool(record["kind"] == "train")


def _is_first(attempt: Path) -> bool:
    return not (read_json(attempt / "launch.json") or {}).get("machine_rank", 0)


def _read(attempt: Path) -> Attempt:
    """An attempt's times by its files: each is written once, or replaced whole."""
    began = (attempt / "job.json").stat().st_mtime
    beats = [read_json(path) or {} for path in (attempt / "heartbeat").glob("rank_*.json")]
    alive = max([began, *(beat["time"] for beat in beats if "time" in beat)])
    result = read_result(attempt)
    ends = [attempt / name for name in ("result.json", CRASH_FILE)]
    noted = [path.stat().st_mtime for path in ends if path.exists()]
    failed = result is None or result.status is Status.FAILED
    return Attempt(began, alive, max(noted, default=None), failed)


def describe(spent: Spent) -> str:
    """`78% of 600 s: steps 468, start 60, ...`, without what took nothing."""
    parts = [f"{name} {seconds:.0f}" for name, seconds in asdict(spent).items() if seconds >= 0.5]
    return f"{spent.goodput:.0%} of {spent.wall:.0f} s: {', '.join(parts)}"
