"""The training loop: steps, held-out evaluation, checkpoints, and a clean end when told to."""

import logging
import math
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ditty.batches import Batch, supervised_tokens, to_device
from ditty.checkpoint import Checkpointer
from ditty.errors import RunError
from ditty.evaluate import HeldOut, autocast, complete, held_out_loss
from ditty.feed import Feed
from ditty.heartbeat import Heartbeat
from ditty.loss import token_loss_sum
from ditty.model import trainable
from ditty.optim import learning_rate, make_optimizer
from ditty.rng import seed_all
from ditty.rundir import RunDir, append_record
from ditty.spec import TrainSpec
from ditty.world import World, single

log = logging.getLogger(__name__)


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


@dataclass
class Place:
    """Where a training happens: its directory, its processes, and what its checkpoints are of."""

    run: RunDir
    world: World = field(default_factory=single)
    identity: dict[str, Any] = field(default_factory=dict)
    heartbeat: Heartbeat | None = None


class Trainer:
    """Trains the parameters of `module` that require gradients.

    Args:
        module: a transformers causal LM, or peft's wrapper of one, in train mode.
        feed: micro batches by step.
        train: the optimization.
        place: run directory, processes, identity.
        held_out: evaluated before the first and after the last step, and every `eval_steps`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        feed: Feed,
        train: TrainSpec,
        place: Place,
        held_out: HeldOut | None = None,
    ):
        self.module, self.feed, self.train, self.held_out = module, feed, train, held_out
        self.model = base_model(module)
        self.run, self.world = place.run, place.world
        self.beat = place.heartbeat or Heartbeat(None)
        self.total_steps = feed.total_steps(train)
        self.parameters = trainable(module)
        self.optimizer = make_optimizer(self.parameters, train)
        self.checkpointer = Checkpointer(
            place.run, place.world, place.identity, keep=train.keep_checkpoints
        )
        self.forward = self._wrap()

    def _wrap(self) -> torch.nn.Module:
        if self.world.world_size == 1:
            return self.module
        digests = self.world.gather(
            [float(p.detach().double().sum()) for p in self.parameters.values()]
        )
        assert digests.count(digests[0]) == len(digests), "ranks start from different weights"
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        # All ranks have read the same files: broadcasting the frozen base would only cost time.
        return DistributedDataParallel(
            self.module, device_ids=ids, init_sync=False, gradient_as_bucket_view=True
        )

    def fit(self) -> Outcome:
        """Train to the last step, resuming from the newest checkpoint.

        SIGTERM, SIGINT and the run's `stop` file save a checkpoint after the current step and
        end.

        Raises:
            RunError: loss or gradients are not finite; the state before that step stays.
            StoreError, ArtifactDamaged, RunMismatch: see Checkpointer.
        """
        self.beat("restore", 0)
        seed_all(self.train.seed + self.world.rank)
        if self.world.main:
            self.checkpointer.clear_staging()
        step = saved = self.checkpointer.restore(self.module, self.optimizer)
        log.info("training from step %d to %d", step, self.total_steps)
        with stop_signal() as signalled:
            if step == 0:
                self.evaluate(step)
            steps = self.feed.steps(step)
            while step < self.total_steps:
                self.beat("data", step)
                micro_batches = next(steps)
                tokens, stop = self._agree(micro_batches, bool(signalled))
                if stop:
                    if saved < step:
                        self.save(step)
                    return Outcome(step, finished=False, reason=stop)
                self._step(step, micro_batches, tokens)
                step += 1
                last = step == self.total_steps
                if last or step % self.train.save_steps == 0:
                    self.save(step)
                    saved = step
                if last or (self.train.eval_steps and step % self.train.eval_steps == 0):
                    self.evaluate(step)
        return Outcome(step, finished=True)

    def _agree(self, micro_batches: list[Batch], signalled: bool) -> tuple[int, str]:
        """(supervised tokens of the global batch, why to stop or ""), the same on all ranks."""
        asked = self.world.main and self.run.stop_file.exists()
        tokens = sum(supervised_tokens(b) for b in micro_batches)
        total, signals, stops = self.world.sum([float(tokens), float(signalled), float(asked)])
        reason = "signal" if signals else "stop file" if stops else ""
        return int(total), reason

    def _step(self, step: int, micro_batches: list[Batch], tokens: int) -> None:
        """One optimizer step on the global batch, each supervised token weighing the same."""
        self.beat("step", step)
        started = time.perf_counter()
        rate = learning_rate(step, self.total_steps, self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # DDP averages over ranks; what we want is the sum over ranks, divided by all tokens.
        scale = self.world.world_size / max(tokens, 1)
        loss_sum = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._gradient_sync(last):
                batch = to_device(batch, self.world.device)
                with autocast(self.world.device, self.train.precision):
                    loss = token_loss_sum(self.forward, self.model, batch)
                (loss * scale).backward()
            loss_sum += loss.detach()
        parameters = list(self.parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.train.max_grad_norm))
        (total,) = self.world.sum([float(loss_sum)])
        mean = total / max(tokens, 1)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise RunError(
                f"step {step + 1}: loss {mean}, gradient norm {norm}. Nothing of it was kept: "
                "lower train.learning_rate (with another name), or look at the rows of this step; "
                "a rerun resumes before it"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        self._record(step + 1, mean, rate, norm, (tokens, micro_batches, seconds))

    def _gradient_sync(self, last: bool) -> Any:
        """DDP exchanges gradients in the last micro batch of a step only."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def _record(
        self, step: int, loss: float, rate: float, norm: float, work: tuple[int, list[Batch], float]
    ) -> None:
        supervised, micro_batches, seconds = work
        seen = float(sum(b["input_ids"].numel() for b in micro_batches))
        (tokens,) = self.world.sum([seen])
        if not self.world.main:
            return
        record = {
            "kind": "train",
            "step": step,
            "total_steps": self.total_steps,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "supervised_tokens": supervised,
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "memory_bytes": memory_bytes(self.world.device),
            "seconds": seconds,
            "time": time.time(),
        }
        append_record(self.run.metrics_file, record)
        log.info("step %d/%d loss %.4f", step, self.total_steps, loss)

    def save(self, step: int) -> None:
        """Commit a checkpoint of the state after `step` steps."""
        self.beat("save", step)
        self.checkpointer.save(step, self.module, self.optimizer)

    def evaluate(self, step: int) -> None:
        """Append the held-out loss to the metrics, and samples before and after training."""
        if self.held_out is None or not len(self.held_out.rows):
            return
        self.beat("evaluate", step)
        args = (self.held_out.rows, self.train.precision, self.world)
        loss, tokens = held_out_loss(self.model, *args)
        if self.world.main:
            record = {"kind": "eval", "step": step, "loss": loss, "supervised_tokens": tokens}
            append_record(self.run.metrics_file, record | {"time": time.time()})
            log.info("step %d held-out loss %.4f", step, loss)
            if self.held_out.num_samples and step in (0, self.total_steps):
                self.beat("sample", step)
                self._sample(step, self.held_out)
        self.world.gather(None)  # the others wait here, not in a collective of the next step

    def _sample(self, step: int, held_out: HeldOut) -> None:
        samples = complete(self.model, held_out, self.train.precision, self.world.device)
        for index, sample in enumerate(samples):
            append_record(self.run.samples_file, {"step": step, "index": index, **sample})


def base_model(module: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper, or the module itself."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    assert isinstance(inner, PreTrainedModel), f"{type(inner)} is no transformers model"
    return inner


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to within the block, however often they come."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda n, _frame: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
