"""`ditty compare`: what it says of two runs, against what their files hold."""

import json

import pytest
from typer.testing import CliRunner

from ditty.config.specfile import parse_spec
from ditty.errors import RunError
from ditty.results.compare import compare
from ditty.runs.rundir import RunDir, append_record
from ditty.store.artifacts import Store
from ditty.store.files import write_json
from flows.commands.cli import app


def make_run(home, name, losses, **train):
    values = {
        "name": name,
        "data": {"source": "rows.jsonl"},
        "model": {"base_model": "org/name"},
        "train": {"max_steps": len(losses), **train},
    }
    run = RunDir.named(name, home)
    run.root.mkdir(parents=True)
    write_json(run.spec_file, parse_spec(values).model_dump(mode="json"))
    for step, loss in enumerate(losses, 1):
        record = {"kind": "train", "step": step, "total_steps": len(losses), "loss": loss}
        rest = {"tokens": 10, "supervised_tokens": 5, "seconds": 0.5, "memory_bytes": 2e9 * step}
        append_record(run.metrics_file, record | rest | {"tokens_per_second": 20.0})
        append_record(run.metrics_file, {"kind": "eval", "step": step, "loss": loss + 1})
        sample = {"step": step, "index": 0, "prompt": "2 + 2 [is]", "reference": "4"}
        append_record(run.samples_file, sample | {"completion": f"{name} {step}"})
    return run


def test_numbers_spec_and_samples_of_two_runs(home):
    make_run(home, "one", [3.0, 1.0, 2.0], learning_rate=1e-3)
    two = make_run(home, "two", [5.0, 4.0], optimizer="lion")
    sample = {"step": 2, "index": 1, "prompt": "alone", "completion": "", "reference": ""}
    append_record(two.samples_file, sample)
    found = compare("one", "two", Store())
    assert found.spec == {
        "train.max_steps": (3, 2),
        "train.learning_rate": (1e-3, 2e-4),
        "train.optimizer": ("adamw", "lion"),
    }
    assert found.numbers == {
        "steps": (3, 2),
        "of": (3, 2),
        "loss, last step": (2.0, 4.0),
        "held-out loss, first": (4.0, 6.0),
        "held-out loss, last": (3.0, 5.0),
        "held-out loss, best": (2.0, 5.0),
        "tokens": (30, 20),
        "supervised tokens": (15, 10),
        "seconds": (1.5, 1.0),
        "tokens a second": (20.0, 20.0),
        "memory, GB": (6.0, 4.0),
    }
    (sample,) = found.samples
    assert (sample.prompt, sample.reference) == ("2 + 2 [is]", "4")
    assert sample.completions == ("one 3", "two 2")


def test_the_command_prints_them_and_json(home):
    make_run(home, "one", [3.0], learning_rate=1e-3)
    make_run(home, "two", [5.0])
    shown = CliRunner().invoke(app, ["compare", "one", "two"]).output
    for text in ("train.learning_rate", "0.001", "0.0002", "2 + 2 [is]", "one 1", "two 1"):
        assert text in shown
    as_json = json.loads(CliRunner().invoke(app, ["compare", "one", "two", "--json"]).output)
    assert as_json["numbers"]["loss, last step"] == [3.0, 5.0]
    assert as_json["samples"][0]["completions"] == ["one 1", "two 1"]
    assert "the same" in CliRunner().invoke(app, ["compare", "one", "one"]).output


def test_runs_that_are_not_there(home):
    make_run(home, "one", [3.0])
    with pytest.raises(RunError, match="there is no run too in .* runs there: one"):
        compare("one", "too", Store())
    RunDir.named("new", home).root.mkdir()
    with pytest.raises(
        RunError, match=r"run new was never started \(there is no .*spec.json\): run its spec"
    ):
        compare("one", "new", Store())
