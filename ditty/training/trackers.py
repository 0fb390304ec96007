"""A training's numbers, spec, lineage and picture for the trackers of `train.report_to`.

The trackers are accelerate's. What they are told stands in the run directory anyway, so one that
does not answer is named in the log, and the training goes on: it waits some seconds for the answer,
and after three failures in a row that tracker is told nothing more. A resume goes on with the same
run of the tracker: it is known by the hash of the training's identity.
"""

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ditty.config.choices import Tracker
from ditty.config.spec import RunSpec
from ditty.config.specfile import flat
from ditty.errors import RunError, scrub
from ditty.results.lineage import lineage
from ditty.runs.curves import CURVES, Curve, picture
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import Store
from ditty.store.files import canonical_json, make_dir, sha256_bytes
from ditty.training.hooks import Hooks, Record
from ditty.training.trainer import Place

log = logging.getLogger(__name__)

PROJECT = "ditty"
UNTOLD = ("kind", "step", "time", "total_steps")  # of a record: not numbers of their own
PATIENCE = 3  # failures in a row, after which a tracker is told nothing more
# By itself MLflow waits for minutes, within a step, and a step that long counts as hung. Seconds.
MLFLOW_WAITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


class Reports:
    """What a training tells its trackers; without trackers, nothing."""

    def __init__(self, trackers: list[Any], run: RunDir):
        self.trackers, self.run = trackers, run
        self._failures: Counter[str] = Counter()  # in a row, by the tracker's name

    def hooks(self, hooks: Hooks) -> Hooks:
        """`hooks`, which tell the trackers of each step and evaluation too."""
        if not self.trackers:
            return hooks

        def and_tell(callback: str, group: str) -> Callable[[Record], None]:
            def call(record: Record) -> None:
                self.tell(group, record)
                hooks.call(callback, record)

            return call

        return replace(
            hooks,
            on_step=and_tell("on_step", "train"),
            on_evaluate=and_tell("on_evaluate", "eval"),
        )

    def tell(self, group: str, record: Record) -> None:
        """The numbers of a record of metrics.jsonl, each as `group/name`."""
        values = {f"{group}/{k}": v for k, v in record.items() if k not in UNTOLD}
        self._each(lambda tracker: tracker.log(values, step=record["step"]))

    def result(self, path: Path, store: Store) -> None:
        """What the committed result at `path` was made from, and the picture of its training."""

        def made_from(tracker: Any) -> None:
            text = json.dumps(lineage(str(path), store).to_json(), indent=2)
            _tell_text(tracker, "lineage", text)

        def losses(tracker: Any) -> None:
            image = _picture(self.run)
            if image is not None:
                _tell_picture(tracker, "losses", image)

        self._each(made_from)
        self._each(losses)

    def finish(self) -> None:
        """Nothing more comes: those that were given up hear of it too."""
        self._failures.clear()
        self._each(lambda tracker: tracker.finish())

    def _each(self, tell: Callable[[Any], object]) -> None:
        """`tell` each tracker that answers something."""
        for tracker in self.trackers:
            if self._failures[tracker.name] >= PATIENCE:
                continue
            try:
                tell(tracker)
                self._failures[tracker.name] = 0
            except Exception as error:  # the tracker's own, of any kind; metrics.jsonl has it all
                self._failures[tracker.name] += 1
                last = self._failures[tracker.name] == PATIENCE
                log.warning(
                    "the tracker %s: %s: %s%s",
                    tracker.name,
                    type(error).__name__,
                    scrub(str(error)),
                    f" ({PATIENCE} times in a row: it is told nothing more)" if last else "",
                )


@contextmanager
def reporting(spec: RunSpec, place: Place) -> Iterator[Reports]:
    """Within the block the trackers of `spec` listen, those of rank 0.

    Raises:
        RunError: one cannot be started.
    """
    kinds = spec.train.report_to if place.world.main else []
    reports = Reports([], place.run)
    try:
        for kind in kinds:
            try:
                reports.trackers.append(_start(kind, spec, place))
            except Exception as error:  # the trackers' own, of any kind
                raise RunError(
                    f"train.report_to: {kind} does not start: {type(error).__name__}: "
                    f"{scrub(str(error))}. "
                    "Correct its settings (launch.environment names the variables that it gets), "
                    "or remove it"
                ) from None  # its own words may have a password in them
        yield reports
    finally:
        reports.finish()


