"""Several sources as one: one after the other, or drawn by weight."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ditty.config.choices import StoppingStrategy
from ditty.config.dataspec import DataSpec
from ditty.dataset import tables

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

DRAWN_AT_ONCE = 1000
"""Part of the order: `datasets.interleave_datasets` draws as many."""


def weights(data: DataSpec) -> list[float]:
    """The weights of all sources; empty where they have none."""
    return [part.weight for part in data.sources if part.weight is not None]


def mix(data: DataSpec, parts: "Sequence[pa.Table]") -> "tuple[pa.Schema, Iterator[pa.Table]]":
    """The rows of `data.sources`, given as a table each, with the columns of all.

    Without weights this ends after the last source; with them as `data.stopping_strategy` says.

    Raises:
        DataError: a column has types in two sources that do not go together.
    """
    schema: pa.Schema | None = None
    names = [part.source for part in data.sources]
    for name, table in zip(names, parts, strict=True):
        schema = tables.merged(schema, table.schema, name)
    assert schema is not None, "there are sources"
    if not weights(data):
        return schema, _in_line(names, parts, schema)
    lengths = [table.num_rows for table in parts]
    draws = draw(lengths, weights(data), data.seed, data.stopping_strategy)
    return schema, _interleaved(names, parts, draws, schema)


def draw(
    lengths: Sequence[int], weights: Sequence[float], seed: int, until: StoppingStrategy
) -> "Iterator[np.ndarray]":
    """Which source each row is the next one of: the order of `datasets.interleave_datasets`.

    Args:
        lengths: rows of each source, at least 1.
        weights: above 0; their sum may be any.
    Yields:
        int [n], n <= DRAWN_AT_ONCE: numbers of sources.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    given = np.zeros(len(lengths), np.int64)
    while True:
        drawn = generator.choice(len(lengths), size=DRAWN_AT_ONCE, p=shares)
        rows = given + np.cumsum(drawn[:, None] == np.arange(len(lengths)), axis=0)
        exhausted = rows >= np.asarray(lengths)
        first = until is StoppingStrategy.FIRST_EXHAUSTED
        ends = np.flatnonzero(exhausted.any(axis=1) if first else exhausted.all(axis=1))
        if len(ends):
            yield drawn[: ends[0] + 1]
            return
        yield drawn
        given = rows[-1]


def _in_line(
    names: Sequence[str], parts: "Sequence[pa.Table]", schema: "pa.Schema"
) -> "Iterator[pa.Table]":
    for name, table in zip(names, parts, strict=True):
        for start in range(0, table.num_rows, tables.BATCH_ROWS):
            yield tables.conform(table.slice(start, tables.BATCH_ROWS), schema, name)


def _interleaved(
    names: Sequence[str],
    parts: "Sequence[pa.Table]",
    draws: "Iterable[np.ndarray]",
    schema: "pa.Schema",
) -> "Iterator[pa.Table]":
    import numpy as np
    import pyarrow as pa

    given = [0] * len(parts)
    for drawn in draws:
        pieces = []
        for number, table in enumerate(parts):
            count = int((drawn == number).sum())
            found = _next(table, given[number], count)
            pieces += [tables.conform(piece, schema, names[number]) for piece in found]
            given[number] += count
        # The pieces stand source by source; each row goes to where it was drawn.
        places = np.argsort(np.argsort(drawn, kind="stable"))
        yield pa.concat_tables(pieces).combine_chunks().take(pa.array(places))


def _next(table: "pa.Table", start: int, count: int) -> "Iterator[pa.Table]":
    """`count` rows from `start` on, as slices; after the last row comes the first again."""
    while count:
        piece = table.slice(start % table.num_rows, count)
        yield piece
        start, count = start + piece.num_rows, count - piece.num_rows
