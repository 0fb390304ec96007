"""The training loop: steps, held-out evaluation, checkpoints, and a clean end when told to."""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ditty.config.choices import FinalWeights, OnAnomaly
from ditty.config.spec import TrainSpec
from ditty.distributed.optim import check_schedule, learning_rate
from ditty.distributed.parallel import LossScale, make_parallel, scale_gradients, squared_norm
from ditty.distributed.world import World, peak_memory, single, steady_cublas
from ditty.errors import LESS_MEMORY, OutOfMemory, RunError, SpecError
from ditty.models.attention import check_isolation
from ditty.models.batches import Batch, fill_up, supervised_tokens, to_device
from ditty.processes.signals import stop_signal
from ditty.runs.anomaly import StepGuard
from ditty.runs.heartbeat import Heartbeat
from ditty.runs.progress import Outcome, Progress
from ditty.runs.rundir import RunDir, append_record
from ditty.training.checkpoint import Checkpointer
from ditty.training.compiled import are_compiled, as_it_stands, compile_blocks
from ditty.training.evaluate import HeldOut, autocast, complete, held_out_loss
from ditty.training.feed import Feed
from ditty.training.hooks import OURS, Hooks
from ditty.training.readout import Readout, Work, clip_factor, waits_for_numbers
from ditty.training.recompute import choose_recomputed, recompute_blocks
from ditty.training.rng import choose_kernels, seed_all, without_fixed_order

