"""Work that is killed at each fail point in turn, and then done again, after one import.

The works: tests/works.py. For each, an undisturbed process writes down the points that it passes;
then, from the same start, one process after the other dies at one of them, and another one follows.
"""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ditty.errors import ArtifactDamaged
from ditty.failpoints import LOG_VARIABLE, VARIABLE
from ditty.store.artifacts import MANIFEST, verify
from ditty.store.files import read_json, sha256_file, write_json
from ditty.store.remote import PROBE, Remote
from tests import warm
from tests.scenarios import free_port
from tests.works import STEPS, WORKS, Place

LEFT = re.compile(r"\.(tmp|part|bad)-.*|\..*\.tmp")


def outcome(place: Place) -> dict[str, Any]:
    """All that must not depend on a kill: files, losses, learning rates, rows of each step."""
    found: dict[str, Any] = {
        _whoever(str(path.relative_to(place.home))): sha256_file(path)
        for path in sorted(place.home.rglob("*"))
        if path.is_file() and _counts(path.relative_to(place.home))
    }
    for record in place.run.metrics():
        if record["kind"] in ("save", "start"):  # as often as it was killed
            continue
        of = f"{record['kind']} {record['step']}"
        found[of] = [record["loss"].hex(), record.get("learning_rate", 0.0).hex()]
    if place.url.startswith("s3:"):
        keys = [_whoever(key) for key in Remote(place.url).objects.keys("")]
        found["target"] = [key for key in keys if not key.startswith((PROBE, "killed/lease/"))]
    for step, rank, rows in _rows_of_steps(place):
        name = f"rows of step {step}, rank {rank}"
        assert found.setdefault(name, rows) == rows, f"{name}: others than before"
    return found


def _whoever(path: str) -> str:
    """The path of a copy without the epoch of whoever made it: each start has another."""
    return re.sub(r"/checkpoints/\d{6}/", "/checkpoints/", path)


def _counts(path: Path) -> bool:
    # Manifests say when; attempts, locks and what only grows are other each time.
    if path.name == MANIFEST or LEFT.fullmatch(path.name):
        return False
    kept = {"store", "checkpoints", "promoted"} & {*path.parts}
    return bool(kept) or path.name in ("spec.json", "trained.json")


def _rows_of_steps(place: Place) -> list[tuple[int, int, list[int]]]:
    """(step, rank, rows), as often as they were taken."""
    return [
        (step, int(path.name.rpartition("-")[2]), rows)
        for path in sorted(place.home.glob("rows-of-rank-*"))
        for step, rows in map(json.loads, path.read_text().splitlines())
    ]


def damaged(place: Place) -> list[str]:
    """Whatever counts as committed and does not verify."""
    found = []
    for manifest in place.home.rglob(MANIFEST):
        if not any(LEFT.fullmatch(part) for part in manifest.relative_to(place.home).parts):
            try:
                verify(manifest.parent)
            except ArtifactDamaged as error:
                found.append(str(error))
    return found


def left_behind(place: Place) -> list[str]:
    """What nobody will ever finish: staging, set aside, files that belong to no manifest.

    Attempts are kept as they ended.
    """
    found = []
    for path in sorted(place.home.rglob("*")):
        name = path.relative_to(place.home)
        if "stages" not in name.parts and LEFT.fullmatch(path.name) and not _of_probe(path):
            found.append(str(name))
    committed = [m.parent for m in place.home.rglob(MANIFEST)]
    # The newest object of a lease stays: no epoch is used twice.
    committed += sorted((place.home / "target/killed/lease").glob("*.json"))[-1:]
    roots = ("ditty/store", "ditty/promoted", "ditty/runs/killed/checkpoints", "target")
    for root in roots:
        for path in (place.home / root).rglob("*"):
            owned = any(path.is_relative_to(c) for c in committed)
            if path.is_file() and not owned and not _of_probe(path):
                found.append(str(path.relative_to(place.home)))
    return found


def _of_probe(path: Path) -> bool:
    return path.parent.name in ("target", "promoted")  # what a killed one leaves goes after an hour


def ends(
    work: str,
    place: Place,
    environment: dict[str, str],
    rank: int = 0,
    after: float | None = None,
) -> dict[int, int]:
    """Do `work` in processes of its own, `rank` in a special environment; exit codes by rank.

    -9 is SIGKILL, which `rank` gets `after` so many seconds. After the first failure there are no
    more: the other processes are ended, as a launcher ends them.
    """
    if work in ("quantize", "train"):
        place.run.new_attempt({"quantize": "prequantize"}.get(work, work))
    children: dict[int, tuple[int, Any]] = {}
    port = free_port()
    for number in range(place.ranks):
        mine = {"DITTY_HOME": str(place.store.home)} | (environment if number == rank else {})
        if place.ranks > 1:
            names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": place.ranks}
            mine |= {k: str(v) for k, v in (names | {"MASTER_PORT": port}).items()}
            mine["MASTER_ADDR"] = "127.0.0.1"
        child = warm.FORK.Process(target=_do, args=(work, place, mine))
        child.start()
        children[child.sentinel] = (number, child)
    codes: dict[int, int] = {}
    if after is not None:
        (victim,) = (child for number, child in children.values() if number == rank)
        time.sleep(after)
        victim.kill()
    while children:
        for ended in wait(list(children)):
            number, child = children.pop(ended)
            child.join()
            if not any(codes.values()):
                codes[number] = child.exitcode
                if child.exitcode:
                    for _, other in children.values():
                        other.kill()
    return codes