def _start(kind: Tracker, spec: RunSpec, place: Place) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    key = sha256_bytes(canonical_json([spec.name, place.identity]))[:16]
    folder = make_dir(place.run.root / "trackers" / kind)
    arguments, options = _options(kind, f"{spec.name}-{key}", folder, place.run)
    tracker = LOGGER_TYPE_TO_CLASS[kind.value](*arguments, **options)
    tracker.start()
    _tell_spec(tracker, spec)
    return tracker


def _options(
    kind: Tracker, name: str, folder: Path, run: RunDir
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of the tracker's class: a run `name`, gone on with where it is there."""
    if kind is Tracker.TENSORBOARD:
        # Steps that were taken after the checkpoint from which this goes on are taken again.
        return [name, folder], {"purge_step": run.newest_step() + 1}
    if kind is Tracker.WANDB:
        options = {"name": name, "id": name, "resume": "allow", "dir": str(folder)}
        return [os.environ.get("WANDB_PROJECT", PROJECT)], options
    if kind is Tracker.TRACKIO:
        return [PROJECT], {"name": name, "resume": "allow", "embed": False, "auto_log_cpu": False}
    for variable, value in MLFLOW_WAITS.items():
        os.environ.setdefault(variable, value)
    run_id = _mlflow_run(name, folder)
    return [PROJECT], {"run_name": name, "run_id": run_id, "logging_dir": folder.as_uri()}


def _mlflow_run(name: str, folder: Path) -> str | None:
    """The id of MLflow's newest run of that name; without a server of the user's, in `folder`."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    found = mlflow.search_runs(
        experiment_names=[PROJECT],
        filter_string=f"tags.`mlflow.runName` = '{name}'",
        output_format="list",
        max_results=1,
    )
    return str(found[0].info.run_id) if found else None


def _tell_spec(tracker: Any, spec: RunSpec) -> None:
    values = spec.model_dump(mode="json")
    if tracker.name == Tracker.TENSORBOARD:  # its own way makes one more run at each start
        tracker.log({"spec": _block(json.dumps(values, indent=2))}, step=0)
    else:
        tracker.store_init_configuration({k: _plain(v) for k, v in flat(values).items()})


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _tell_text(tracker: Any, name: str, text: str) -> None:
    if tracker.name == Tracker.TENSORBOARD:
        tracker.log({name: _block(text)}, step=0)
    elif tracker.name == Tracker.MLFLOW:
        import mlflow

        mlflow.log_text(text, f"{name}.json")
    elif tracker.name == Tracker.TRACKIO:
        tracker.log({name: text})
    else:
        tracker.store_init_configuration({name: text})


def _block(text: str) -> str:
    """Verbatim, in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _picture(run: RunDir) -> Any:
    """The curves of the run's metrics, uint8 [height, width, 3]."""
    import numpy as np
    from matplotlib.image import imread

    train, evaluated = Curve(CURVES), Curve(["loss"])
    for record in run.metrics():
        curve = {"train": train, "eval": evaluated}.get(record["kind"])
        if curve is not None:
            curve.add(record["step"], record)
    image = picture(train, evaluated)
    if image is None:
        return None
    return np.rint(imread(io.BytesIO(image))[..., :3] * 255).astype(np.uint8)


def _tell_picture(tracker: Any, name: str, image: Any) -> None:
    if tracker.name == Tracker.TENSORBOARD:
        tracker.log_images({name: image[None]}, dataformats="NHWC")
    elif tracker.name == Tracker.WANDB:
        tracker.log_images({name: [image]})
    elif tracker.name == Tracker.TRACKIO:
        import trackio

        tracker.log({name: trackio.Image(image)})
    else:
        import mlflow

        mlflow.log_image(image, f"{name}.png")
