"""A step's numbers, read from the device when they are there: nothing waits for them meanwhile.

A process that reads a number from its GPU waits until the GPU is done, and then the GPU waits for
the process. So the trainer launches a step, and reads the numbers of the one before
(`waits_for_numbers` says where it does not).
"""

import math
from dataclasses import dataclass

import torch

from ditty.config.choices import Precision
from ditty.config.spec import TrainSpec


@dataclass(frozen=True)
class Work:
    """What is known of a step before it runs, over all processes.

    Attributes:
        step: its number, from 1.
        rate: learning rate.
        supervised, tokens: tokens that enter the loss, and all.
        terms: over which the loss is a mean: the supervised tokens, unless a loss of the caller's
            has others.
        data_seconds: time this process waited for its data.
    """

    step: int
    rate: float
    supervised: int
    tokens: int
    terms: int
    data_seconds: float


class Readout:
    """The numbers of a step, on their way to the host.

    Args:
        sums: fp64 [2], summed over processes: the loss in nats, and the squared L2 norm of the
            gradients.
        scale: by which the gradients are too large (fp16's loss scale).
    """

    def __init__(self, work: Work, sums: torch.Tensor, scale: float):
        self.work, self._scale = work, scale
        self._there: torch.cuda.Event | None = None
        if sums.is_cuda:
            host = torch.empty_like(sums, device="cpu", pin_memory=True)
            sums = host.copy_(sums, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()
        self._sums = sums

    def read(self) -> tuple[float, float]:
        """(mean loss of a term, L2 norm of the gradients); waits for the step."""
        if self._there is not None:
            self._there.synchronize()
        total, squared = self._sums.tolist()
        norm = (math.sqrt(squared) if squared >= 0 else math.nan) / self._scale
        return total / max(self.work.terms, 1), norm


def waits_for_numbers(train: TrainSpec, device: torch.device) -> bool:
    """Whether a step's numbers are seen before it is taken, rather than a step later.

    Where that costs nothing, and where a skip, fp16's loss scale or gradients on the host need it.
    """
    on_host = device.type == "cpu" or train.cpu_offload
    return on_host or train.skips or train.precision is Precision.FP16


def clip_factor(squared: torch.Tensor, max_norm: float, scale: float) -> torch.Tensor:
    """By what gradients are multiplied so that their norm is `max_norm` at most; fp32 scalar.

    Source: torch.nn.utils.clip_grad_norm_, whose 1e-6 this is.

    Args:
        squared: their squared L2 norm, fp64 scalar.
        scale: by which they are too large; the factor takes it away.
    """
    norm = squared.sqrt() / scale
    return ((max_norm / (norm + 1e-6)).clamp(max=1.0) / scale).float()