def _do(work: str, place: Place, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    WORKS[work](place)


class Turn:
    """One work of a job, and the start of each of its processes.

    Attributes (keys of the job): work, and optionally s3, ranks, rank (that dies), only (a regular
    expression of points), all (points, or one of each kind), every (n-th of those), keep (what it
    made is the start of the works after it).
    """

    def __init__(self, inputs: Path, start: Path, turn: dict[str, Any]):
        self.inputs, self.start, self.turn = inputs, start, turn
        self.work, self.rank = turn["work"], turn.get("rank", 0)

    def fresh(self, name: str) -> Place:
        home = self.start.with_name(f"{self.turn.get('number')}-{name}") / "home"
        shutil.copytree(self.start, home)
        return Place(self.inputs, home, self.turn.get("s3"), self.turn.get("ranks", 1))

    def take(self) -> Iterator[tuple[str, Any]]:
        """(name, what happened) of the undisturbed process, and of one killed at each point."""
        oracle = self.fresh("oracle")
        log = self.start.with_name("points")
        log.unlink(missing_ok=True)
        ended = ends(self.work, oracle, {LOG_VARIABLE: str(log)}, self.rank)
        assert not any(ended.values()), f"{self.work} ended with {ended}"
        passed, expected = log.read_text().splitlines(), outcome(oracle)
        yield "oracle", {"points": passed, "left": left_behind(oracle), "outcome": expected}
        for number, point in enumerate(self._chosen(passed)):
            yield point, self._killed_at(point, self.fresh(str(number)), expected)
        self.finish(oracle)

    def finish(self, oracle: Place) -> None:
        """Remove the oracle, or make it the start of the next turn."""
        if self.turn.get("keep"):
            shutil.rmtree(self.start)
            oracle.home.rename(self.start)
        shutil.rmtree(oracle.home.parent)

    def _chosen(self, passed: list[str]) -> list[str]:
        """Points to die at: of each kind (all steps, keys and files are one) the middle pass."""
        passed = [point for point in passed if re.search(self.turn.get("only", ""), point)]
        if self.turn.get("all"):
            return passed
        kinds: dict[str, list[str]] = {}
        for point in passed:
            act, _, where = point.rpartition(" ")[0].partition(" ")
            folder, _, name = where.partition("/")
            if name not in (MANIFEST, "result.json") and "." in name.lstrip("."):
                name = "*"
            kind = re.sub(r"[0-9a-f]{64}|\d+", "*", f"{act} {folder}/{name}")
            kinds.setdefault(kind, []).append(point)
        middle = [points[len(points) // 2] for points in kinds.values()]
        return middle[:: self.turn.get("every", 1)]

    def _killed_at(self, point: str, place: Place, expected: dict[str, Any]) -> dict[str, Any]:
        ended = ends(self.work, place, {VARIABLE: point}, self.rank)
        return {"ended": ended.get(self.rank), **self.again(place, expected)}

    def again(self, place: Place, expected: dict[str, Any]) -> dict[str, Any]:
        """What the killed ones have left, and what came of it when it was done again."""
        told: dict[str, Any] = {"damaged": damaged(place)}
        told["saved"] = place.run.newest_step()
        before = Counter(step for step, *_ in _rows_of_steps(place))
        told["again"] = list(ends(self.work, place, {}).values())
        again = Counter(step for step, *_ in _rows_of_steps(place)) - before
        told["resumed"] = min(again, default=STEPS)
        got = outcome(place)
        told["other"] = sorted(
            k
            for k in {*expected, *got}
            if expected.get(k) != got.get(k) and not ("checkpoints/step" in k and k not in expected)
        )  # an old checkpoint may stay until the next save
        told["left"] = left_behind(place)
        shutil.rmtree(place.home.parent)
        return told


def serve(path: Path, kind: type[Turn] = Turn) -> None:
    """Do what the job in `path` says; the answers go beside it."""
    job = json.loads(path.read_text())
    start = path.with_name("start")
    start.mkdir()
    inputs = Path(job["inputs"])
    told = []
    for number, turn in enumerate(job["turns"]):
        told.append(dict(kind(inputs, start, {**turn, "number": number}).take()))
    write_json(path.with_suffix(".told"), told)


def launch(
    path: Path,
    inputs: Path,
    turns: list[dict[str, Any]],
    work: Callable[[Path], None] = serve,
) -> list[dict[str, Any]]:
    """For each turn {point: what happened}, from a process of tests/warm.py; see `Turn`.

    Args:
        work: called in it; see `serve`.
    """
    path.write_text(json.dumps({"inputs": str(inputs), "turns": turns}))
    printed = warm.run(work, path, environment={**os.environ, **warm.CPU_ONLY})
    told: list[dict[str, Any]] | None = read_json(path.with_suffix(".told"))
    assert told is not None, printed[-6000:]
    return told
