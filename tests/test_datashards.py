"""Shards of the data: the same bytes however many there are, whoever makes them, whoever dies."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from distributed import LocalCluster
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import TaskRun

from ditty.config.dataspec import DataSpec
from ditty.config.spec import RunSpec
from ditty.errors import DataError, RowError, SpecError, StoreError
from ditty.planning import preflight
from ditty.planning.plan import make_plan
from ditty.runs.rundir import RunDir
from ditty.stages import datashards, datastages, stageline
from ditty.store.artifacts import Manifest, Store, read_manifest
from ditty.store.files import locked, write_json
from flows import tasks
from flows.events import EventState, listen
from flows.tasks import Caller
from tests.processes import ROOT
from tests.tiny import make_model_folder

ROWS = 4_300


OPERATIONS = """
import time

def kept(row):
    return row["text"] is not None and len(row["text"]) % 3 > 0

def slowly(row):
    time.sleep(0.002)
    return True

def halves_and_wholes(row):
    return {"half": row["n"] if 1000 <= row["n"] < 4000 else row["n"] / 2}

def sums(rows):
    return {"sum": [sum(rows["n"]), len(rows["n"])]}

def late(rows):
    return {"prompt": [f"{n}" for n in rows["n"] if n > 2500]}

def fails(row):
    if row["n"] == 3210:
        raise KeyError("body")
    return row["n"] > 2500

def never(row):
    return False
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and rows of which some are long, empty, twice there, or bad."""
    folder = tmp_path_factory.mktemp("sharded")
    make_model_folder(folder / "model")
    draw = random.Random(0)
    words = ["Hello", "there", "be", "kind", "fine", "and", "then", "ok"]
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        text: str | None = " ".join(draw.choices(words, k=draw.randrange(1, 30)))
        text = None if number % 97 == 5 else "" if number % 89 == 7 else text
        text = rows[number - 1500]["text"] if number > 2000 and number % 11 == 0 else text
        rows.append({"text": text, "n": number})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ops.py").write_text(OPERATIONS)
    return folder


def operation(place: Path, method: str, name: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "function": f"{place}/ops.py:{name}", **options}


def spec_of(place: Path, **data: Any) -> RunSpec:
    rows = {"source": str(place / "rows.jsonl"), "format": "text", "seq_len": 24}
    rows |= {"eval_fraction": 0.2, "max_bad_fraction": 0.5}
    return RunSpec.model_validate(
        {
            "name": "sharded",
            "data": rows | data,
            "model": {"base_model": str(place / "model")},
            "launch": {"device": "cpu"},
        }
    )


def made(spec: RunSpec, store: Store, run: datashards.Run = datashards.in_turn) -> Manifest:
    """The artifact of the first stage after `load`, and that one."""
    line = stageline.resolve(spec, store)
    for ref in line.data()[:2]:
        manifest = datastages.build_data(ref, line, spec, store, run)
    return manifest


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Key, files with their digests, and facts of `tokenize` without shards."""
    found = {}
    for limit in (None, 37):
        spec = spec_of(place, eval_max_rows=limit)
        store = Store(tmp_path_factory.mktemp("whole"))
        manifest = made(spec, store)
        found[limit] = (stageline.resolve(spec, store).need("tokenize").key, manifest)
    return found


@flow(name="data", validate_parameters=False)
def data_flow(spec: RunSpec, store: Store) -> list[str]:
    """`load` and the stage after it; how the last one ended."""
    line, ended = stageline.resolve(spec, store), []
    with listen(lambda event: ended.append(event.state)):
        for ref in line.data()[:2]:
            Caller.of(spec, store).cached(tasks.make_data, ref, line, spec, store)
    return ended


