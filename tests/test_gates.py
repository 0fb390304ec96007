"""Conditions on what a result measures; the oracle is Python, which reads them as they stand."""

import itertools

import pytest

from ditty.config.gates import Gate, failures
from ditty.config.specfile import parse_spec
from ditty.errors import RunError, SpecError
from tests.test_specs import MINIMAL

CONDITIONS = ["<= base", "< base", ">= base", "> base", "< base - 0.5", "<= base + 1e-1", ">= 2.5"]
VALUES = [1.0, 1.5, 2.0, 2.1, 2.5, 3.0]


def measured(loss: float, **tasks: float) -> dict[str, object]:
    return {"loss": loss, "perplexity": 1.0, "tokens": 1, "rows": 1, "tasks": tasks}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_is_what_python_makes_of_it(condition: str) -> None:
    outcomes = set()
    for value, base in itertools.product(VALUES, VALUES):
        failed = failures({"eval_loss": condition}, measured(value), measured(base))
        assert (not failed) == eval(f"{value} {condition}", {"base": base}), (value, base)
        outcomes.add(bool(failed))
    assert outcomes == {True, False}


def test_a_failure_has_the_figures() -> None:
    require = {"eval_loss": "<= base", "quiz/acc": ">= 0.75", "eval_perplexity": "<= base"}
    trained = measured(2.5, **{"quiz/acc": 0.5})
    assert failures(require, trained, measured(2.25)) == [
        "eval_loss is 2.5000, required is <= base, which is <= 2.2500",
        "quiz/acc is 0.5000, required is >= 0.75",
    ]


def test_what_is_not_a_number_passes_no_gate() -> None:
    for condition in CONDITIONS:
        assert failures({"eval_loss": condition}, measured(float("nan")), measured(1.0))


def test_what_nothing_has_measured() -> None:
    with pytest.raises(RunError, match="'quiz/acc'; measured were eval_loss, eval_perplexity"):
        failures({"quiz/acc": "> 0"}, measured(1.0), measured(1.0))


@pytest.mark.parametrize(
    "condition", ["", "base", "== base", "< bases", "< base 0.1", "< base - x", "<", "< 1 2"]
)
def test_what_is_no_condition_is_refused_before_anything_starts(condition: str) -> None:
    values = MINIMAL | {"evaluate": {"require": {"eval_loss": condition}}}
    with pytest.raises(SpecError, match="evaluate.require: eval_loss: .* is no condition"):
        parse_spec(values)


def test_a_gate_needs_held_out_rows() -> None:
    values = MINIMAL | {"evaluate": {"require": {"eval_loss": "< base"}}}
    assert parse_spec(values).evaluate.require == {"eval_loss": "< base"}
    values["data"] = {"source": "rows.jsonl", "eval_fraction": 0}
    with pytest.raises(SpecError, match="go by held-out rows, and data.eval_fraction is 0"):
        parse_spec(values)
    assert Gate.parse("eval_loss", " <base-0.5 ").number == -0.5
