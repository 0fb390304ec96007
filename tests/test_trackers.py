"""Trackers: what they were told, read back by their own readers, after a run that failed once."""

import json
import logging
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from datasets import Dataset

from ditty import Data, Hooks, Pipeline
from ditty.config.choices import Tracker
from ditty.config.specfile import parse_spec
from ditty.errors import RunError, SpecError
from ditty.planning import preflight
from ditty.runs.curves import DPI, INCHES
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import Store
from ditty.training.trackers import Reports, reporting
from ditty.training.trainer import Place
from tests.tiny import make_model_folder


class Tracked(Pipeline):
    """Fails once after step 5; its newest checkpoint is then that of step 4."""

    def dataset(self):
        rows = [{"text": f"{'word ' * (i % 5)}number {i}"} for i in range(20)]
        data = Data(
            dataset=Dataset.from_list(rows), tokenizer=self.tokenizer, batch_size=2, cache=False
        )
        return data.prepare([("map", lambda row: dict(self.tokenizer(row["text"])), {})])

    def hooks(self):
        marker = self.output_dir / "failed"

        def fail_once(record):
            if record["step"] == 5 and not marker.exists():
                marker.touch()
                raise ValueError("once")

        return Hooks(on_step=fail_once)


def train_twice(tmp_path: Path, tracker: str) -> RunDir:
    """A run that fails after step 5, and goes on from step 4 to step 6."""
    folder = make_model_folder(tmp_path / "model")
    options = {"report_to": [tracker], "max_steps": 6, "save_steps": 2, "precision": "fp32"}

    def again():
        out = str(tmp_path / "out")
        return Tracked(str(folder), out, batch_size=2, grad_accum=1, **options).run()

    with pytest.raises(RunError, match="once"):
        again()
    assert again().finished
    return RunDir(tmp_path / "out")


