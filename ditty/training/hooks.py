"""What a caller adds to a training: callbacks, and a loss or an optimizer of its own.

    def watch(record):
        if record["loss"] > 10:
            raise ValueError("the loss explodes")


    def smoothed(forward, model, batch):
        logits = forward(**forward_kwargs(model, batch)).logits[0, batch["predicts"]]
        targets = batch["targets"]
        return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=0.1)


    def momentum(parameters, train):
        return torch.optim.SGD(parameters.values(), lr=train.learning_rate, momentum=0.9)


    def last_words(rows):
        batch = make_tokenizer().pad(rows, return_tensors="pt")
        places = torch.arange(batch["input_ids"].shape[1])
        ends = batch["attention_mask"].sum(1)[:, None]
        learned = (places >= ends - 3) & (places < ends)
        return {**batch, "labels": batch["input_ids"].where(learned, -100)}


    class Mine(Pipeline):
        def dataset(self):
            data = Data(load_kwargs={...}, tokenizer=self.tokenizer, collator=last_words)
            return data.prepare([...])

        def hooks(self):
            return Hooks(on_step=watch, loss=smoothed, optimizer=momentum)

Checkpoints, resuming, clipping, the schedule and the shardings work with them as without. Whoever
has a Trainer gives it `hooks=Hooks(...)`. A collator of one's own is `Data(collator=...)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditty.dataset import functions
from ditty.distributed.optim import MakeOptimizer, make_optimizer
from ditty.errors import RunError, SpecError
from ditty.models.batches import Batch, supervised_tokens
from ditty.training.loss import token_loss_sum
from ditty.training.rng import rng_state, set_rng_state

Record = dict[str, Any]
Loss = Callable[[torch.nn.Module, Any, Batch], torch.Tensor]

DECIDE = ("loss", "terms", "optimizer")  # the trained weights


@dataclass(frozen=True)
class Hooks:
    """What is called during a training besides ditty's own.

    Callbacks run in rank 0, between steps. They may draw random numbers and take time; the training
    does not notice. What one raises ends the run with its name.

    Attributes:
        on_step: (record) after each step: its line of metrics.jsonl (step, loss, learning_rate,
            grad_norm, ...). On GPUs the next step is under way by then.
        on_evaluate: (record) after each held-out evaluation: step, loss, supervised_tokens.
        on_save: (step, folder) soon after a checkpoint is committed: once each, in order.
        loss: (forward, model, batch) -> the loss summed over the batch's terms, a scalar tensor;
            see `ditty.training.loss.token_loss_sum`. Held-out rows are measured with it too.
        terms: (batch) -> how many that are: a step's loss and gradient are means over those of all
            its batches and processes.
        optimizer: ({name: parameter}, train) -> a torch optimizer of them; the `lr` of its groups
            is set to the schedule's before each step. Under fsdp2 a parameter is this process's
            rows of it; zero3 takes no other than its own.
    """

    on_step: Callable[[Record], object] | None = None
    on_evaluate: Callable[[Record], object] | None = None
    on_save: Callable[[int, Path], object] | None = None
    loss: Loss = token_loss_sum
    terms: Callable[[Batch], int] = supervised_tokens
    optimizer: MakeOptimizer = make_optimizer

    def call(self, name: str, *arguments: Any) -> None:
        """Call the callback `name`, if there is one.

        Raises:
            RunError: it raised.
        """
        callback = getattr(self, name)
        if callback is None:
            return
        generators = rng_state()
        try:
            callback(*arguments)
        except RunError:  # a callback that calls another (`Reports.hooks`): said already
            raise
        except Exception as error:  # the user's code ran: anything can come out of it
            raise RunError(
                f"the callback {name} ({_named(callback)}) raised {type(error).__name__}: {error}. "
                "Correct or remove it; a rerun resumes from the newest checkpoint"
            ) from error
        finally:
            set_rng_state(generators)

    def loss_sum(self, forward: torch.nn.Module, model: Any, batch: Batch) -> torch.Tensor:
        """`loss` of a batch, looked at.

        Raises:
            SpecError: it is no scalar tensor.
        """
        found = self.loss(forward, model, batch)
        if not isinstance(found, torch.Tensor) or found.ndim:
            got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise SpecError(
                f"the loss {_named(self.loss)} returned {got}, expected a scalar tensor: the sum "
                "over the batch, e.g. with reduction='sum'"
            )
        return found

    def identity(self) -> dict[str, str]:
        """What of these decides the trained weights, as digests of its code by name.

        Raises:
            DataError: one has no content to hash (a lambda, a closure, a method).
        """
        chosen = {name: getattr(self, name) for name in DECIDE}
        ours = {field: getattr(Hooks, field) for field in DECIDE}
        return {n: functions.digest(f) for n, f in chosen.items() if f is not ours[n]}


OURS = Hooks()
"""ditty's own loss and optimizer, and no callbacks."""


def _named(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
