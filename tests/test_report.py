"""The report of a training and the table of stages: bounded, and read back from the API."""

import base64
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ditty.config.spec import RunSpec
from ditty.errors import OutOfMemory, RunError
from ditty.runs.curves import thin
from ditty.runs.rundir import Result, RunDir, Status, append_record
from ditty.runs.timeleft import duration
from ditty.stages.stageline import StageRef
from ditty.store.artifacts import MADE_BY, Store, commit_dir
from flows import tasks, training
from flows.events import EventState
from flows.pages import publish
from flows.pages.costs import StageBook
from flows.pages.datareport import data_facts
from flows.pages.markup import code, escape, fenced, shorten
from flows.pages.publish import publish_stages, within
from flows.pages.report import MAX_BYTES, History, artifact_key, markdown
from flows.training import Work


@pytest.fixture
def run(home: Path) -> RunDir:
    found = RunDir.named("demo", home)
    found.root.mkdir(parents=True)
    return found


def train_record(step: int, loss: float = 1.5, total: int = 10) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "total_steps": total,
        "loss": loss,
        "learning_rate": 1e-4,
        "tokens_per_second": 1234.5,
        "memory_bytes": 3 * 2**30,
        "seconds": 30.0,
    }


def image_of(report: str) -> Image.Image:
    """The decoded picture of a report."""
    (data,) = re.findall(r"!\[loss\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", report)
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    return image


def colored(image: Image.Image, color: tuple[int, int, int]) -> int:
    """Pixels of exactly this color."""
    counts = image.convert("RGB").getcolors(image.width * image.height)
    assert counts is not None
    return {c: n for n, c in counts}.get(color, 0)


BLUE, RED = (31, 119, 180), (214, 39, 40)  # matplotlib's tab:blue and tab:red


def test_a_report_says_how_far_and_where(run: RunDir) -> None:
    for step in range(1, 5):
        append_record(run.metrics_file, train_record(step, loss=2.0 / step))
    for step, loss in ((0, 3.25), (4, 1.75)):
        append_record(run.metrics_file, {"kind": "eval", "step": step, "loss": loss})
    with commit_dir(run.checkpoint(4), {"step": 4}) as out:
        (out / "weights").write_text("4")
    history = History(run)
    assert history.read() and not history.read()
    report = markdown(history, {}, upload_url="s3://bucket/prefix")
    assert report.startswith("# demo: step 4 of 10, about 3 min left\n\ntraining (")
    for part in (
        "| loss | 0.5000 |",
        "| held-out loss, first | 3.2500 |",
        "| held-out loss, newest | 1.7500 |",
        "| peak memory of a process | 3.00 GiB |",
        f"here: `{run.checkpoints}`, steps: 4",
        "copied to: `s3://bucket/prefix/demo`",
        "`ditty run SPEC.yaml`",
    ):
        assert part in report
    image = image_of(report)
    assert image.size == (900, 600)
    assert colored(image, BLUE) > 100 and colored(image, RED) > 100


def test_a_curve_that_is_not_there_is_not_drawn(run: RunDir) -> None:
    append_record(run.metrics_file, train_record(1))
    append_record(run.metrics_file, train_record(2))
    history = History(run)
    history.read()
    without = colored(image_of(markdown(history, {})), RED)
    for step, loss in ((1, 2.5), (2, float("nan")), (3, float("inf"))):
        append_record(run.metrics_file, {"kind": "eval", "step": step, "loss": loss})
    history.read()
    report = markdown(history, {})
    assert colored(image_of(report), RED) > without
    assert "| held-out loss, best | 2.5000 |" in report and "inf" not in report


def test_a_resumed_run_takes_back_the_steps_after_its_checkpoint(run: RunDir) -> None:
    history = History(run)
    for step in (1, 2, 3, 4):
        append_record(run.metrics_file, train_record(step, loss=step))
    append_record(run.metrics_file, {"kind": "eval", "step": 2, "loss": 9.0})
    append_record(run.metrics_file, {"kind": "eval", "step": 4, "loss": 8.0})
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    history.read()
    append_record(run.metrics_file, train_record(3, loss=33))
    history.read()
    assert list(history.train.steps) == [1, 2, 3]
    assert list(history.train["loss"]) == [1, 2, 33]
    assert list(history.evaluated.steps) == [2]
    expected = {r["step"]: r["loss"] for r in run.metrics() if r["kind"] == "train"}
    assert expected == {1: 1, 2: 2, 3: 33, 4: 4}  # metrics.jsonl itself keeps what was taken back


