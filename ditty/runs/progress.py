"""A training's course: the best evaluation, how long ago one was better, and how it ended."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        step: steps done in all.
        finished: all steps were done; otherwise it was asked to stop, and saved.
        reason: why it stopped early.
    """

    step: int
    finished: bool
    reason: str = ""

    def __str__(self) -> str:
        ended = "all steps are done" if self.finished else f"stopped by a {self.reason}"
        return f"step {self.step}: {ended}"


@dataclass
class Progress:
    """Part of each checkpoint, so that a resume stops early at the same step.

    Attributes:
        best_loss: lowest held-out loss, in nats a token; None before the first finite one.
        best_step: the step after which it was measured.
        loss_to_beat: what an evaluation is compared with for early stopping: the last loss that
            was lower than the one before it by the threshold.
        evaluations_without_better: evaluations since then.
    """

    best_loss: float | None = None
    best_step: int = 0
    loss_to_beat: float | None = None
    evaluations_without_better: int = 0

    def note(self, step: int, loss: float, threshold: float) -> bool:
        """Take an evaluation in; whether it is the lowest so far.

        Args:
            threshold: a loss lower by no more than this does not count for early stopping, so that
                small gains add up until they do.
        """
        if _lower(loss, self.loss_to_beat, threshold):
            self.loss_to_beat, self.evaluations_without_better = loss, 0
        else:
            self.evaluations_without_better += 1
        if _lower(loss, self.best_loss, 0.0):
            self.best_loss, self.best_step = loss, step
            return True
        return False


def _lower(loss: float, than: float | None, threshold: float) -> bool:
    return loss < (math.inf if than is None else than - threshold)
