"""A stage is made once, and never served unverified: across runs, processes, damage and kills."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.serializers import PickleSerializer

from ditty.store.artifacts import Store
from flows.caching import StageLocks, cache_key, stage_cache_policy
from tests.faultproxy import flipped

KEY = "a" * 64
FLOW = Path(__file__).parent / "counted_flow.py"


class Line:
    """Runs the flow of counted_flow.py and counts the runs of its task's body."""

    def __init__(self, home: Path, counter: Path, api: str):
        self.store, self.counter, self.api = Store(home), counter, api
        counter.touch()

    def run(self, key: str = KEY, in_flow: bool = False) -> str:
        """In this process; the name of the task's final state."""
        from tests.counted_flow import one_stage, run_stage

        run = one_stage if in_flow else run_stage  # a flow takes a second more
        name, result = run(key, self.store.home, self.counter)
        manifest = self.store.find("load", key)
        assert result == {"stage": "load", "key": key, "digest": manifest.digest}
        return name

    def start(self, seconds: float = 0) -> "subprocess.Popen[str]":
        """In another process, whose task's body takes `seconds`."""
        root = str(FLOW.parent.parent)
        environment = {**os.environ, "PREFECT_API_URL": self.api, "PYTHONPATH": root}
        arguments = [str(self.store.home), KEY, str(self.counter), str(seconds)]
        return subprocess.Popen(
            [sys.executable, str(FLOW), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    @property
    def count(self) -> int:
        return self.counter.stat().st_size

    @property
    def artifact(self) -> Path:
        return self.store.path("load", KEY) / "data"

    @property
    def payload(self) -> Path:
        return self.store.home / "prefect" / "results" / f"load-{KEY}"

    @property
    def record(self) -> Path:
        return self.store.home / "prefect" / "records" / f"load-{KEY}.json"


@pytest.fixture
def line(prefect_api: str, home: Path, tmp_path: Path) -> Line:
    return Line(home, tmp_path / "counter", prefect_api)


def api_state_names(flow_name: str) -> list[str]:
    """Names of the states of the task runs of the newest run of a flow, as the API has them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterId,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        only = FlowRunFilter(id=FlowRunFilterId(any_=[runs[0].id]))
        for _ in range(100):  # task runs reach the API as events, a little later
            names = [r.state_name for r in client.read_task_runs(flow_run_filter=only)]
            if names and not set(names) & {"Pending", "Running"}:
                return names
            time.sleep(0.1)
    return names


def test_second_run_is_cached_and_the_api_says_so(line: Line) -> None:
    assert line.run(in_flow=True) == "Completed"
    assert line.run(in_flow=True) == "Cached"
    assert line.count == 1
    assert api_state_names("one-stage") == ["Cached"]


def test_another_key_is_another_artifact(line: Line) -> None:
    line.run()
    assert line.run("b" * 64) == "Completed"
    assert line.count == 2


@pytest.mark.fault("damaged cache")
def test_a_damaged_artifact_is_rebuilt_not_served(
    line: Line, figure: Callable[[str], None]
) -> None:
    line.run()
    good = line.artifact.read_bytes()
    damages = {
        "deleted": line.artifact.unlink,
        "truncated": lambda: line.artifact.write_bytes(good[:-1]),
        "flipped": lambda: line.artifact.write_bytes(flipped(good)),
        "all deleted": lambda: shutil.rmtree(line.artifact.parent),
    }
    hits = 0
    for number, (name, damage) in enumerate(damages.items()):
        damage()
        hits += line.run() == "Cached"
        assert line.count == 2 + number, f"{name}: served"
        assert line.artifact.read_bytes() == good
    assert line.run() == "Cached"
    figure(f"false hits {hits} of {len(damages)} ({', '.join(damages)})")


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.payload.unlink(),
        lambda line: line.payload.write_text('{"stage": "lo'),
        lambda line: line.record.unlink(),
        lambda line: line.record.write_text("{"),
        lambda line: line.record.write_text(line.record.read_text().replace("results", "other")),
        lambda line: name_pickle(line),
    ],
    ids=["no result", "torn result", "no record", "torn record", "foreign result", "pickle"],
)
def test_damaged_record_is_a_miss_and_no_failure(line: Line, damage: object) -> None:
    line.run()
    damage(line)  # type: ignore[operator]
    assert line.run() == "Completed"
    assert line.run() == "Cached"
    assert line.count == 2


def name_pickle(line: Line) -> None:
    record = json.loads(line.record.read_bytes())
    record["serializer"] = PickleSerializer().model_dump(mode="json")
    line.record.write_text(json.dumps(record))


def test_a_record_cannot_have_a_pickle_loaded(line: Line, tmp_path: Path) -> None:
    line.run()
    loot = tmp_path / "loot"

    class Exploit:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (loot,))

    name_pickle(line)
    line.payload.write_bytes(PickleSerializer().dumps(Exploit()))
    assert line.run() == "Completed"
    assert not loot.exists()


def test_artifact_that_the_library_made_is_a_hit_for_the_body_only(line: Line) -> None:
    with line.store.commit("load", KEY, {}) as out:
        (out / "data").write_text("made without Prefect")
    assert line.run() == "Completed"
    assert line.artifact.read_text() == "made without Prefect"


def test_an_artifact_is_hashed_once_a_hit(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    from ditty.store import artifacts

    line.run()
    verified = []
    verify = artifacts.verify
    monkeypatch.setattr(artifacts, "verify", lambda at, *by: verified.append(at) or verify(at, *by))
    from tests.counted_flow import run_stage

    assert run_stage(KEY, line.store.home, line.counter)[0] == "Cached"
    assert len(verified) == 1


def test_three_processes_compute_once(line: Line) -> None:
    children = [line.start(seconds=1) for _ in range(3)]
    states = sorted(child.communicate()[0].splitlines()[-1] for child in children)
    assert states == ["Cached", "Cached", "Completed"]
    assert line.run() == "Cached"
    assert line.count == 1


def test_lock_of_a_killed_holder_frees_itself(line: Line) -> None:
    child = line.start(seconds=600)
    locks = StageLocks(line.store.home)
    key = f"load-{KEY}"
    while line.count == 0:  # its body runs: it holds the lock
        assert child.poll() is None
        time.sleep(0.05)
    assert locks.is_locked(key)
    assert not locks.acquire_lock(key, "me", 0)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not locks.is_locked(key)
    assert line.run() == "Completed"


@pytest.fixture
def held(home: Path) -> Iterator[StageLocks]:
    locks = StageLocks(home)
    assert locks.acquire_lock("load-k", "me")
    yield locks
    locks.release_lock("load-k", "me")


def test_the_lock_is_the_stores(held: StageLocks, home: Path) -> None:
    assert not Store(home).lock("load", "k").acquire(0)


def test_only_the_holder_releases(held: StageLocks) -> None:
    with pytest.raises(ValueError, match="you does not hold the lock of load-k"):
        held.release_lock("load-k", "you")
    assert held.acquire_lock("load-k", "me", 0), "the holder may ask again"
    assert not held.acquire_lock("load-k", "you", 0)


def test_locks_survive_copies_and_pickles(held: StageLocks, home: Path) -> None:
    assert copy.deepcopy(held) is held
    other = pickle.loads(pickle.dumps(held))
    assert other.home == home and not other.is_lock_holder("load-k", "me")
    assert other.is_locked("load-k")
    policy = pickle.loads(pickle.dumps(stage_cache_policy(Store(home))))
    assert policy.lock_manager.is_locked("load-k")


def test_asking_for_a_lock_leaves_no_file(home: Path) -> None:
    locks = StageLocks(home)
    assert not locks.is_locked("load-k") and locks.wait_for_lock("load-k")
    assert not home.exists()


def test_a_ref_without_a_key_has_no_cache_key() -> None:
    assert cache_key(None, {"ref": SimpleNamespace(stage="pack", key="")}) is None
