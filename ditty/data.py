"""`Data`: a data set prepared step by step for a DataLoader; the library's side of the data stages.

Each operation of `prepare` is an artifact of the store, keyed as in the flow by the rows before it
and the function's source, so that a second run, another process or another rank finds it there.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ditty.config.choices import Sampling
from ditty.dataset import functions, tables
from ditty.dataset.encoding import IGNORED
from ditty.errors import DataError
from ditty.store.artifacts import Store
from ditty.store.files import canonical_json, locked, sha256_bytes, sha256_file
from ditty.training.feed import row_lengths
from ditty.training.sampler import SampleOrder

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Step = tuple[str, Callable[..., Any] | None, dict[str, Any]]

MODEL_COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(kw_only=True)
class Data:
    """Loads, transforms, orders and batches rows.

    Attributes:
        tokenizer: pads batches; its model_input_names are the columns that stay.
        dataset: the rows, or `load_args` and `load_kwargs`: arguments of `datasets.load_dataset`.
        split: which split of what those load, where they do not say.
        seed: of the order of rows.
        batch_size: rows a batch; grad_accum: batches a step (rows of similar length are grouped
            over batch_size x grad_accum).
        group_by_length: batch rows of similar length, by `length_column` or the tokens.
        collator: list of rows -> batch; by default pads input_ids, attention_mask and labels.
        remove_unused_columns: drop what the model does not take before collating.
        cache: keep each operation in the store. Without it lambdas and closures are welcome.
    """

    tokenizer: "PreTrainedTokenizerBase"
    dataset: "datasets.Dataset | None" = None
    load_args: Sequence[Any] = ()
    load_kwargs: dict[str, Any] | None = None
    split: str = "train"
    seed: int = 0
    batch_size: int = 8
    grad_accum: int = 1
    group_by_length: bool = False
    length_column: str | None = None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    remove_unused_columns: bool = True
    cache: bool = True
    store: Store = field(default_factory=Store)

    def __post_init__(self) -> None:
        if self.dataset is None:
            if not (self.load_args or self.load_kwargs):
                raise DataError("Data needs dataset=..., or load_args=... or load_kwargs=...")
            options = self.load_kwargs or {}
            import datasets

            loaded = datasets.load_dataset(*self.load_args, **options)
            self.dataset = loaded if "split" in options else loaded[self.split]

    def prepare(self, pipeline: Sequence[Step]) -> DataLoader[Any]:
        """Apply operations in order, and return the batches.

        Args:
            pipeline: (name of a `datasets.Dataset` method, function or None, its other arguments).
        Raises:
            DataError: no such method, nothing left, or a function that cannot be a cache key.
        """
        key = ""
        for number, (method, function, kwargs) in enumerate(pipeline):
            if not hasattr(self.dataset, method):
                raise DataError(f"operation {number}: datasets.Dataset has no method {method!r}")
            if self.cache:
                key = self._cached(key, method, function, kwargs)
            else:
                self.dataset = self._apply(method, function, kwargs)
            if len(self.rows) == 0:
                raise DataError(f"operation {number}, {method}, leaves no row")
        return self.loader()

    @property
    def rows(self) -> "datasets.Dataset":
        """The rows as they stand."""
        assert self.dataset is not None
        return self.dataset

    def _apply(self, method: str, function: Callable[..., Any] | None, kwargs: Any) -> Any:
        arguments = [] if function is None else [function]
        return getattr(self.rows, method)(*arguments, **kwargs)

    def _cached(
        self, before: str, method: str, function: Callable[..., Any] | None, kwargs: dict[str, Any]
    ) -> str:
        """Find or make the artifact of one operation; returns its key."""
        try:
            options = canonical_json(kwargs).decode()
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{method}: its arguments cannot be a cache key ({error}): pass plain values, "
                "or Data(cache=False)"
            ) from error
        inputs = {
            "rows": before or content_key(self.rows),
            "method": method,
            "function": None if function is None else functions.digest(function),
            "options": options,
        }
        key = sha256_bytes(canonical_json({"stage": "prepare", "version": 1, "inputs": inputs}))
        lock = self.store.lock("prepare", key)

        def make(out: Path) -> dict[str, Any]:
            made = self._apply(method, function, kwargs)
            write_rows(out / "data.arrow", made)
            return {"rows": len(made)}

        with locked(lock.path):
            self.store.build("prepare", key, {"stage": "prepare", "inputs": inputs}, make)
        self.dataset = read_rows(self.store.path("prepare", key) / "data.arrow")
        return key

    def loader(self) -> DataLoader[Any]:
        """The batches of the rows as they stand; the order depends on seed and epoch alone."""
        rows = self.rows
        if self.remove_unused_columns:
            known = {*MODEL_COLUMNS, *self.tokenizer.model_input_names}
            rows = rows.select_columns([c for c in rows.column_names if c in known])
        sampling = Sampling.LENGTH_GROUPED if self.group_by_length else Sampling.RANDOM
        lengths = self._lengths() if self.group_by_length else None
        group = self.batch_size * self.grad_accum
        order = SampleOrder(len(rows), group, sampling, self.seed, lengths)
        return DataLoader(
            rows,
            batch_sampler=EpochBatches(order, self.batch_size),
            collate_fn=self.collator or self.pad,
        )

    def _lengths(self) -> np.ndarray:
        if self.length_column:
            return np.asarray(self.rows[self.length_column])
        return row_lengths(self.rows)

    def pad(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The default collator: [B, T] int64, T the longest row; labels of padding are ignored.

        Rows without labels are supervised throughout, their end token too, also where the
        padding token is the same: padding is told by its place, not by its value.
        """
        width = max(len(row["input_ids"]) for row in rows)
        pad_id = self.tokenizer.pad_token_id
        filler = 0 if pad_id is None else pad_id  # masked out whatever it is

        def padded(values: Any, fill: int) -> list[int]:
            values = list(values)
            return values + [fill] * (width - len(values))

        masks = [row.get("attention_mask") or [1] * len(row["input_ids"]) for row in rows]
        labels = [
            row.get("labels")
            or [t if m else IGNORED for t, m in zip(row["input_ids"], mask, strict=True)]
            for row, mask in zip(rows, masks, strict=True)
        ]
        return {
            "input_ids": torch.tensor([padded(row["input_ids"], filler) for row in rows]),
            "attention_mask": torch.tensor([padded(mask, 0) for mask in masks]),
            "labels": torch.tensor([padded(label, IGNORED) for label in labels]),
        }


class EpochBatches(Sampler[list[int]]):
    """Batches of row numbers; another order each epoch, the same each time it is asked for."""

    def __init__(self, order: SampleOrder, batch_size: int):
        self.order, self.batch_size, self.epoch = order, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order.epoch(self.epoch).tolist()
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(self.order.num_rows / self.batch_size)


def write_rows(path: Path, dataset: "datasets.Dataset") -> None:
    """A data set as one Arrow file of ours: equal rows, equal bytes."""
    batches = dataset.with_format("arrow").iter(tables.BATCH_ROWS)
    tables.write(path, batches, dataset.features.arrow_schema)


def read_rows(path: Path) -> "datasets.Dataset":
    """A file of `write_rows`, or of a data stage, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(path))


def content_key(dataset: "datasets.Dataset") -> str:
    """SHA-256 of a data set's rows: `datasets`' own fingerprints hit falsely (datasets#3297)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.arrow"
        write_rows(path, dataset)
        return sha256_file(path)
