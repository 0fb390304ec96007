"""The training loop: steps, held-out evaluation, checkpoints, and a clean end when told to."""

import logging
import math
import resource
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ditty.attention import check_isolation
from ditty.batches import Batch, fill_up, supervised_tokens, to_device
from ditty.checkpoint import Checkpointer
from ditty.choices import FinalWeights
from ditty.compiled import as_it_stands, compile_blocks
from ditty.errors import LESS_MEMORY, OutOfMemory, RunError, SpecError
from ditty.evaluate import HeldOut, autocast, complete, held_out_loss
from ditty.feed import Feed
from ditty.heartbeat import Heartbeat
from ditty.loss import token_loss_sum
from ditty.optim import check_schedule, learning_rate
from ditty.parallel import LossScale, make_parallel, scale_gradients, squared_norm
from ditty.progress import Progress
from ditty.readout import Readout, Work, clip_factor
from ditty.recompute import choose_recomputed, recompute_blocks
from ditty.rng import choose_kernels, seed_all
from ditty.rundir import RunDir, append_record
from ditty.signals import stop_signal
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
    Raises:
        SpecError: the held-out loss is to decide, and no row is held out; or the schedule does not
            take `train.schedule_options`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        feed: Feed,
        train: TrainSpec,
        place: Place,
        held_out: HeldOut | None = None,
    ):
        if train.evaluation_decides and (held_out is None or not len(held_out.rows)):
            raise SpecError(
                "train.early_stopping_patience and train.final_weights: best go by the loss of "
                "held-out rows, and there are none: raise data.eval_fraction (a Trainer of your "
                "own takes held_out), or remove those keys"
            )
        check_schedule(train)
        self.feed, self.train, self.held_out = feed, train, held_out
        self.run, self.world = place.run, place.world
        self.beat = place.heartbeat or Heartbeat(None)
        self.total_steps = feed.total_steps(train)
        choose_kernels(train.deterministic)
        self.parallel = make_parallel(module, train, self.world)
        model, bounds = self.parallel.model, feed.bounds
        compiled = compile_blocks(model, train, bounds, self.world.device)
        self.filled = bounds if compiled else None  # to what batches are filled up
        count, self.memory = choose_recomputed(
            self.parallel, train, bounds, self.world, compiled=compiled
        )
        recompute_blocks(model, count)
        self.isolated = False  # not yet seen that documents of a batch leave each other alone
        self.progress = Progress()
        self.loss_scale = LossScale.of(train.precision)
        # Before a step is taken, its numbers are seen: where that costs nothing, and where the
        # loss scale or gradients on the host ask for it. Elsewhere they are read a step later.
        on_host = self.world.device.type == "cpu" or train.cpu_offload
        self.waits = on_host or self.loss_scale.adapts
        self.unread: Readout | None = None
        self.clock = 0.0  # when the numbers of the step before were there
        self.checkpointer = Checkpointer(
            place.run, place.world, place.identity, keep=train.keep_checkpoints
        )

    def fit(self) -> Outcome:
        """Train to the last step, resuming from the newest checkpoint.

        SIGTERM, SIGINT and the run's `stop` file save a checkpoint after the current step and
        end. Where `train.final_weights` is `best`, those are the weights at the end.

        Raises:
            RunError: loss or gradients are not finite; the state before that step stays. Or the
                best weights are wanted, and there are none.
            OutOfMemory: says where the memory was to go.
            StoreError, ArtifactDamaged, RunMismatch: see Checkpointer.
        """
        self.beat("restore", 0)
        seed_all(self.train.seed + self.world.rank)
        if self.world.main:
            self.checkpointer.clear_staging()
        step, state = self.checkpointer.restore(self.parallel)
        if step:
            self.progress = Progress(**state["progress"])
            self.loss_scale = LossScale(**state["loss_scale"])
            self._find_best()
        log.info("training from step %d to %d", step, self.total_steps)
        self._record_start(step)
        try:
            with stop_signal() as signalled:
                outcome = self._run(step, signalled)
                self.settle()
        except torch.OutOfMemoryError as error:
            planned = f" Planned were {self.memory.describe()}." if self.memory else ""
            raise OutOfMemory(
                f"{error}.{planned} It would not fit the next time either: {LESS_MEMORY}"
            ) from error
        finally:
            self.checkpointer.wait()
        if outcome.finished and self.train.final_weights is FinalWeights.BEST:
            self._take_best()
        return outcome

    def _record_start(self, step: int) -> None:
        """That an attempt goes on after `step` steps, and when its processes had met."""
        if self.world.main:
            began = self.beat.began
            met = began.get("load", began["restore"])
            record = {"kind": "start", "step": step, "load_time": met, "time": time.time()}
            append_record(self.run.metrics_file, record)

    def _find_best(self) -> None:
        """Know at the start, and not after the last step, that the best weights are lost."""
        best = self.progress.best_step
        if self.train.final_weights is not FinalWeights.BEST or self.progress.best_loss is None:
            return
        if not self.world.from_main(best in self.run.committed_steps()):
            raise RunError(
                f"the best weights so far are those of step {best}, and "
                f"{self.run.checkpoint(best)} is not there: bring it back from where this run was "
                "before, or train with another name"
            )

    def _take_best(self) -> None:
        if self.progress.best_loss is None:
            raise RunError(
                "train.final_weights: best found no step with a finite held-out loss: look at the "
                "held-out rows, or set final_weights: last (with another name)"
            )
        log.info("the result is that of step %d", self.progress.best_step)
        self.checkpointer.restore_weights(self.progress.best_step, self.parallel)

    def _run(self, step: int, signalled: list[int]) -> Outcome:
        saved = step
        if step == 0:
            self.evaluate(step)
            if self.train.final_weights is FinalWeights.BEST:
                self.save(step)
        steps = self.feed.steps(step)
        while step < self.total_steps and not self._out_of_patience():
            self.beat("data", step)
            asked = time.perf_counter()
            micro_batches = next(steps)
            waited = time.perf_counter() - asked
            supervised, tokens, stop = self._agree(micro_batches, bool(signalled))
            if stop:
                if saved < step:
                    self.save(step)
                return Outcome(step, finished=False, reason=stop)
            rate = learning_rate(step, self.total_steps, self.train)
            step += 1
            self._step(Work(step, rate, supervised, tokens, waited), micro_batches)
            better = self._after_step(step)
            last = step == self.total_steps or self._out_of_patience()
            if last or better or step % self.train.save_steps == 0:
                self.save(step)
                saved = step
        return Outcome(step, finished=True)

    def _after_step(self, step: int) -> bool:
        """Evaluate where it is time to; returns whether this step's weights must be kept."""
        every, last = self.train.eval_steps, step == self.total_steps
        better = False
        if last or (every and step % every == 0):
            better = self.evaluate(step)
        elif self.train.sample_steps and step % self.train.sample_steps == 0:
            self.sample(step)
        return better and self.train.final_weights is FinalWeights.BEST

    def _out_of_patience(self) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_better >= patience

    def _agree(self, micro_batches: list[Batch], signalled: bool) -> tuple[int, int, str]:
        """(supervised tokens of the global batch, all its tokens, why to stop or ""), the same on
        all ranks."""
        asked = self.world.main and self.run.stop_file.exists()
        supervised = sum(supervised_tokens(b) for b in micro_batches)
        seen = sum(b["input_ids"].numel() for b in micro_batches)
        several = any(len(b["cu_seqlens"]) > 2 for b in micro_batches)
        here = [float(n) for n in (supervised, seen, signalled, asked, several)]
        total, tokens, signals, stops, packed = self.world.sum(here)
        if packed and not self.isolated:
            with as_it_stands(), autocast(self.world.device, self.train.precision):
                check_isolation(self.parallel.forward, self.parallel.model, self.world.device)
            self.parallel.rest()
            self.isolated = True
        reason = "signal" if signals else "stop file" if stops else ""
        return int(total), int(tokens), reason

    def _step(self, work: Work, micro_batches: list[Batch]) -> None:
        """One optimizer step on the global batch, each supervised token weighing the same."""
        self.beat("step", work.step - 1)
        if self.unread is None:
            self.clock = time.perf_counter()
        # Gradients are averaged over processes; wanted is their sum, divided by all tokens.
        scale = self.loss_scale.scale * self.world.world_size / max(work.supervised, 1)
        loss_sum = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for index, batch in enumerate(micro_batches):
            if self.filled is not None:
                batch = fill_up(batch, self.filled)
            batch = to_device(batch, self.world.device)
            with autocast(self.world.device, self.train.precision):
                loss = token_loss_sum(self.parallel.forward, self.parallel.model, batch)
            self.parallel.backward(loss * scale, index)
            loss_sum += loss.detach()
        squares = squared_norm(self.parallel).to(loss_sum.device)
        sums = self.world.add(torch.stack([loss_sum, squares]))
        readout = Readout(work, sums, self.loss_scale.scale)
        factor = clip_factor(sums[1], self.train.max_grad_norm, self.loss_scale.scale)
        if self.waits:
            self._update(readout, factor)
            return
        scale_gradients(self.parallel, factor)
        self.parallel.step(work.rate)
        self.settle()
        self.unread = readout

    def _update(self, readout: Readout, factor: torch.Tensor) -> None:
        """Take the step once its numbers are seen, or none where fp16 overflowed."""
        loss, norm = readout.read()
        overflowed = self.loss_scale.adapts and not math.isfinite(norm) and math.isfinite(loss)
        if not overflowed:
            self._check_finite(readout.work, loss, norm)
        self.loss_scale.update(overflowed)
        if overflowed:
            log.warning(
                "step %d skipped: loss scale now %g", readout.work.step, self.loss_scale.scale
            )
            self.parallel.skip()
        else:
            scale_gradients(self.parallel, factor)
            self.parallel.step(readout.work.rate)
        self._record(readout.work, loss, norm)

    def settle(self) -> None:
        """Read and record the numbers of the step that was launched last, if that is not done.

        Raises:
            RunError: they are not finite. Whatever is kept is kept after this.
        """
        readout, self.unread = self.unread, None
        if readout is not None:
            loss, norm = readout.read()
            self._check_finite(readout.work, loss, norm)
            self._record(readout.work, loss, norm)

    def _check_finite(self, work: Work, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"step {work.step}: loss {loss}, gradient norm {norm}. Nothing of it was kept: "
                "lower train.learning_rate (with another name), or look at the rows of this step; "
                "a rerun resumes before it"
            )

    def _record(self, work: Work, loss: float, norm: float) -> None:
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not self.world.main:
            return
        record = {
            "kind": "train",
            "step": work.step,
            "total_steps": self.total_steps,
            "loss": loss,
            "learning_rate": work.rate,
            "grad_norm": norm,
            "supervised_tokens": work.supervised,
            "tokens": work.tokens,
            "tokens_per_second": work.tokens / seconds,
            "memory_bytes": memory_bytes(self.world.device),
            "seconds": seconds,
            "data_seconds": work.data_seconds,
            "time": time.time(),
        }
        append_record(self.run.metrics_file, record)
        log.info("step %d/%d loss %.4f", work.step, self.total_steps, loss)

    def save(self, step: int) -> None:
        """Begin to commit a checkpoint of the state after `step` steps."""
        self.settle()
        self.beat("save", step)
        state = {
            "progress": asdict(self.progress),
            "best_step": self.progress.best_step,
            "loss_scale": asdict(self.loss_scale),
        }
        started = time.perf_counter()
        self.checkpointer.save(step, self.parallel, state)
        if self.world.main:
            stalled = time.perf_counter() - started  # the rest happens beside the next steps
            record = {"kind": "save", "step": step, "stalled_seconds": stalled, "time": time.time()}
            append_record(self.run.metrics_file, record)

    def evaluate(self, step: int) -> bool:
        """Append the held-out loss to the metrics, and samples; whether it is the best so far."""
        self.settle()
        if self.held_out is None or not len(self.held_out.rows):
            return False
        self.beat("evaluate", step)
        args = (self.held_out.rows, self.train.precision, self.world)
        loss, tokens = held_out_loss(self.parallel.forward, self.parallel.model, *args)
        self.parallel.rest()
        if self.world.main:
            record = {"kind": "eval", "step": step, "loss": loss, "supervised_tokens": tokens}
            append_record(self.run.metrics_file, record | {"time": time.time()})
            log.info("step %d held-out loss %.4f", step, loss)
        better = self.progress.note(step, loss, self.train.early_stopping_threshold)
        every, ends = self.train.sample_steps, step == self.total_steps or self._out_of_patience()
        if step == 0 or ends or (every and step % every == 0):
            self.sample(step)
        return better

    def sample(self, step: int) -> None:
        """Let the model complete held-out prompts, into the run's samples.

        All processes take part, since each may hold a part of the weights; rank 0 writes.
        """
        self.settle()
        if self.held_out is None or not self.held_out.num_samples:
            return
        self.beat("sample", step)
        samples = complete(
            self.parallel.model, self.held_out, self.train.precision, self.world.device
        )
        self.parallel.rest()
        if self.world.main:
            for index, sample in enumerate(samples):
                append_record(self.run.samples_file, {"step": step, "index": index, **sample})


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