def test_a_report_is_small_whatever_the_run(run: RunDir) -> None:
    noise = [((i * 2654435761) % 1000) / 100 for i in range(1000)]
    with run.metrics_file.open("w") as file:
        for step in range(1, 200_001):
            value = noise[step % 1000] * (1 + step % 7)
            file.write(
                f'{{"kind": "train", "step": {step}, "total_steps": 200000, "loss": {value}, '
                f'"learning_rate": {value}, "tokens_per_second": {value}, "seconds": 1}}\n'
            )
            if step % 10 == 0:
                file.write(f'{{"kind": "eval", "step": {step}, "loss": {10 - value}}}\n')
    for index in range(20):
        texts = dict.fromkeys(("prompt", "completion", "reference"), "🙂`" * 20_000)
        append_record(run.samples_file, {"step": 200_000, "index": index, **texts})
    facts = {"rows": 10**15, "dropped": {f"{i}" + "|🙂" * 5000: 10**15 for i in range(500)}}
    history = History(run)
    history.read()
    url, state = "s3://" + "🙂" * 5000, "ended with " + "*🙂" * 50_000
    report = markdown(history, {"tokenize": facts, "pack": facts}, state, url)
    assert len(report.encode()) <= MAX_BYTES
    assert image_of(report).size == (900, 600)
    assert "step 200,000 of 200,000" in report


