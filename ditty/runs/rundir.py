"""The run directory: the only place where the flow process and the training process meet.

runs/<name>/
  spec.json                      written once a run; no secrets
  data.md                        what became of the rows, for people
  stages/<stage>/<attempt>/      job.json, launch.json, accelerate.yaml, log.txt, heartbeat/,
                                 result.json, or crashed.json where there is none; as a job of a
                                 cluster also job.sh and machines/, beside the lock submit
  metrics.jsonl                  append-only; the last record of a step wins
  samples.jsonl                  completions of held-out prompts, before and after
  checkpoints/step_000000200/    a manifest.json means committed
  trained.json                   content key and spec of the newest finished training
  stop                           the flow asks: checkpoint, then exit
  lock                           held by the training process
  lease, lease.json              a lock of whoever holds the name at the target, and its id there
  flow                           a lock that the flows of the run share, from start to end
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ditty.config.spec import RUN_NAME
from ditty.errors import ArtifactDamaged, RunError
from ditty.failpoints import fail_point
from ditty.store.artifacts import MANIFEST, default_home
from ditty.store.files import (
    STAGING,
    FileLock,
    is_held,
    make_dir,
    read_json,
    remove_tree,
    unlink,
    write_json,
)

CRASH_FILE = "crashed.json"  # the flow's, of an attempt that left no result
STEP_NAME = re.compile(r"step_(\d{9})")


class Status(StrEnum):
    """How an attempt ended."""

    OK = "ok"
    PREEMPTED = "preempted"
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """The meaning of an attempt's end: launchers turn every exit code into 1.

    Attributes:
        kind: the error's class name, or "" when all went well.
        step: the last step of which a checkpoint is committed, or of the finished run.
        retryable: could an identical attempt succeed?
    """

    status: Status
    step: int = 0
    kind: str = ""
    message: str = ""
    retryable: bool = False


def step_name(step: int) -> str:
    """The directory name of a checkpoint."""
    return f"step_{step:09d}"


class RunDir:
    """Paths and small records of one run; `root` need not exist yet."""

    def __init__(self, root: Path):
        self.root = root
        self.spec_file = root / "spec.json"
        self.metrics_file = root / "metrics.jsonl"
        self.samples_file = root / "samples.jsonl"
        self.data_file = root / "data.md"
        self.trained_file = root / "trained.json"
        self.stop_file = root / "stop"
        self.flow_lock = root / "flow"
        self.lease_lock = root / "lease"
        self.lease_file = root / "lease.json"
        self._training_lock = root / "lock"
        self.checkpoints = root / "checkpoints"

    @classmethod
    def named(cls, name: str, home: Path | None = None) -> "RunDir":
        """The run directory of `name` below `home` (default: DITTY_HOME)."""
        if not RUN_NAME.fullmatch(name):
            raise RunError(f"{name!r} is no run name; see `ditty status` for those there are")
        return cls((home or default_home()) / "runs" / name)

    def new_attempt(self, stage: str) -> Path:
        """A fresh attempt directory; its number is the first `mkdir` that succeeds."""
        parent = make_dir(self.root / "stages" / stage)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
        while True:
            attempt = parent / f"{number:04d}"
            try:
                attempt.mkdir()
            except FileExistsError:
                number += 1
            else:
                return attempt

    def attempts(self, stage: str) -> list[Path]:
        """Attempt directories of a stage, oldest first."""
        parent = self.root / "stages" / stage
        if not parent.is_dir():
            return []
        return sorted(p for p in parent.iterdir() if p.name.isdigit())

    def has_trained(self) -> bool:
        """Whether a training has begun here, or its result was found: the name is its spec's."""
        return bool(self.attempts("train") or self.committed_steps() or self.trained_file.exists())

    def committed_steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending; their content is not verified here."""
        if not self.checkpoints.is_dir():
            return []
        steps = []
        for path in self.checkpoints.iterdir():
            match = STEP_NAME.fullmatch(path.name)
            if match and (path / MANIFEST).is_file():
                steps.append(int(match[1]))
        return sorted(steps)

    def newest_step(self) -> int:
        """The last of `committed_steps`; 0: there is none."""
        return max(self.committed_steps(), default=0)

    def clear_unfinished(self) -> None:
        """Remove what saves, downloads and removals that were cut short have left.

        The caller holds the training lock.
        """
        for path in self.checkpoints.glob("*"):
            removed = STEP_NAME.fullmatch(path.name) and not (path / MANIFEST).exists()
            if removed or path.name.startswith(STAGING):
                remove_tree(path)

    def clear_half_written(self) -> None:
        """Remove what killed writers of the run's small files have left.

        The caller has the flow lock to itself.
        """
        for path in self.root.glob(".*.tmp"):
            unlink(path)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` stands, or will."""
        return self.checkpoints / step_name(step)

    def training_lock(self) -> FileLock:
        """Held by rank 0 for as long as it may write here."""
        return FileLock(self._training_lock)

    def is_training(self) -> bool:
        """Whether a process holds the training lock."""
        return is_held(self._training_lock)

    def has_flow(self) -> bool:
        """Whether a flow of this run is alive: it may start attempts, or wait to."""
        return is_held(self.flow_lock)

    def is_alive(self) -> bool:
        """Whether anything may still be written here: a training may outlive its flow to save."""
        return self.has_flow() or self.is_training()

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Records of metrics.jsonl in step order, the last record of a (step, kind) winning.

        A line cut short by a crash is passed over.
        """
        yield from _last_wins(self.metrics_file)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Records of samples.jsonl, likewise."""
        yield from _last_wins(self.samples_file)


def _last_wins(path: Path) -> Iterator[dict[str, Any]]:
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records[(record["step"], record.get("kind", ""), record.get("index", 0))] = record
    yield from (records[key] for key in sorted(records))


def best_step(checkpoint: Path) -> int | None:
    """The step whose weights are the best that a checkpoint knows of; None where it says nothing.

    Raises:
        ArtifactDamaged: its state is not JSON, or nonsense.
    """
    path = checkpoint / "state.json"
    try:
        state = read_json(path)
    except (ValueError, RecursionError) as error:
        raise ArtifactDamaged(f"{path} is not JSON: {error}") from error
    if state is None:
        return None
    best = state.get("best_step") if isinstance(state, dict) else state
    if not isinstance(state, dict) or (best is not None and type(best) is not int):
        raise ArtifactDamaged(f"{path} has {best!r} where the best step should be")
    return best


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line, starting on a fresh line even after a crash in mid-line."""
    line = json.dumps(record, sort_keys=True).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        fail_point("append", path)
        os.write(fd, line)
    finally:
        os.close(fd)


def write_result(attempt: Path, result: Result) -> None:
    """Leave the attempt's meaning."""
    write_json(attempt / "result.json", asdict(result))


def read_job(attempt: Path) -> dict[str, Any]:
    """What the attempt's worker is to do, as whoever launches it has left it."""
    value: dict[str, Any] | None = read_json(attempt / "job.json")
    assert value is not None, f"{attempt} has no job.json"
    return value


def read_result(attempt: Path) -> Result | None:
    """The attempt's meaning, or None where it vanished without a word."""
    value = read_json(attempt / "result.json")
    return None if value is None else Result(**{**value, "status": Status(value["status"])})
