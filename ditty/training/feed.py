"""What the trainer eats: for each step, this rank's micro batches."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader

from ditty.config.choices import Sampling
from ditty.config.spec import TrainSpec
from ditty.distributed.world import World
from ditty.errors import DataError
from ditty.models.batches import Batch, Bounds, collate, flatten
from ditty.store.files import sha256_bytes
from ditty.training.rng import RngStream
from ditty.training.sampler import BatchSplit, SampleOrder


class Feed(Protocol):
    """Micro batches by step; step s gives the same batches whenever it is asked for.

    Attributes:
        bounds: what no micro batch exceeds; None: unknown.
    """

    bounds: Bounds | None

    def total_steps(self, train: TrainSpec) -> int:
        """Optimizer steps of the whole training."""
        ...

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """This rank's micro batches of step `start`, `start` + 1, and so on without end."""
        ...

    def samples(self, step: int) -> dict[str, list[int]]:
        """What that step takes on all ranks, for people: numbers, under the name of what they
        count."""
        ...


class PackedFeed:
    """Packed rows in a `SampleOrder`; any step is reached at once.

    Args:
        rows: a sequence of packed rows (tables of the `pack` stage).
        bounds: see `Feed`.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        order: SampleOrder,
        split: BatchSplit,
        bounds: Bounds | None = None,
    ):
        self.rows, self.order, self.split, self.bounds = rows, order, split, bounds

    def total_steps(self, train: TrainSpec) -> int:
        """`max_steps`, or as many as `epochs` passes take."""
        return train.max_steps or self.order.steps(train.epochs)

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """See `Feed`."""
        micro_batches = self.split.micro_batches(self.order, start)
        while True:
            group = islice(micro_batches, self.split.gradient_accumulation_steps)
            yield [collate([self.rows[i] for i in indices]) for indices in group]

    def samples(self, step: int) -> dict[str, list[int]]:
        """See `Feed`: numbers of packed rows, from 0."""
        size = self.order.global_batch_size
        return {"packed_rows": list(islice(self.order.samples(step * size), size))}


def packed_feed(rows: Any, train: TrainSpec, world: World) -> PackedFeed:
    """The feed of a `datasets.Dataset` of packed rows, dealt to the processes of `world`."""
    split = BatchSplit(
        train.micro_batch, train.gradient_accumulation_steps, world.rank, world.world_size
    )
    lengths = row_lengths(rows) if train.sampling is Sampling.LENGTH_GROUPED else None
    order = SampleOrder(len(rows), split.global_batch_size, train.sampling, train.seed, lengths)
    bounds = row_bounds(rows, train.micro_batch)
    # As arrays: lists of Python numbers would take milliseconds a step.
    return PackedFeed(rows.with_format("numpy"), order, split, bounds)


def row_bounds(rows: Any, together: int) -> Bounds:
    """What no `together` rows of a `datasets.Dataset` exceed, from Arrow's offsets and lengths."""
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    tokens = pc.max(pc.list_value_length(table["input_ids"])).as_py() or 1
    documents = pc.max(pc.list_value_length(table["lengths"])).as_py() or 1
    longest = pc.max(pc.list_flatten(table["lengths"])).as_py() or 1
    return Bounds(together * tokens, together * documents, longest)


def row_lengths(rows: Any) -> np.ndarray:
    """Tokens of each row of a `datasets.Dataset` [rows], from Arrow's offsets: no token is read."""
    import pyarrow.compute as pc

    table = rows.with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table["input_ids"]).to_numpy())


class LoaderFeed:
    """Any DataLoader: its batches in turn, pass after pass, dealt to the processes.

    Batch (s*A + a)*W + r of the endless sequence is micro batch a of step s on rank r. A resume
    reads and drops the batches before it. Each pass draws from generators of its own, seeded by
    the epoch (RngStream), so that a shuffling loader gives the same order again, and dropout does
    not notice. `loader.batch_sampler` may have `set_epoch(int)`, as ditty's own has.
    """

    def __init__(self, loader: DataLoader[Any], accumulation: int, world: World):
        if len(loader) < 1:
            raise DataError("the DataLoader of dataset() is empty")
        self.loader, self.accumulation, self.world = loader, accumulation, world
        self.bounds: Bounds | None = None

    def total_steps(self, train: TrainSpec) -> int:
        """`max_steps`, or as many as `epochs` passes take."""
        a_step = self.accumulation * self.world.world_size
        return train.max_steps or int(np.ceil(train.epochs * len(self.loader) / a_step))

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        for epoch in count():
            for sampler in (self.loader.batch_sampler, self.loader.sampler):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            stream = RngStream(int(sha256_bytes(f"ditty loader {epoch}".encode())[:8], 16))
            batches: Iterator[Any] = stream.run(partial(iter, self.loader))
            while (batch := stream.run(partial(next, batches, None))) is not None:
                yield batch

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """See `Feed`."""
        a_step = self.accumulation * self.world.world_size
        batches = islice(self._batches(), start * a_step, None)
        while True:
            group = list(islice(batches, a_step))
            yield [flatten(b) for b in group[self.world.rank :: self.world.world_size]]

    def samples(self, step: int) -> dict[str, list[int]]:
        """See `Feed`: numbers of batches in the endless sequence, from 0."""
        a_step = self.accumulation * self.world.world_size
        return {"batches": list(range(step * a_step, (step + 1) * a_step))}