def test_a_picture_that_is_too_large_is_left_out(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditty.runs.curves.PICTURE_BYTES", 100)
    append_record(run.metrics_file, train_record(1))
    history = History(run)
    history.read()
    assert "No picture: it would have more than 100 bytes" in markdown(history, {})


def test_thinning_takes_means_and_passes_over_gaps() -> None:
    nan = float("nan")
    steps, means = thin([1, 2, 3, 4, 5], [1.0, 3.0, nan, 5.0, 7.0], 3)
    assert list(steps) == [1.5, 3.5, 5] and list(means) == [2.0, 5.0, 7.0]
    assert list(thin([1, 2], [1.0, 3.0], 3)[1]) == [1.0, 3.0]


def test_samples_cannot_break_out_of_their_block(run: RunDir) -> None:
    evil = "```\n<script>x</script>\r\n![a](http://example.com/i.png)\x00 \ud800 日本　語"
    append_record(run.samples_file, {"step": 0, "index": 0, "prompt": "old", "completion": "old"})
    append_record(run.samples_file, {"step": 3, "index": 0, "prompt": evil, "completion": "fine"})
    history = History(run)
    history.read()
    report = markdown(history, {})
    assert "Samples of held-out rows at step 3" in report and "old" not in report
    block = report[report.index("````text\n") :]
    inside = block[len("````text\n") : block.index("\n````\n")]
    assert inside == evil.replace("\r\n", "\n").replace("\x00", "\ufffd").replace("\ud800", "?")
    assert fenced("a```` b") == "`````text\na```` b\n`````"
    assert code("a`b") == "`` a`b ``"
    assert escape("a_b|<c>") == r"a\_b\|\<c\>"
    assert len(shorten("x" * 10_000, 100)) <= 100


def test_the_data_report_comes_from_the_manifests(home: Path, run: RunDir) -> None:
    store = Store(home)
    tokens = {"rows": 1000, "train_rows": 900, "eval_rows": 50, "dropped": {"overlong": 3}}
    with store.commit("tokenize", "t" * 64, tokens) as out:
        (out / "x").touch()
    pack = {"inputs": {"tokens": "t" * 64}, "rows": 70, "fill_rate": 0.987}
    with store.commit("pack", "p" * 64, pack) as out:
        (out / "x").touch()
    facts = data_facts(store.path("pack", "p" * 64))
    told = {stage: {k: v for k, v in f.items() if k != MADE_BY} for stage, f in facts.items()}
    assert told == {"tokenize": tokens, "pack": pack}
    report = markdown(History(run), facts)
    for row in (
        "| rows | 1,000 |",
        "| rows held out | 50 |",
        "| packed rows | 70 |",
        "| filled with tokens | 98.7% |",
        "| dropped: overlong | 3 |",
    ):
        assert row in report
    assert data_facts(store.path("pack", "gone")) == {}


def test_keys_are_legal_and_never_shared() -> None:
    names = ["a.b", "a-b", "a_b", "A-b", "a--b", "a-b-", "a.b.", "ä", "-", "..", "a" * 63]
    keys = [artifact_key("report", name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in keys)
    assert artifact_key("report", "a-b") == "report-a-b"
    changed = artifact_key("report", "a.b")
    assert artifact_key("report", changed.removeprefix("report-")) != changed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (45, "45 s"),
        (720, "12 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
        (3590 * 2, "2 h 0 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def stage(name: str, key: str = "a" * 64) -> StageRef:
    return StageRef(name, key, {}, name)


def test_what_a_stage_took_is_known_to_later_runs(home: Path) -> None:
    store, ref = Store(home), stage("load")
    book = StageBook(store)
    book.start(ref).end(EventState.FAILED)
    path = home / "costs" / f"load-{ref.key}.json"
    spent = json.loads(path.read_text())["spent"]
    assert book.cost(ref) is None
    timing = book.start(ref)
    with store.commit("load", ref.key, {}) as out:
        (out / "rows").write_text("rows")
    timing.end(EventState.DONE)
    seconds = [entry.seconds for entry in book.entries]
    assert seconds[0] == spent
    assert StageBook(store).cost(ref) == pytest.approx(sum(seconds))

    path.write_text('{"seconds": 120.0}')
    later = StageBook(store)
    later.start(ref).end(EventState.DONE)  # there, but not recorded: finding it is not making it
    later.start(ref).end(EventState.CACHED)
    later.skip(stage("fetch"))
    assert [e.saved for e in later.entries] == [None, 120.0, None]
    assert later.summary().endswith("; the cache saved 120.0 s")
    path.write_text("half a fi")
    assert StageBook(store).cost(ref) is None


def artifacts(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        only = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        return list(client.read_artifacts(artifact_filter=only))


class Training:
    """A train task whose process is a function of the test."""

    def __init__(self, home: Path, name: str, monkeypatch: pytest.MonkeyPatch):
        values = {"name": name, "data": {"source": "x:y"}, "model": {"base_model": "m"}}
        launch = {"retries": 1, "retry_delay_seconds": 0, "device": "cpu"}
        self.spec = RunSpec.model_validate({**values, "launch": launch})
        self.store = Store(home)
        self.run = RunDir.named(name, home)
        self.call = tasks.Caller.of(self.spec, self.store)
        self.acts: list[Any] = []
        monkeypatch.setattr(training.launch, "run_stage", self.run_stage)
        monkeypatch.setattr(training, "REPORT_SECONDS", 0.1)
        monkeypatch.setattr(publish, "EVERY_SECONDS", 0.1)
        monkeypatch.setattr(publish, "SHARE", 1.0)

    def run_stage(self, *args: Any, check: Any, **options: Any) -> Result:
        result: Result = self.acts.pop(0)(check)
        if result.status is Status.OK:
            with self.store.commit("train", "a" * 64, {"steps": result.step}) as out:
                (out / "adapter").write_text("weights")
        return result

    def go(self, *acts: Any) -> str:
        """Run a flow; returns its id."""
        self.acts = list(acts)

        @flow
        def trains() -> Any:
            work = Work(self.spec, self.store, Path("/model"), Path("/data"))
            try:
                self.call.cached(tasks.train, stage("train"), work)
            except RunError:
                pass
            finally:
                publish_stages(self.call.book, self.spec.name)
            return str(flow_run.id)

        return str(trains())


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_the_report_is_updated_in_place_up_to_the_end(
    prefect_api: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Training(home, "my.run_1", monkeypatch)
    key = artifact_key("report", "my.run_1")
    metrics = trained.run.metrics_file

    def preempted(check: Any) -> Result:
        append_record(metrics, train_record(4))
        check()
        wait_for(lambda: artifacts(key))
        assert artifacts(key)[0].data.startswith("# my.run\\_1: step 4 of 10, about 3 min left")
        append_record(metrics, train_record(5))
        check()
        wait_for(lambda: "step 5 of 10" in artifacts(key)[0].data)
        return Result(Status.PREEMPTED, 5, "Preempted", "saved step 5", retryable=True)

    def finished(check: Any) -> Result:
        assert "ended with Preempted: saved step 5" in artifacts(key)[0].data
        append_record(metrics, train_record(10))
        return Result(Status.OK, 10)

    run_id = trained.go(preempted, finished)
    (report,) = artifacts(key)  # of both attempts
    assert str(report.flow_run_id) == run_id and report.type == "markdown"
    assert report.data.startswith("# my.run\\_1: step 10 of 10\n\ndone (")
    assert image_of(report.data).size == (900, 600)
    progress = artifacts(artifact_key("train", "my.run_1"))
    assert {(a.data, a.description) for a in progress} == {
        (50.0, "step 5/10: loss 1.5000, 1,234 tokens/s, about 2 min left"),
        (100.0, "step 10/10: loss 1.5000, 1,234 tokens/s"),
    }

    again = Training(home, "my.run_1", monkeypatch)
    again.go()
    tables = artifacts(artifact_key("stages", "my.run_1"))
    states = [[(r["stage"], r["state"]) for r in json.loads(t.data)] for t in tables]
    assert sorted(states) == [[("train", "Cached")], [("train", "done")]]
    (hit,) = (r for t in tables for r in json.loads(t.data) if r["state"] == "Cached")
    assert hit["seconds saved by the cache"] > 0


def test_a_failure_is_the_last_word(
    prefect_api: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Training(home, "fails", monkeypatch)

    monkeypatch.setattr(publish, "EVERY_SECONDS", 1000.0)

    def fails(check: Any) -> Result:
        append_record(trained.run.metrics_file, train_record(1))
        wait_for(lambda: artifacts("report-fails"))
        append_record(trained.run.metrics_file, train_record(2))
        return Result(Status.FAILED, 0, OutOfMemory.__name__, "does not fit", retryable=False)

    trained.go(fails)
    (report,) = artifacts("report-fails")
    assert "step 2 of 10\n\nended with OutOfMemory: does not fit" in report.data
    (table,) = artifacts("stages-fails")
    ((row),) = json.loads(table.data)
    assert (row["stage"], row["state"]) == ("train", "failed")


def test_a_report_that_cannot_be_made_is_said_once_and_stops_nothing(
    run: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(run.metrics_file, train_record(1))
    append_record(run.metrics_file, train_record(2) | {"total_steps": "many"})
    report = publish.LiveReport(run, None, None, logging.getLogger("ditty"))
    published: list[str] = []
    monkeypatch.setattr(report, "_publish", published.append)
    with monkeypatch.context() as broken:
        broken.setattr(publish, "markdown", lambda *args: 1 / 0)
        report.refresh("training", last=True)
        report.refresh("training", last=True)
    (record,) = caplog.records
    assert "cannot be made: ValueError" in record.getMessage() and published == []
    append_record(run.metrics_file, train_record(3))
    report.refresh("done")
    assert published == [], "more often than every 30 s"
    report.refresh("done", last=True)
    assert published[0].startswith("# demo: step 3 of 10")


@pytest.mark.fault("prefect down")
def test_training_goes_on_without_an_api(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    figure: Callable[[str], None],
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(training, "LEAVING_SECONDS", 0.01)
    monkeypatch.setattr(publish, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(publish, "SHARE", 1.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/api"
        values = {"name": "demo", "data": {"source": "x:y"}, "model": {"base_model": "m"}}
        work = Work(RunSpec.model_validate(values), Store(run.root.parent.parent), Path("/model"))
        reporter = training.Reporter("train", work, run.new_attempt("train"), logging.getLogger())
        asked: list[str] = []
        publishes = reporter.report._publish

        def publish_it(text: str) -> None:
            asked.append(text)
            publishes(text)

        monkeypatch.setattr(reporter.report, "_publish", publish_it)
        settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(settings), reporter.in_background():
            append_record(run.metrics_file, train_record(1))
            reporter.check()
            wait_for(lambda: len(asked) >= 2)
            append_record(run.metrics_file, train_record(2))
            reporter.check()
        assert reporter.step == 2 and reporter.state == "done"
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    figure("never there: the reporter waits for nothing, steps lost 0")


def test_an_api_that_hangs_or_fails_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    never = threading.Event()
    within(0.05, never.wait)
    never.set()

    def away() -> None:
        raise ConnectionError("away")

    within(20, away)
    assert "ConnectionError('away')" in caplog.text