def test_the_flow_makes_each_shard_in_a_task_of_its_own(
    place: Path, home: Path, whole: Any, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = spec_of(place, shards=5, num_proc=2), Store(home)
    assert data_flow(spec, store)[-1] is EventState.DONE
    key, expected = whole[None]
    assert contents(read_manifest(store.path("tokenize", key))) == contents(expected)
    (flow_run,) = {run.flow_run_id for run in shard_runs()}
    titles = {run.name for run in shard_runs()}
    assert flow_run and titles == {f"tokenize {n}/5" for n in range(1, 6)}
    assert data_flow(spec_of(place, shards=3), store)[-1] is EventState.CACHED
    with pytest.raises(DataError, match="45 of 4,300 rows"):
        data_flow(spec_of(place, shards=5, max_bad_fraction=0.0), Store(home / "other"))
    monkeypatch.setattr(datashards, "build", Mock(side_effect=ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="^a bug$"):
        data_flow(spec_of(place, shards=5), Store(home / "another"))


def test_the_error_of_a_row_comes_back_from_another_process() -> None:
    there = RowError(7, "it has no text", "at 3")
    back = pickle.loads(pickle.dumps(there))
    assert str(back) == str(there) == "row 7: it has no text: at 3"
    assert (back.reason, back.detail) == ("it has no text", "at 3")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"engine": "dask"}, "engine: dask needs data.engine_address: tcp://host:8786"),
        ({"engine": "ray"}, "engine: ray needs data.engine_address: ray://host:10001"),
        (
            {"engine_address": "tcp://a:1"},
            "engine: threads takes no data.engine_address: remove it",
        ),
    ],
)
def test_a_cluster_has_an_address_and_nothing_else_has(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSpec(source="rows.jsonl", **data)


def test_an_engine_without_shards_is_refused_before_anything_starts() -> None:
    """Not by the spec: earlier ones, which are read again, may say so."""
    message = r"engine: dask makes shards, and data.shards is 1: set data.shards \(64, say\), or"
    with pytest.raises(SpecError, match=message):
        preflight.check_engine(
            DataSpec(source="rows.jsonl", engine="dask", engine_address="tcp://a:1")
        )


@pytest.mark.skipif(find_spec("prefect_ray") is not None, reason="Ray is installed here")
def test_an_engine_that_is_not_installed_is_refused_before_anything_starts(
    place: Path, home: Path
) -> None:
    spec = spec_of(place, shards=2, engine="ray", engine_address="auto")
    for check in (preflight.check, make_plan):
        with pytest.raises(
            SpecError, match="ray needs .*: pip install 'prefect-ray>=0.6,<0.7' into /"
        ):
            check(spec, Store(home))


def test_the_plan_says_so_and_a_finished_run_takes_another_number(place: Path, home: Path) -> None:
    spec, store = spec_of(place, shards=2, engine="processes"), Store(home)
    (planned,) = [s for s in make_plan(spec, store).stages if s.stage == "tokenize"]
    assert planned.why == "not in the store; after load; in 2 shards, by processes"
    run = RunDir.named(spec.name, home)
    run.new_attempt("train")
    write_json(run.spec_file, spec.model_dump(mode="json"))
    preflight.check_run(spec_of(place, shards=9), store)


def shard_runs() -> list[TaskRun]:
    """The five that the server knows, once it has heard of them."""
    wanted = TaskRunFilter(name=TaskRunFilterName(like_="tokenize "))
    with get_client(sync_client=True) as client:
        end = time.monotonic() + 30
        while len(runs := client.read_task_runs(task_run_filter=wanted)) < 5:
            assert time.monotonic() < end, runs
            time.sleep(0.2)
    return runs


@pytest.fixture(scope="module")
def slow_place(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows so long that a shard of them takes seconds."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "model").symlink_to(place / "model")
    draw = random.Random(1)
    lines = [
        json.dumps({"text": "".join(draw.choices("Helo  thr ,.", k=3000))}) for _ in range(4000)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


class KillOne:
    """Kills a process while it makes a shard, once; of those that `pids` returns."""

    def __init__(self, home: Path, pids: Callable[[], Iterable[int]]):
        self.home, self.pids, self.killed = home, pids, 0
        self.thread = threading.Thread(target=self._kill, daemon=True)
        self.thread.start()

    def _kill(self) -> None:
        while not self.killed:
            time.sleep(0.01)
            for pid in self.pids():
                try:
                    open_files = [file.path for file in psutil.Process(pid).open_files()]
                except psutil.Error:
                    continue
                if any("/store/shard/.tmp-" in path for path in open_files):
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid
                    return


def shards_begun(log: Path) -> Counter[str]:
    """Key -> how often a process began to make that shard."""
    return Counter(
        line.split("/.tmp-")[1].split(" ")[0]
        for line in log.read_text().splitlines()
        if line.startswith("make shard/")
    )


@pytest.fixture
def passes(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of what the processes that make shards come by."""
    home.mkdir()
    log = home / "passes.log"
    monkeypatch.setenv("DITTY_FAIL_POINT_LOG", str(log))
    return log


def assert_one_was_made_twice(spec: RunSpec, home: Path, expected: Manifest) -> None:
    ref = stageline.resolve(spec, Store(home)).data()[1]
    assert contents(read_manifest(Store(home).path(ref.stage, ref.key))) == contents(expected)
    assert sorted(shards_begun(home / "passes.log").values()) == [1, 1, 1, 2]


def whole_and_slow(folder: Path, home: Path, **data: Any) -> tuple[Manifest, RunSpec]:
    data |= {"shards": 4, "overlong": "truncate"}
    spec = spec_of(folder, **data)
    alone = spec.model_copy(update={"data": spec.data.model_copy(update={"shards": 1})})
    return made(alone, Store(home / "alone")), spec


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_costs_one_shard(
    slow_place: Path, home: Path, prefect_api: str, passes: Path
) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        expected, spec = whole_and_slow(slow_place, home, engine="dask", engine_address=address)
        passes.unlink()
        nannies = cluster.workers.values()
        kill = KillOne(home, lambda: [n.pid for n in nannies if n.pid])
        assert data_flow(spec, Store(home))[-1] is EventState.DONE
        assert kill.killed and kill.killed not in [n.pid for n in nannies]
    assert_one_was_made_twice(spec, home, expected)


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], ["slowly"]])
def test_a_process_that_is_killed_costs_one_shard(
    place: Path, slow_place: Path, home: Path, prefect_api: str, passes: Path, names: list[str]
) -> None:
    operations = [operation(place, "filter", name) for name in names]
    data = {"engine": "processes", "num_proc": 2, "operations": operations}
    expected, spec = whole_and_slow(slow_place, home, **data)
    passes.unlink()
    below = psutil.Process().children
    kill = KillOne(home, lambda: [child.pid for child in below(recursive=True)])
    assert data_flow(spec, Store(home))[-1] is EventState.DONE
    assert kill.killed
    assert_one_was_made_twice(spec, home, expected)


@pytest.mark.slow
def test_a_worker_process_ends_with_a_flow_that_is_killed() -> None:
    code = (
        "import os, time; from flows.engines import Processes; pool = Processes(1)._start();"
        " print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 600).result()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([worker], timeout=30)[1], "it outlives the flow"


def contents(manifest: Manifest) -> tuple[Any, Any]:
    return manifest.files, {k: v for k, v in manifest.facts.items() if k != "made_by"}


@pytest.mark.parametrize(("shards", "limit"), [(3, None), (3, 37), (100, 37)])
def test_shards_change_neither_the_key_nor_a_byte(
    place: Path, home: Path, whole: Any, shards: int, limit: int | None
) -> None:
    spec, store, seen = spec_of(place, eval_max_rows=limit, shards=shards), Store(home), []

    def run(refs: Any, work: datashards.ShardWork) -> None:
        datashards.in_turn(refs[::-1], work)  # in any order
        seen.extend(read_manifest(store.path(ref.stage, ref.key)).facts["rows"] for ref in refs)

    key, expected = whole[limit]
    assert contents(made(spec, store, run)) == contents(expected)
    assert stageline.resolve(spec, store).need("tokenize").key == key
    assert len(seen) == min(shards, 5) and sum(seen) == ROWS and min(seen[:-1]) >= 1000
    facts = expected.facts
    assert facts["quarantined"] and facts["dropped"] and facts["truncated"] and facts["eval_rows"]
    assert (facts["eval_unused"] > 0) == (limit is not None)
    assert list((home / "store" / "shard").iterdir()) == [], "shards go when they are put together"


ROW_OPERATIONS = [
    ("filter", "kept", {}),
    ("map", "halves_and_wholes", {"remove_columns": ["text"]}),
    ("map", "sums", {"batched": True, "remove_columns": ["text", "n"]}),
    ("map", "late", {"batched": True, "remove_columns": ["text", "n"]}),  # none of the first rows
]


@pytest.mark.parametrize(("method", "name", "options"), ROW_OPERATIONS)
@pytest.mark.parametrize(("shards", "num_proc"), [(3, 1), (100, 2)])
def test_row_operations_in_shards_make_the_same_bytes(
    place: Path, home: Path, method: str, name: str, options: Any, shards: int, num_proc: int
) -> None:
    """Also where a part alone finds other types: whole numbers, and then halves."""
    wanted, made_of = [operation(place, method, name, **options)], []

    def run(refs: Any, work: datashards.ShardWork) -> None:
        datashards.in_turn(refs[::-1], work)
        paths = [work.store.path(ref.stage, ref.key) for ref in refs]
        made_of.extend(read_manifest(path).facts["rows_in"] for path in paths)

    alone = made(spec_of(place, operations=wanted), Store(home / "alone"))
    data = {"operations": wanted, "shards": shards, "num_proc": num_proc}
    spec, store = spec_of(place, **data), Store(home)
    assert contents(made(spec, store, run)) == contents(alone)
    assert sum(made_of) == ROWS and len(made_of) == min(shards, 5)
    assert list((home / "store" / "shard").iterdir()) == []


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("name", "message"),
    [("fails", "failed at row 3210: KeyError"), ("never", "leaves none of 4300 rows")],
)
def test_a_row_operations_errors_are_those_of_the_whole(
    place: Path, home: Path, name: str, message: str, shards: int
) -> None:
    spec = spec_of(place, operations=[operation(place, "filter", name)], shards=shards)
    with pytest.raises(DataError, match=f"^operation filter ops.py:{name} {message}"):
        made(spec, Store(home))


def test_a_worker_with_another_function_says_so(place: Path, home: Path) -> None:
    spec = spec_of(place, operations=[operation(place, "filter", "kept")], shards=2)
    ops = place / "ops.py"

    def edited(refs: Any, work: datashards.ShardWork) -> None:
        ops.write_text(OPERATIONS.replace("% 3", "% 5"))
        datashards.in_turn(refs, work)

    try:
        with pytest.raises(StoreError, match="ops.py:kept is another function here than where"):
            made(spec, Store(home), edited)
    finally:
        ops.write_text(OPERATIONS)


def test_what_was_made_before_a_kill_is_found(place: Path, home: Path, whole: Any) -> None:
    spec, store, made_now = spec_of(place, shards=5), Store(home), []

    def dies(refs: Any, work: datashards.ShardWork) -> None:
        datashards.in_turn(refs[1:4], work)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(spec, store, dies)
    assert not store.path("tokenize", whole[None][0]).exists()

    def counts(refs: Any, work: datashards.ShardWork) -> None:
        for ref in refs:
            path = store.path(ref.stage, ref.key)
            before = path.stat().st_ino if path.exists() else None
            datashards.build(ref, work)
            made_now.append(path.stat().st_ino != before)

    (bad,) = list((home / "store" / "shard").glob("*/train.arrow"))[:1]
    bad.write_bytes(bad.read_bytes()[:-1])
    assert contents(made(spec, store, counts)) == contents(whole[None][1])
    assert made_now.count(True) == 3, "the first, the last, and the damaged one"


def test_shards_that_nobody_went_on_with_are_removed(place: Path, home: Path) -> None:
    store = Store(home)

    def killed(refs: Any, work: datashards.ShardWork) -> None:
        datashards.in_turn(refs, work)
        raise KeyboardInterrupt

    def left(**data: Any) -> set[Path]:
        before = set((home / "store" / "shard").glob("*"))
        with pytest.raises(KeyboardInterrupt):
            made(spec_of(place, **{"shards": 2} | data), store, killed)
        return set((home / "store" / "shard").glob("*")) - before

    old, running, new = left(seq_len=32), left(seq_len=40), left(seq_len=48)
    left(shards=3)  # of the stage that is made below with two
    for shard in old | running:
        os.utime(shard / "manifest.json", (time.time() - 90_000,) * 2)
    key = stageline.resolve(spec_of(place, seq_len=40), store).need("tokenize").key
    half, living = (home / f"store/shard/.tmp-{shard * 64}-0123456789ab" for shard in "de")
    half.mkdir(), living.mkdir()
    with locked(store.lock("tokenize", key).path), locked(store.lock("shard", "e" * 64).path):
        made(spec_of(place, shards=2), store)
    assert len(old) == 2 and set((home / "store/shard").iterdir()) == running | new | {living}


@pytest.mark.parametrize("shards", [1, 3])
def test_errors_are_those_of_the_whole(place: Path, home: Path, shards: int) -> None:
    bad = r"45 of 4,300 rows .* 45 x column 'text' is null, at row 5, row 102, row 199, \.\.\."
    for data, message in [
        ({"max_bad_fraction": 0.01}, bad),
        ({"seq_len": 8, "overlong": "error"}, r"row \d+ has \d+ tokens, data.seq_len is 8"),
    ]:
        with pytest.raises(DataError, match=message):
            made(spec_of(place, shards=shards, **data), Store(home))


def test_a_worker_that_does_not_see_the_rows_says_so(place: Path, home: Path) -> None:
    spec, store = spec_of(place, shards=2), Store(home)

    def elsewhere(refs: Any, work: datashards.ShardWork) -> None:
        (work.source / "data.arrow").rename(work.source / "gone")
        datashards.in_turn(refs, work)

    with pytest.raises(
        Exception, match="there is no .*data.arrow here: the workers of .* must see"
    ):
        made(spec, store, elsewhere)


def test_a_shard_is_known_by_its_rows(place: Path, home: Path) -> None:
    ref = stageline.resolve(spec_of(place), Store(home)).need("tokenize")
    two, four = datashards.divide(ref, 4000, 2), datashards.divide(ref, 4000, 4)
    assert [r.inputs["rows"] for r in two] == [[0, 2000], [2000, 4000]]
    assert [r.inputs["rows"] for r in four] == [[n, n + 1000] for n in range(0, 4000, 1000)]
    assert len({r.key for r in (*two, *four)}) == 6
    assert two[0].key == datashards.divide(ref, 2000, 1)[0].key