def test_tensorboard_has_each_step_once_the_spec_the_lineage_and_the_picture(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_twice(tmp_path, "tensorboard")
    (folder,) = (run.root / "trackers/tensorboard").iterdir()
    assert len(list(folder.iterdir())) == 2, "one file a start, both of one run"
    read = EventAccumulator(str(folder)).Reload()
    records = [r for r in run.metrics() if r["kind"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        told = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert told == [(r["step"], float(np.float32(r[name]))) for r in records]

    def text(name):
        event = read.Tensors(f"{name}/text_summary")[-1]
        return json.loads(textwrap.dedent(event.tensor_proto.string_val[0].decode()))

    assert text("spec")["train"]["max_steps"] == 6
    made_from = text("lineage")
    assert made_from["counts"]["step"] == 6 and made_from["where"] == str(run.root / "final")
    (image,) = read.Images("losses")
    assert (image.width, image.height) == tuple(round(side * DPI) for side in INCHES)


class Away:
    """A tracker whose server is gone."""

    name = "mlflow"

    def log(self, values, step=None):
        raise ConnectionError("nobody at http://me:hunter2@host")


def test_a_tracker_that_does_not_answer_is_named_and_stops_nothing(tmp_path, caplog):
    seen = []
    hooks = Reports([Away()], RunDir(tmp_path)).hooks(Hooks(on_step=seen.append))
    with caplog.at_level(logging.WARNING, "ditty.training.trackers"):
        hooks.call("on_step", {"step": 1, "loss": 2.0})
    assert "the tracker mlflow: ConnectionError: nobody at http://***@host" in caplog.text
    assert seen == [{"step": 1, "loss": 2.0}], "the callback of the user's is called all the same"


def test_what_a_callback_raises_is_told_once_beside_a_tracker(tmp_path):
    def of_the_user(record):
        raise KeyError("nothing there")

    hooks = Reports([Away()], RunDir(tmp_path)).hooks(Hooks(on_step=of_the_user))
    with pytest.raises(RunError, match=r"^the callback on_step \(.*of_the_user\) raised") as caught:
        hooks.call("on_step", {"step": 1, "loss": 2.0})
    assert str(caught.value).count("raised") == 1


def test_a_lineage_or_a_picture_that_cannot_be_made_ends_no_training(tmp_path, caplog):
    run = RunDir(tmp_path / "run")
    run.metrics_file.parent.mkdir()
    run.metrics_file.write_text('{"kind": "train"}\n')  # which step?
    with caplog.at_level(logging.WARNING, "ditty.training.trackers"):
        Reports([Away()], run).result(tmp_path / "nothing", Store(tmp_path))
    assert caplog.text.count("the tracker mlflow") == 2
    assert "KeyError: 'step'" in caplog.text and f"{tmp_path}/nothing" in caplog.text


def test_a_tracker_that_is_gone_is_told_nothing_after_its_third_failure_in_a_row(tmp_path, caplog):
    class Gone(Away):
        asked = []

        def log(self, values, step=None):
            self.asked.append(step)
            if step != 3:
                super().log(values, step)

    reports = Reports([Gone()], RunDir(tmp_path))
    with caplog.at_level(logging.WARNING, "ditty.training.trackers"):
        for step in range(1, 10):
            reports.tell("train", {"step": step, "loss": 2.0})
    assert Gone.asked == [1, 2, 3, 4, 5, 6], "the answer to the third one counts"
    assert caplog.text.count("3 times in a row: it is told nothing more") == 1


def test_a_tracker_that_does_not_start_ends_the_run_before_its_first_step(tmp_path, monkeypatch):
    def start(self):
        raise PermissionError("no key canary-of-wandb-0123 at http://me:hunter2@host")

    monkeypatch.setenv("WANDB_API_KEY", "canary-of-wandb-0123")
    monkeypatch.setattr(TensorBoardTracker, "start", start)
    message = r"tensorboard does not start: PermissionError: no key \*\*\* at http://\*\*\*@host"
    with (
        pytest.raises(RunError, match=message),
        reporting(spec_of("tensorboard"), Place(RunDir(tmp_path))),
    ):
        raise AssertionError("not reached")


def spec_of(*trackers):
    values = {
        "name": "x",
        "data": {"source": "rows.jsonl"},
        "model": {"base_model": "org/name"},
        "train": {"report_to": list(trackers)},
    }
    return parse_spec(values)


def test_a_missing_package_names_the_extra_and_wandb_asks_how_to_log_in(monkeypatch):
    preflight.check_trackers([Tracker.TENSORBOARD], [])
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    message = (
        "^train.report_to: mlflow needs the package mlflow, which is not installed: "
        "pip install 'mlflow>=3,<4' into /.*, or remove mlflow from train.report_to$"
    )
    with pytest.raises(SpecError, match=message):
        preflight.check_trackers([Tracker.MLFLOW], [])
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SpecError, match="WANDB_API_KEY .* or WANDB_MODE=offline"):
        preflight.check_trackers([Tracker.WANDB], ["WANDB_PROJECT"])
    preflight.check_trackers([Tracker.WANDB], ["WANDB_MODE"])


def test_the_preflight_asks_for_what_the_training_will_have(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", "not a key")  # but not named in launch.environment
    with pytest.raises(SpecError, match="launch.environment"):
        preflight.check(spec_of("wandb"), Store())
    preflight.check_trackers([Tracker.MLFLOW], [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(SpecError, match="would not get MLFLOW_TRACKING_URI, which is set here"):
        preflight.check_trackers([Tracker.MLFLOW], ["MLFLOW_EXPERIMENT_NAME"])
    preflight.check_trackers([Tracker.MLFLOW], ["MLFLOW_TRACKING_URI"])


def test_every_tracker_has_an_extra():
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    assert all(extras[tracker.value][0].startswith(tracker.value) for tracker in Tracker)


def in_a_process(tmp_path, tracker, read):
    """What `read` prints as JSON after `train_twice`: these trackers start threads and servers."""
    train = f"train_twice(Path({str(tmp_path)!r}), {tracker!r})"
    code = f"from tests.test_trackers import *\nrun = {train}\n"
    done = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(read)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith('{"read"')))["read"]


@pytest.mark.slow
def test_trackio_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    runs, logs, config = in_a_process(
        tmp_path,
        "trackio",
        """
        from trackio.sqlite_storage import SQLiteStorage as storage
        runs = storage.get_runs("ditty")
        told = storage.get_logs("ditty", runs[0]), storage.get_run_config("ditty", runs[0])
        print(json.dumps({"read": [runs, *told]}))
        """,
    )
    assert len(runs) == 1
    steps = [record for record in logs if "train/loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 5, 6], "5 was taken twice"
    metrics = {r["step"]: r["loss"] for r in RunDir(tmp_path / "out").metrics() if "loss" in r}
    assert all(record["train/loss"] == metrics[record["step"]] for record in steps)
    assert any("losses" in record for record in logs), "the picture"
    assert config["train.max_steps"] == 6
    (made_from,) = [json.loads(record["lineage"]) for record in logs if "lineage" in record]
    assert made_from["counts"]["step"] == 6


@pytest.mark.slow
def test_mlflow_goes_on_with_the_same_run(tmp_path):
    pytest.importorskip("mlflow")
    runs, losses, params, files = in_a_process(
        tmp_path,
        "mlflow",
        """
        import mlflow
        mlflow.set_tracking_uri(f"sqlite:///{run.root}/trackers/mlflow/mlflow.db")
        client = mlflow.MlflowClient()
        runs = mlflow.search_runs(experiment_names=["ditty"], output_format="list")
        key = runs[0].info.run_id
        losses = [(m.step, m.value) for m in client.get_metric_history(key, "train/loss")]
        files = [file.path for file in client.list_artifacts(key)]
        print(json.dumps({"read": [len(runs), losses, runs[0].data.params, files]}))
        """,
    )
    assert runs == 1
    metrics = {r["step"]: r["loss"] for r in RunDir(tmp_path / "out").metrics() if "loss" in r}
    assert dict(losses) == metrics and [step for step, _ in losses] == [1, 2, 3, 4, 5, 5, 6]
    assert params["train.max_steps"] == "6"
    assert sorted(files) == ["lineage.json", "losses.png"]


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = in_a_process(
        tmp_path,
        "wandb",
        """
        made = (run.root / "trackers/wandb/wandb").glob("offline-run-*")
        print(json.dumps({"read": [path.name.split("-", 3)[-1] for path in made]}))
        """,
    )
    assert len(names) == 2 and len(set(names)) == 1, "two files of one run, for `wandb sync`"
