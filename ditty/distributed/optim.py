"""The optimizers, and the learning rate as a pure function of the step.

Both are the libraries' own: torch's and bitsandbytes' optimizers, transformers' schedules.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import lru_cache, partial
from typing import Any

import torch
from transformers.optimization import get_scheduler

from ditty.config import legal
from ditty.config.choices import SCHEDULE_OPTIONS, Optimizer, Schedule
from ditty.config.spec import TrainSpec
from ditty.errors import RunError, SpecError

Group = dict[str, Any]
Make = Callable[[list[Group]], torch.optim.Optimizer]
MakeOptimizer = Callable[[Mapping[str, torch.nn.Parameter], TrainSpec], torch.optim.Optimizer]

BITSANDBYTES = {
    Optimizer.ADAMW_8BIT: "AdamW8bit",
    Optimizer.PAGED_ADAMW: "PagedAdamW32bit",
    Optimizer.PAGED_ADAMW_8BIT: "PagedAdamW8bit",
    Optimizer.LION: "Lion32bit",
    Optimizer.LION_8BIT: "Lion8bit",
    Optimizer.PAGED_LION: "PagedLion32bit",
    Optimizer.PAGED_LION_8BIT: "PagedLion8bit",
}
PAGED = {o for o, name in BITSANDBYTES.items() if name.startswith("Paged")}
LION = {o for o, name in BITSANDBYTES.items() if "Lion" in name}

# What transformers' causal LMs call their embeddings and heads.
NO_HIDDEN_MATRIX = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|shared|(\w+_)?head|proj_out|output_projection)\."
)


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], train: TrainSpec
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over `parameters` (name -> tensor of any shape).

    Decay is decoupled and for matrices only; vectors (norms, biases) are left alone. Tensors
    without elements, as a process gets of a matrix with fewer rows than processes, are left out:
    they have no entry in `state`. `lr` is a plain float in each of `param_groups`.

    adam_beta1, adam_beta2 and adam_epsilon are AdamW's, the 8-bit and paged ones included. Lion
    (betas 0.9 and 0.99), Adafactor and Muon (momentum 0.95) keep their libraries' defaults. 8-bit
    state is kept of tensors of 4,096 elements and more, 32-bit state of smaller ones.

    Raises:
        SpecError: `train.optimizer` needs a GPU, and the parameters are elsewhere.
    """
    present = {name: p for name, p in parameters.items() if p.numel()}
    on_gpu = all(p.is_cuda for p in present.values())
    if train.optimizer in PAGED and not on_gpu:
        devices = ", ".join(sorted({p.device.type for p in present.values()}))
        raise SpecError(
            f"train.optimizer: {train.optimizer} pages its state between an NVIDIA GPU and the "
            f"host: expected trained weights on cuda, got {devices}; "
            f"use train.optimizer: {train.optimizer.removeprefix('paged_')}, or a GPU"
        )
    if train.optimizer is Optimizer.MUON:
        return _muon(present, train, fused=on_gpu)
    return _maker(train, fused=on_gpu)(_groups(present.values(), train.weight_decay))


def refuse_hidden_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, whose `step` raises from now on where a checkpoint would miss something.

    A checkpoint holds the tensors and whole numbers of `state`, by parameter. What else changes
    from step to step, in `param_groups` for example, would begin anew at a resume.

    Raises:
        RunError: by each `step`, where there is such a thing.
    """
    before = _settings(optimizer)
    name = type(optimizer).__name__

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        changed = [
            f"param_groups[{index}][{key!r}], which changed"
            for index, (old, new) in enumerate(zip(before, _settings(optimizer), strict=True))
            for key in new
            if key not in old or not _equal(old[key], new[key])
        ]
        odd = [
            f"state[...][{key!r}], a {type(value).__name__}"
            for state in optimizer.state.values()
            for key, value in state.items()
            if not isinstance(value, torch.Tensor | int)
        ]
        for what in (*changed, *odd):
            raise RunError(
                f"the optimizer {name} keeps {what}: a checkpoint holds tensors and whole numbers "
                "of its state by parameter, so a resume would go on otherwise. Keep it there, or "
                "use another optimizer"
            )

    optimizer.register_step_post_hook(check)
    return optimizer


def _settings(optimizer: torch.optim.Optimizer) -> list[Group]:
    groups = optimizer.param_groups
    return [{k: copy(v) for k, v in g.items() if k not in ("params", "lr")} for g in groups]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[Group]:
    """Matrices with decay and vectors without; one empty group where there is nothing."""
    matrices: Group = {"params": [], "weight_decay": weight_decay}
    vectors: Group = {"params": [], "weight_decay": 0.0}
    for parameter in parameters:
        (matrices if parameter.ndim >= 2 else vectors)["params"].append(parameter)
    return [group for group in (matrices, vectors) if group["params"]] or [matrices]


def _maker(train: TrainSpec, *, fused: bool) -> Make:
    """What makes the optimizer of `train.optimizer`, or Muon's AdamW, from groups."""
    kind, rate = train.optimizer, train.learning_rate
    betas = (train.adam_beta1, train.adam_beta2)
    if kind is Optimizer.ADAFACTOR:
        return partial(torch.optim.Adafactor, lr=rate)
    if kind not in BITSANDBYTES:
        # On CPUs the plain loop: torch's fused one rounds differently.
        adamw = partial(torch.optim.AdamW, lr=rate, betas=betas, eps=train.adam_epsilon)
        return partial(adamw, fused=fused)
    import bitsandbytes.optim

    made = getattr(bitsandbytes.optim, BITSANDBYTES[kind])
    if kind in PAGED:
        made = _keeps_pages(made)
    if kind in LION:
        return partial(made, lr=rate)
    return partial(made, lr=rate, betas=betas, eps=train.adam_epsilon)


