"""The order of rows: a pure function of (seed, epoch, position), so that any step can be revisited.

Samples form one endless sequence: epoch 0's permutation, then epoch 1's, and so on. Step s takes
samples s*G to (s+1)*G - 1, G the global batch size; a batch may span two epochs. Which process
and micro batch a sample goes to depends on G's split, the sample's step never does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ditty.config.choices import Sampling
from ditty.store.files import sha256_bytes

MEGABATCH = 50  # global batches that are shuffled together before sorting by length


@dataclass(frozen=True)
class SampleOrder:
    """The sequence of row numbers of a run.

    Attributes:
        num_rows: rows in the data set, at least 1.
        global_batch_size: rows a step over all processes.
        lengths: tokens a row [num_rows], needed for `length_grouped`.
    """

    num_rows: int
    global_batch_size: int
    sampling: Sampling
    seed: int
    lengths: np.ndarray | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """Row numbers [num_rows] in the order of this epoch."""
        if self.sampling is Sampling.SEQUENTIAL:
            return np.arange(self.num_rows)
        # RandomState's stream is frozen for ever (NEP 19); Generator's and torch's are not.
        digest = sha256_bytes(f"ditty order {self.seed} {epoch}".encode())
        order = np.random.RandomState(int(digest[:8], 16)).permutation(self.num_rows)
        if self.sampling is Sampling.RANDOM:
            return order
        assert self.lengths is not None, "length_grouped needs lengths"
        size = MEGABATCH * self.global_batch_size
        chunks = [order[i : i + size] for i in range(0, self.num_rows, size)]
        return np.concatenate([c[np.argsort(-self.lengths[c], kind="stable")] for c in chunks])

    def samples(self, start: int) -> Iterator[int]:
        """Row numbers from position `start` of the endless sequence."""
        epoch, offset = divmod(start, self.num_rows)
        while True:
            yield from (int(row) for row in self.epoch(epoch)[offset:])
            epoch, offset = epoch + 1, 0

    def steps(self, epochs: float) -> int:
        """Optimizer steps that cover `epochs` passes, the last batch filled from the next pass."""
        return math.ceil(epochs * self.num_rows / self.global_batch_size)


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is dealt to processes: micro batch a of rank r takes rows
    [(a*world_size + r) * micro_batch_size, ... + micro_batch_size)."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Rows a step over all processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def micro_batches(self, order: SampleOrder, start_step: int) -> Iterator[list[int]]:
        """This rank's micro batches (row numbers), from `start_step` on, without end."""
        assert order.global_batch_size == self.global_batch_size
        samples = order.samples(start_step * self.global_batch_size)
        size, ranks = self.micro_batch_size, self.world_size
        while True:
            group = [next(samples) for _ in range(size * ranks)]
            yield group[self.rank * size : (self.rank + 1) * size]
