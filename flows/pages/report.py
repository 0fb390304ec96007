"""The live report of a training: a picture of its losses, its newest samples, where things are.

`markdown` is a pure function of what `History` has read and of what the run directory says. It
gives at most MAX_BYTES, since each part of it has a bound of its own.
"""

import hashlib
import math
import re
import statistics
import time
from typing import Any

from ditty.runs import curves
from ditty.runs.curves import CURVES, Curve
from ditty.runs.rundir import RunDir
from ditty.runs.tail import RecordTail
from ditty.runs.timeleft import RECENT_STEPS, duration, seconds_left
from flows.pages.datareport import data_section
from flows.pages.markup import LONGEST_LINE, clean, code, embedded, escape, fenced, shorten, table

MAX_BYTES = 200_000
MAX_SAMPLES = 4


class History:
    """What a run has appended to metrics.jsonl and samples.jsonl, read once each.

    It keeps 48 bytes a step, and the newest samples, shortened.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self.total = 0
        self.train, self.evaluated = Curve(CURVES), Curve(["loss"])
        self.samples: list[dict[str, Any]] = []
        self._metrics, self._samples = RecordTail(run.metrics_file), RecordTail(run.samples_file)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.train.steps[-1] if self.train.steps else 0

    def read(self) -> bool:
        """Take what is new; returns whether there was anything."""
        new = False
        for record in self._metrics.read():
            new = True
            if record.get("kind") == "train":
                self.total = int(record.get("total_steps", 0))
                self.evaluated.rewind(record["step"])
                self.train.add(record["step"], record)
            elif record.get("kind") == "eval":
                self.evaluated.add(record["step"], record)
        for record in self._samples.read():
            new = True
            if self.samples and self.samples[0]["step"] != record["step"]:
                self.samples = []
            if len(self.samples) < MAX_SAMPLES:
                texts = {k: shorten(str(v)) for k, v in record.items() if isinstance(v, str)}
                self.samples.append({"step": record["step"], **texts})
        return new


def markdown(
    history: History,
    data: dict[str, dict[str, Any]],
    state: str = "training",
    upload_url: str | None = None,
) -> str:
    """The report, at most MAX_BYTES of UTF-8.

    Args:
        data: facts by stage, see `datareport.data_facts`.
        state: what the run is doing, or how it ended.
        upload_url: where checkpoints and the result are copied to.
    """
    run = history.run
    sections = [
        _heading(history, state),
        _picture_section(history),
        _numbers_section(history),
        _samples_section(history.samples),
        _data_section(history.run.root.name, data),
        _places_section(run, upload_url),
        "## Resume\n\n"
        "The same name resumes from the newest checkpoint: run the same spec again "
        f"(`ditty run SPEC.yaml`; the first run's is {code(str(run.spec_file))}), or press Retry "
        "on this page if a deployment started it.",
    ]
    report = "\n\n".join(section for section in sections if section) + "\n"
    assert len(report.encode()) <= MAX_BYTES, f"a report of {len(report.encode())} bytes"
    return report


def _heading(history: History, state: str) -> str:
    step, total = history.step, history.total
    done = f"step {step:,} of {total:,}" if total else "no step yet"
    left = seconds_left(step, total, history.train["seconds"][-RECENT_STEPS:])
    time_left = f", about {duration(left)} left" if left and state == "training" else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    name = clean(history.run.root.name, LONGEST_LINE)
    words = escape(clean(state, LONGEST_LINE))
    return f"# {escape(name)}: {done}{time_left}\n\n{words} ({written})"


def _picture_section(history: History) -> str:
    if not history.train.steps:
        return ""
    image = curves.picture(history.train, history.evaluated)
    if image is None:
        return f"(No picture: it would have more than {curves.PICTURE_BYTES:,} bytes.)"
    return embedded("loss", image)


def _numbers_section(history: History) -> str:
    train, evaluated = history.train, history.evaluated
    held_out = evaluated.known("loss")
    memory = train.known("memory_bytes")
    recent = [s for s in train["tokens_per_second"][-RECENT_STEPS:] if not math.isnan(s)]
    rows = {
        "loss": _format(train.last("loss"), ".4f"),
        "held-out loss, first": _format(held_out[0] if held_out else None, ".4f"),
        "held-out loss, newest": _format(evaluated.last("loss"), ".4f"),
        "held-out loss, best": _format(min(held_out, default=None), ".4f"),
        "learning rate": _format(train.last("learning_rate"), ".3g"),
        "tokens a second": _format(statistics.median(recent) if recent else None, ",.0f"),
        "peak memory of a process": _format(max(memory) / 2**30 if memory else None, ".2f", "GiB"),
    }
    return table({name: value for name, value in rows.items() if value})


def _format(value: float | None, how: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{how}} {unit}".rstrip()


def _samples_section(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    parts = [f"## Samples of held-out rows at step {samples[0]['step']:,}"]
    for number, sample in enumerate(samples, 1):
        texts = [(k, sample[k]) for k in ("prompt", "completion", "reference") if k in sample]
        parts += [f"**{number}, {name}**\n\n{fenced(text)}" for name, text in texts]
    return "\n\n".join(parts)


def _data_section(name: str, data: dict[str, dict[str, Any]]) -> str:
    section = data_section(data)
    link = f"[what became of the rows](/v2/artifacts/key/{artifact_key('data', name)})"
    return f"{section}\n\n{link}" if section else ""


def _places_section(run: RunDir, upload_url: str | None) -> str:
    steps = run.committed_steps()
    newest = ", ".join(f"{s:,}" for s in steps[-10:]) or "none yet"
    lines = [
        f"- here: {code(str(run.checkpoints))}, steps: {newest}",
        f"- all of the run, with logs: {code(str(run.root))}",
    ]
    if upload_url:
        lines.append(f"- copied to: {code(f'{upload_url}/{run.root.name}')}")
    lines.append(f"- {lineage_link(run.root.name)}, written at the end")
    return "## Checkpoints\n\n" + "\n".join(lines)


def lineage_link(name: str) -> str:
    """To the newest lineage of the run `name`, in Prefect's UI."""
    return f"[what the result is made of](/v2/artifacts/key/{artifact_key('lineage', name)})"


def artifact_key(kind: str, name: str) -> str:
    """Prefect's key for what a run named `name` shows: lowercase letters, digits and dashes.

    Other names are changed and get a hash after two dashes, which no unchanged one holds: two
    names never share a key.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) and "--" not in name:
        return f"{kind}-{name}"
    changed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{kind}-{changed}--{hashlib.sha256(name.encode()).hexdigest()[:10]}"
