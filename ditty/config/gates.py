"""What a result must measure before it is uploaded: `evaluate.require` of the spec.

eval_loss: "<= base"         no worse than the base model
eval_loss: "< base - 0.1"    better by more than 0.1 nats a token
quiz/acc: ">= 0.6"           a task of lm-evaluation-harness, and one of its metrics
"""

import difflib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditty.errors import RunError

LOSS, PERPLEXITY = "eval_loss", "eval_perplexity"
HELD_OUT = (LOSS, PERPLEXITY)
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_CONDITION = re.compile(rf"(<=|<|>=|>)\s*(?:(base)(?:\s*([+-])\s*({_NUMBER}))?|(-?{_NUMBER}))")


@dataclass(frozen=True)
class Gate:
    """One condition.

    Attributes:
        measure: what is compared: LOSS, PERPLEXITY, or `task/metric`.
        text: the condition as it was written.
        compare: a key of COMPARE.
        base: whether `number` is added to the base model's own measure.
    """

    measure: str
    text: str
    compare: str
    base: bool
    number: float

    @classmethod
    def parse(cls, measure: str, text: str) -> "Gate":
        """Raises ValueError: it is no condition."""
        match = _CONDITION.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{measure}: {text!r} is no condition; expected a comparison with the base model "
                "or a number: '<= base', '< base - 0.1', '>= 0.6'"
            )
        compare, base, sign, offset, number = match.groups()
        value = float(number or offset or 0)
        return cls(measure, text.strip(), compare, bool(base), -value if sign == "-" else value)

    def failure(self, trained: Mapping[str, float], base: Mapping[str, float]) -> str | None:
        """What is wrong with a result, with the figures; None: nothing.

        A measure that is not a number passes no gate.

        Raises:
            RunError: there is no such measure.
        """
        for measures in (trained, base) if self.base else (trained,):
            if self.measure not in measures:
                raise RunError(
                    f"evaluate.require: nothing has measured {self.measure!r}; measured were "
                    f"{', '.join(sorted(measures))}"
                )
        bound = self.number + (base[self.measure] if self.base else 0.0)
        if COMPARE[self.compare](trained[self.measure], bound):
            return None
        shown = f"{self.text}, which is {self.compare} {bound:.4f}" if self.base else self.text
        return f"{self.measure} is {trained[self.measure]:.4f}, required is {shown}"


def check_measure(measure: str, *, has_tasks: bool) -> None:
    """Raise ValueError where nothing will measure it."""
    task = measure.rpartition("/")[0]
    if measure in HELD_OUT or (task and has_tasks):
        return
    if task:
        raise ValueError(f"names {measure}, and evaluate.tasks is empty: add {task} to it")
    near = difflib.get_close_matches(measure, HELD_OUT, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(HELD_OUT)}, or TASK/METRIC"
    raise ValueError(f"{measure!r} is measured by nothing; {hint}")


def measures(found: Mapping[str, Any]) -> dict[str, float]:
    """Those of an evaluation: {"loss", "perplexity", "tasks": {"task/metric": value}}."""
    held_out = {f"eval_{name}": found[name] for name in ("loss", "perplexity") if name in found}
    return {**held_out, **found.get("tasks", {})}


def failures(
    require: Mapping[str, str], trained: Mapping[str, Any], base: Mapping[str, Any]
) -> list[str]:
    """The conditions that a result fails, each as a sentence with its figures.

    Args:
        trained, base: evaluations of the result and of the base model, as in `measures`.
    Raises:
        RunError: one names what nothing has measured.
    """
    gates = [Gate.parse(measure, text) for measure, text in require.items()]
    found = [gate.failure(measures(trained), measures(base)) for gate in gates]
    return [failure for failure in found if failure]
