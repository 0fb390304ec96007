"""AdamW and the learning rate, the latter a pure function of the step."""

import math
from collections.abc import Mapping

import torch

from ditty.spec import Schedule, TrainSpec


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], train: TrainSpec
) -> torch.optim.AdamW:
    """AdamW with decoupled decay on matrices; vectors (norms, biases) are left alone."""
    groups = [
        {
            "params": [p for p in parameters.values() if p.ndim >= 2],
            "weight_decay": train.weight_decay,
        },
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in parameters.values())
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=fused,
    )


def learning_rate(step: int, total_steps: int, train: TrainSpec) -> float:
    """The rate of step `step` (from 0) of `total_steps`.

    As in transformers' schedules of the same names: warm-up starts at 0, and cosine and linear
    would reach 0 at step `total_steps`.
    """
    warmup = train.warmup_steps
    if step < warmup:
        return train.learning_rate * step / warmup
    if train.schedule is Schedule.CONSTANT:
        return train.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if train.schedule is Schedule.LINEAR:
        return train.learning_rate * max(0.0, 1.0 - progress)
    return train.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
