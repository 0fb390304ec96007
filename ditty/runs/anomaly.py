"""Steps out of the ordinary: numbers that are not finite, or far above those of the steps before.

A loss or gradient norm is a spike where it is `train.spike_threshold` robust standard deviations
above the median of the last `train.spike_window` of its kind. Steps that were skipped count there
too, so that a level that has risen for good is the usual one after half a window.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ditty.config.choices import OnAnomaly
from ditty.config.spec import TrainSpec
from ditty.errors import RunMismatch, cut
from ditty.runs.identity import GUARD_KEYS

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SIGMA = 0.01  # of the median: where all values are nearly equal, a small step is no spike
MOST_SKIPPED = 10  # in a row: it is not the batch, then
LONGEST_IDS = 400  # characters of a line in the log; metrics.jsonl has them all

NON_FINITE, SPIKE = "non-finite", "spike"
MEASURE = ("spike_threshold", "spike_window")


def robust_z(value: float, recent: Sequence[float]) -> float:
    """How many robust standard deviations `value` is above the median of `recent`.

    Up to half of `recent` may be outliers themselves. Below LEAST_SIGMA of the median, the
    deviation counts as that.

    Source: Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993): the modified z-score.
    """
    median = statistics.median(recent)
    sigma = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in recent)
    return (value - median) / max(sigma, LEAST_SIGMA * abs(median), sys.float_info.min)


@dataclass(frozen=True)
class Anomaly:
    """A step out of the ordinary.

    Attributes:
        reason: NON_FINITE or SPIKE.
        action: what becomes of the step.
        loss: in nats a supervised token.
        grad_norm: L2, before clipping.
        loss_z, grad_norm_z: see `robust_z`; None: not compared.
        in_a_row: steps skipped in a row before this one.
    """

    reason: str
    action: OnAnomaly
    loss: float
    grad_norm: float
    loss_z: float | None
    grad_norm_z: float | None
    in_a_row: int

    def told(self, step: int, samples: dict[str, list[int]]) -> str:
        """In words: what was seen, of which samples (see Feed.samples), and what comes of it."""
        words = [f"{name} {value:.4g}{_compared(z)}" for name, value, z in self._numbers()]
        ((what, numbers),) = samples.items()
        ids = cut(", ".join(map(str, numbers)), LONGEST_IDS)
        text = f"step {step}: {', '.join(words)}, on {what.replace('_', ' ')} {ids}. "
        if self.action is OnAnomaly.WARN:
            return text + "It was taken (train.on_spike: warn)"
        if self.action is OnAnomaly.SKIP:
            return text + "It was skipped"
        kept = "Nothing of it was kept, and a rerun resumes before it. "
        if self.in_a_row == MOST_SKIPPED:
            before = f"The {MOST_SKIPPED} steps before it were skipped: it is not the batch. "
            return text + kept + before + "Lower train.learning_rate, with another name"
        key = "on_spike" if self.reason == SPIKE else "on_non_finite"
        look = f"Look at what it is made of; then set train.{key}: skip, "
        return text + kept + look + "or lower train.learning_rate, with another name"

    def _numbers(self) -> Iterator[tuple[str, float, float | None]]:
        yield "loss", self.loss, self.loss_z
        yield "gradient norm", self.grad_norm, self.grad_norm_z

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl: JSON has no infinity, so what is not finite is a word."""
        numbers = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "loss_z": self.loss_z,
            "grad_norm_z": self.grad_norm_z,
        }
        said = {k: v if v is None or math.isfinite(v) else str(v) for k, v in numbers.items()}
        return {"kind": "anomaly", "reason": self.reason, "action": self.action.value, **said}


def _compared(z: float | None) -> str:
    return "" if z is None else f" ({z:+.1f} standard deviations from the median)"


class StepGuard:
    """Judges each step's numbers by those of the steps before.

    All processes judge the numbers of one all-reduce, so all of them decide alike. What it has seen
    is part of each checkpoint, so a resume decides as an undisturbed run does.
    """

    def __init__(self, train: TrainSpec):
        self.train = train
        self.losses: deque[float] = deque(maxlen=train.spike_window)
        self.norms: deque[float] = deque(maxlen=train.spike_window)
        self.skipped = 0  # in a row, up to now
        # Of each kind: whether every step so far would have been the same under any action.
        self.clean = {NON_FINITE: True, SPIKE: True}

    def judge(self, loss: float, norm: float) -> Anomaly | None:
        """What is out of the ordinary with the next step's numbers, or None.

        Args:
            loss: in nats a supervised token.
            norm: L2 norm of the gradients, before clipping.
        """
        found = self._find(loss, norm)
        for value, recent in ((loss, self.losses), (norm, self.norms)):
            if math.isfinite(value):
                recent.append(value)
        if found is not None:
            self.clean[found.reason] = False
        skips = found is not None and found.action is OnAnomaly.SKIP
        self.skipped = self.skipped + 1 if skips else 0
        return found

    def _find(self, loss: float, norm: float) -> Anomaly | None:
        finite = math.isfinite(loss) and math.isfinite(norm)
        z = (self._z(loss, self.losses), self._z(norm, self.norms)) if finite else (None, None)
        if finite and max(x or 0.0 for x in z) < self.train.spike_threshold:
            return None
        reason = SPIKE if finite else NON_FINITE
        action = self.train.on_spike if finite else self.train.on_non_finite
        if action is OnAnomaly.SKIP and self.skipped == MOST_SKIPPED:
            action = OnAnomaly.STOP
        return Anomaly(reason, OnAnomaly(action), loss, norm, *z, self.skipped)

    def _z(self, value: float, recent: Sequence[float]) -> float | None:
        enough = len(recent) >= self.train.spike_window // 2
        return robust_z(value, recent) if enough else None

    def state(self) -> dict[str, Any]:
        """What `resume` needs, JSON values."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.norms),
            "skipped": self.skipped,
            "clean": dict(self.clean),
            "rule": self._rule(),
        }

    def _rule(self) -> dict[str, Any]:
        return self.train.model_dump(mode="json", include=set(GUARD_KEYS))

    def resume(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from the `state` of the checkpoint of `step`; None: an earlier ditty made it.

        The rule may change where the steps so far would have been the same under the new one: a
        run that stopped at a spike may be told to skip it.

        Raises:
            RunMismatch: they would not.
        """
        if state is None:  # then what was not finite ended the run, and nobody looked for spikes
            rule = self._rule() | {"on_non_finite": "stop", "on_spike": "warn"}
            clean = {NON_FINITE: True, SPIKE: False}
            state = {"losses": [], "grad_norms": [], "skipped": 0, "rule": rule, "clean": clean}
        self.losses.extend(state["losses"])
        self.norms.extend(state["grad_norms"])
        self.skipped, self.clean = state["skipped"], dict(state["clean"])
        before, now = state["rule"], self._rule()
        if any(before[key] != now[key] for key in MEASURE):
            self.clean[SPIKE] = False
        for kind, keys in ((NON_FINITE, ("on_non_finite",)), (SPIKE, ("on_spike", *MEASURE))):
            changed = [k for k in keys if before[k] != now[k]]
            skips = OnAnomaly.SKIP in (before[keys[0]], now[keys[0]])
            if changed and skips and not self.clean[kind]:
                differences = (f"train.{k} was {before[k]!r}, now {now[k]!r}" for k in changed)
                raise RunMismatch(
                    f"{', '.join(differences)}: by that the steps up to {step}, where the newest "
                    "checkpoint is, may have been other ones. Take the change back, or choose "
                    "another name for this run"
                )