def _keeps_pages(paged: Any) -> Any:
    """A class of bitsandbytes whose state is in paged memory after `load_state_dict` too.

    Its own puts loaded state into ordinary GPU memory, so that a run that fits when it starts
    would not fit when it resumes.
    """

    class KeepsPages(paged):
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            for parameter, state in self.state.items():
                for key, value in state.items():
                    if key in ("state1", "state2"):
                        state[key] = self.get_state_buffer(parameter, dtype=value.dtype)
                        state[key].copy_(value)
                    elif isinstance(value, torch.Tensor):
                        state[key] = value.to(parameter.device)

    KeepsPages.__name__ = KeepsPages.__qualname__ = paged.__name__
    return KeepsPages


def _muon(
    parameters: Mapping[str, torch.nn.Parameter], train: TrainSpec, *, fused: bool
) -> torch.optim.Optimizer:
    """Muon for the hidden layers' matrices, AdamW for embeddings, head and all that is no matrix.

    Muon's learning rate is scaled by 0.2 sqrt(max(rows, columns)) ("match_rms_adamw"), which gives
    its updates the size of AdamW's, so that one `learning_rate` and `weight_decay` fit both.
    Source: torch.optim.Muon's documentation; arXiv:2502.16982, section 2.2.
    """
    hidden = {n for n, p in parameters.items() if p.ndim == 2 and not NO_HIDDEN_MATRIX.search(n)}
    adamw = _maker(train, fused=fused)
    if not hidden:
        return adamw(_groups(parameters.values(), train.weight_decay))
    muon = torch.optim.Muon(
        [parameters[n] for n in parameters if n in hidden],
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [p for n, p in parameters.items() if n not in hidden]
    return Together(muon, adamw(_groups(rest, train.weight_decay))) if rest else muon


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one: one `state`, one list of `param_groups`."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own state and groups."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:end]
            start = end

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`, with new objects for state and groups."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> None:
        """One step of each part."""
        assert closure is None, "a closure would be evaluated once a part"
        for part in self.parts:
            part.step()


def learning_rate(step: int, total_steps: int, train: TrainSpec) -> float:
    """The rate of step `step` (from 0) of `total_steps`, as transformers' schedule gives it.

    `constant` is transformers' constant_with_warmup. Where transformers asks for an option that
    `train.schedule_options` does not give: cosine_with_min_lr and cosine_warmup_with_min_lr end at
    a tenth of the peak (min_lr_rate 0.1), and warmup_stable_decay decays over the last tenth of
    the steps, or over what `num_stable_steps` leaves.

    Raises:
        Exception: an option is out of its range, which `check_schedule`, to be called first,
            refuses.
    """
    options = tuple(sorted(_schedule_options(train).items()))
    factor = _factor(train.schedule, total_steps, train.warmup_steps, train.learning_rate, options)
    return float(train.learning_rate * factor(step))


def check_schedule(train: TrainSpec) -> None:
    """Refuse schedule_options that transformers' schedule cannot work with.

    Needs no model and no data; the steps are `max_steps`, or assumed.

    Raises:
        SpecError: an option is out of its range.
    """
    total = train.max_steps or train.warmup_steps + 1000
    for step in (0, min(train.warmup_steps, total - 1), total - 1):
        try:
            rate = learning_rate(step, total, train)
        except (ArithmeticError, ValueError) as error:
            raise _refused(train, f"{error} (step {step} of {total})") from error
        if not (math.isfinite(rate) and rate >= 0):
            raise _refused(train, f"the learning rate of step {step} of {total} would be {rate}")


def _refused(train: TrainSpec, reason: str) -> SpecError:
    return SpecError(
        f"train.schedule_options {train.schedule_options} do not go with schedule: "
        f"{train.schedule}, learning_rate: {train.learning_rate} and warmup_steps: "
        f"{train.warmup_steps}: {reason}; expected {legal.schedule_options(train.schedule)}, as "
        "transformers documents them; correct or remove them"
    )


def _name(schedule: Schedule) -> str:
    return "constant_with_warmup" if schedule is Schedule.CONSTANT else schedule.value


def _schedule_options(train: TrainSpec) -> dict[str, Any]:
    """`train.schedule_options` with whole numbers as int."""
    kinds = SCHEDULE_OPTIONS[train.schedule]
    given = train.schedule_options.items()
    return {name: int(value) if kinds[name] is int else value for name, value in given}


@lru_cache(maxsize=64)
def _factor(
    schedule: Schedule,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    options: tuple[tuple[str, Any], ...],
) -> Callable[[int], float]:
    """Step -> factor of the peak rate: the function inside transformers' scheduler."""
    chosen = dict(options)
    if schedule in (Schedule.COSINE_WITH_MIN_LR, Schedule.COSINE_WARMUP_WITH_MIN_LR):
        if not {"min_lr", "min_lr_rate"} & set(chosen):
            chosen["min_lr_rate"] = 0.1
    elif schedule is Schedule.WARMUP_STABLE_DECAY and "num_decay_steps" not in chosen:
        left = total_steps - warmup_steps
        stable = chosen.get("num_stable_steps", left - min(left, total_steps // 10))
        chosen["num_decay_steps"] = max(1, left - stable)
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(_name(schedule), dummy, warmup_steps, total_steps, chosen)
    (factor,) = scheduler.lr_lambdas
    return factor