log = logging.getLogger(__name__)


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
        hooks: callbacks, and a loss or an optimizer in the place of ditty's.
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
        hooks: Hooks = OURS,
    ):
        if train.evaluation_decides and (held_out is None or not len(held_out.rows)):
            raise SpecError(
                "train.early_stopping_patience and train.final_weights: best go by the loss of "
                "held-out rows, and there are none: raise data.eval_fraction (a Trainer of your "
                "own takes held_out), or remove those keys"
            )
        check_schedule(train)
        self.feed, self.train, self.held_out, self.hooks = feed, train, held_out, hooks
        self.run, self.world = place.run, place.world
        self.beat = place.heartbeat or Heartbeat(None)
        self.total_steps = feed.total_steps(train)
        steady_cublas(self.world.device.type)
        choose_kernels(train.deterministic)
        self.parallel = make_parallel(module, train, self.world, hooks.optimizer)
        model, bounds = self.parallel.model, feed.bounds
        compiled = are_compiled(model, train, bounds, self.world.device)
        self.filled = bounds if compiled else None  # to what batches are filled up
        count, self.memory = choose_recomputed(
            self.parallel, train, bounds, self.world, compiled=compiled
        )
        if compiled:
            compile_blocks(model, train, count)
        else:
            recompute_blocks(model, count)
        self.isolated = False  # not yet seen that documents of a batch leave each other alone
        self.progress = Progress()
        self.loss_scale = LossScale.of(train.precision)
        self.guard = StepGuard(train)
        self.waits = waits_for_numbers(train, self.world.device)
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
            RunError: loss or gradients of a step are not finite, or far above those before, and
                the spec says `stop`; the state before that step stays. Or the best weights are
                wanted, and there are none. Or an operation has no kernel that
                `train.deterministic` allows.
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
            self.guard.resume(state.get("guard"), step)
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
        except RuntimeError as error:
            said = without_fixed_order(error)
            if said is None:
                raise
            raise RunError(said) from error
        finally:
            self.checkpointer.wait()
        self._tell_saves()
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
            counts, stop = self._agree(micro_batches, bool(signalled))
            if stop:
                if saved < step:
                    self.save(step)
                return Outcome(step, finished=False, reason=stop)
            rate = learning_rate(step, self.total_steps, self.train)
            step += 1
            self._step(Work(step, rate, *counts, waited), micro_batches)
            self._tell_saves()
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

    def _agree(
        self, micro_batches: list[Batch], signalled: bool
    ) -> tuple[tuple[int, int, int], str]:
        """((supervised tokens of the global batch, all its tokens, the loss's terms), why to stop
        or ""), the same on all ranks."""
        asked = self.world.main and self.run.stop_file.exists()
        supervised = sum(supervised_tokens(b) for b in micro_batches)
        seen = sum(b["input_ids"].numel() for b in micro_batches)
        terms = sum(self.hooks.terms(b) for b in micro_batches)
        several = any(len(b["cu_seqlens"]) > 2 for b in micro_batches)
        here = [float(n) for n in (supervised, seen, terms, signalled, asked, several)]
        total, tokens, all_terms, signals, stops, packed = self.world.sum(here)
        if packed and not self.isolated:
            with as_it_stands(), autocast(self.world.device, self.train.precision):
                check_isolation(self.parallel.forward, self.parallel.model, self.world.device)
            self.parallel.rest()
            self.isolated = True
        reason = "signal" if signals else "stop file" if stops else ""
        return (int(total), int(tokens), int(all_terms)), reason

    def _step(self, work: Work, micro_batches: list[Batch]) -> None:
        """One optimizer step on the global batch, each term of the loss weighing the same."""
        self.beat("step", work.step - 1)
        if self.unread is None:
            self.clock = time.perf_counter()
        # Gradients are averaged over processes; wanted is their sum, divided by all terms.
        scale = self.loss_scale.scale * self.world.world_size / max(work.terms, 1)
        loss_sum = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for index, batch in enumerate(micro_batches):
            if self.filled is not None:
                batch = fill_up(batch, self.filled)
            batch = to_device(batch, self.world.device)
            with autocast(self.world.device, self.train.precision):
                loss = self.hooks.loss_sum(self.parallel.forward, self.parallel.model, batch)
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
        """Take the step once its numbers are seen; none where fp16 overflowed or the guard says
        so."""
        loss, norm = readout.read()
        overflowed = self.loss_scale.adapts and not math.isfinite(norm) and math.isfinite(loss)
        skips = overflowed or self._judge(readout.work, loss, norm) is OnAnomaly.SKIP
        self.loss_scale.update(overflowed)
        if overflowed:
            log.warning(
                "step %d skipped: loss scale now %g", readout.work.step, self.loss_scale.scale
            )
        if skips:
            self.parallel.skip()
        else:
            scale_gradients(self.parallel, factor)
            self.parallel.step(readout.work.rate)
        self._record(readout.work, loss, norm)

    def settle(self) -> None:
        """Read and record the numbers of the step that was launched last, if that is not done.

        Raises:
            RunError: the guard stops the run. Whatever is kept is kept after this.
        """
        readout, self.unread = self.unread, None
        if readout is not None:
            loss, norm = readout.read()
            action = self._judge(readout.work, loss, norm)
            assert action is not OnAnomaly.SKIP, "too late to skip it: see waits_for_numbers"
            self._record(readout.work, loss, norm)

    def _judge(self, work: Work, loss: float, norm: float) -> OnAnomaly | None:
        """What becomes of a step that is out of the ordinary, which is told; None: it is not.

        Raises:
            RunError: the run stops.
        """
        found = self.guard.judge(loss, norm)
        if found is None:
            return None
        samples = self.feed.samples(work.step - 1)
        if self.world.main:
            about = {"step": work.step, "time": time.time()}
            append_record(self.run.metrics_file, found.record() | samples | about)
        if found.action is OnAnomaly.STOP:
            raise RunError(found.told(work.step, samples))
        if self.world.main:
            log.warning("%s", found.told(work.step, samples))
        return found.action

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
            "memory_bytes": peak_memory(self.world.device),
            "seconds": seconds,
            "data_seconds": work.data_seconds,
            "time": time.time(),
        }
        append_record(self.run.metrics_file, record)
        log.info("step %d/%d loss %.4f", work.step, self.total_steps, loss)
        self.hooks.call("on_step", record)

    def save(self, step: int) -> None:
        """Begin to commit a checkpoint of the state after `step` steps."""
        self.settle()
        self.beat("save", step)
        state = {
            "progress": asdict(self.progress),
            "best_step": self.progress.best_step,
            "loss_scale": asdict(self.loss_scale),
            "guard": self.guard.state(),
        }
        started = time.perf_counter()
        self.checkpointer.save(step, self.parallel, state)
        if self.world.main:
            stalled = time.perf_counter() - started  # the rest happens beside the next steps
            record = {"kind": "save", "step": step, "stalled_seconds": stalled, "time": time.time()}
            append_record(self.run.metrics_file, record)
        self._tell_saves()  # before the one that has begun retires them

    def _tell_saves(self) -> None:
        while self.checkpointer.committed:
            step = self.checkpointer.committed.popleft()
            self.hooks.call("on_save", step, self.run.checkpoint(step))

    def evaluate(self, step: int) -> bool:
        """Append the held-out loss to the metrics, and samples; whether it is the best so far."""
        self.settle()
        if self.held_out is None or not len(self.held_out.rows):
            return False
        self.beat("evaluate", step)
        args = (self.held_out.rows, self.train.precision, self.world, self.hooks)
        loss, tokens = held_out_loss(self.parallel.forward, self.parallel.model, *args)
        self.parallel.rest()
        if self.world.main:
            record = {"kind": "eval", "step": step, "loss": loss, "supervised_tokens": tokens}
            record["time"] = time.time()
            append_record(self.run.metrics_file, record)
            log.info("step %d held-out loss %.4f", step, loss)
            self.hooks.call("on_evaluate", record)
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
