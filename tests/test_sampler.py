"""The order of samples: a permutation an epoch, the same from any step on, and pinned."""

import numpy as np

from ditty.config.choices import Sampling
from ditty.training.sampler import BatchSplit, SampleOrder


def test_order_is_a_permutation_and_seekable():
    lengths = np.array([(i * 7) % 13 + 1 for i in range(37)])
    for sampling in Sampling:
        order = SampleOrder(37, 4, sampling, seed=3, lengths=lengths)
        stream = order.samples(0)
        first = [next(stream) for _ in range(37 * 3)]
        assert all(sorted(first[i : i + 37]) == list(range(37)) for i in (0, 37, 74))
        middle = order.samples(50)
        assert [next(middle) for _ in range(20)] == first[50:70]
    assert SampleOrder(37, 4, Sampling.RANDOM, 3).epoch(0).tolist() != first[:37]
    # The stream is pinned: a new numpy must not reorder anybody's run.
    assert SampleOrder(6, 2, Sampling.RANDOM, 0).epoch(0).tolist() == [5, 2, 1, 4, 3, 0]
    split = [BatchSplit(2, 2, rank, 2) for rank in range(2)]
    order = SampleOrder(37, 8, Sampling.RANDOM, 3)
    a, b = (s.micro_batches(order, 1) for s in split)
    got = [*next(a), *next(b), *next(a), *next(b)]
    samples = order.samples(8)
    assert got == [next(samples) for _ in range(8)]
