"""Two runs beside each other: their numbers, what their specs differ in, and what they wrote.

Read from the run directories alone; the runs may be under way.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ditty.config.specfile import flat
from ditty.errors import RunError
from ditty.runs.rundir import RunDir
from ditty.runs.status import find_run
from ditty.store.artifacts import Store
from ditty.store.files import read_json

Value = float | int | str | None
ONLY_ONE = "-"
"""Stands for a key that the other spec has not."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, and what each run made of it at its newest such step."""

    prompt: str
    reference: str
    completions: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """Of two runs, each pair in their order.

    Attributes:
        numbers: name -> values; None: not known (yet).
        spec: key -> values, of the keys in which they differ; the name is none.
        samples: of the prompts that both have completed.
    """

    names: tuple[str, str]
    numbers: dict[str, tuple[Value, Value]]
    spec: dict[str, tuple[Any, Any]]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        samples = [vars(sample) for sample in self.samples]
        return {**vars(self), "samples": samples}


def compare(one: str, two: str, store: Store) -> Comparison:
    """Compare two runs of a store.

    Raises:
        RunError: there is no such run, or it was never started.
    """
    runs = [find_run(store, name) for name in (one, two)]
    numbers = [_numbers(list(run.metrics())) for run in runs]
    specs = [_spec(run) for run in runs]
    keys = [key for key in {**specs[0], **specs[1]} if key != "name"]
    pairs = {key: (specs[0].get(key, ONLY_ONE), specs[1].get(key, ONLY_ONE)) for key in keys}
    return Comparison(
        (one, two),
        {name: (numbers[0][name], numbers[1][name]) for name in numbers[0]},
        {key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
        tuple(_samples(*(_newest(run.samples()) for run in runs))),
    )


def _spec(run: RunDir) -> dict[str, Any]:
    spec = read_json(run.spec_file)
    if spec is None:
        raise RunError(
            f"run {run.root.name} was never started (there is no {run.spec_file}): run its spec, "
            "then compare"
        )
    return flat(spec)


def _numbers(records: list[dict[str, Any]]) -> dict[str, Value]:
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r["loss"] for r in records if r["kind"] == "eval"]
    last = train[-1] if train else {}
    speeds = [r["tokens_per_second"] for r in train]
    memory = max((r["memory_bytes"] for r in train), default=None)
    return {
        "steps": last.get("step", 0),
        "of": last.get("total_steps"),
        "loss, last step": last.get("loss"),
        "held-out loss, first": held_out[0] if held_out else None,
        "held-out loss, last": held_out[-1] if held_out else None,
        "held-out loss, best": min(held_out, default=None),
        "tokens": sum(r["tokens"] for r in train),
        "supervised tokens": sum(r["supervised_tokens"] for r in train),
        "seconds": sum(r["seconds"] for r in train),
        "tokens a second": statistics.median(speeds) if speeds else None,
        "memory, GB": None if memory is None else memory / 1e9,
    }


def _newest(samples: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Prompt -> the sample of the highest step."""
    return {sample["prompt"]: sample for sample in samples}  # they come in the order of steps


def _samples(
    one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]
) -> Iterable[Sample]:
    for prompt, first in one.items():
        if prompt in two:
            texts = (first["completion"], two[prompt]["completion"])
            yield Sample(prompt, first["reference"], texts)
