"""Row operations: methods of `datasets.Dataset` over a table, without its caches.

Its fingerprints are not used (see `functions.digest`), and its cache files live in a temporary
directory: the stage's own artifact is the cache.
"""

import contextlib
import difflib
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditty.config.choices import OperationMethod
from ditty.config.dataspec import Operation
from ditty.dataset import functions, tables
from ditty.dataset.sources import DATA
from ditty.errors import DataError, DittyError
from ditty.store.artifacts import read_manifest

PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Part:
    """A part of the rows, which may be all, and how an operation is to be applied to it.

    Attributes:
        rows: these, whole batches of `tables.BATCH_ROWS` from the first row on; None: all.
        num_proc: processes. A batched function runs in one, since more would move the borders of
            its batches.
        types: `datasets.Features` that `map` is to make, as `first_types` has found them.
    """

    rows: range | None = None
    num_proc: int = 1
    types: Any = None


def apply(operation: Operation, source: Path, out: Path, part: Part) -> dict[str, Any]:
    """Apply one operation to `source/data.arrow`; the result is `out/data.arrow`.

    Neither the number of processes nor the parts change the result.

    Returns:
        rows_in, rows, columns.

    Raises:
        DataError: the function cannot be found, raises (names the row), or returns what the
            method cannot use; the method refuses its arguments, a column is missing; or no row is
            left, of all.
    """
    before = _rows(source, part.rows)
    if operation.method is OperationMethod.MAP and _processes(operation, before, part) > 1:
        part = replace(part, types=part.types or first_types(operation, source, out))
    with _applied(operation, before, out, part) as after:
        schema = after.features.arrow_schema.remove_metadata()
        batches = after.with_format("arrow").iter(batch_size=tables.BATCH_ROWS)
        rows = tables.write(out / DATA, batches, schema)
    if part.rows is None:
        _check_left(rows, before.num_rows, operation)
    return {"rows_in": before.num_rows, "rows": rows, "columns": schema.names}


def first_types(operation: Operation, source: Path, out: Path) -> Any:
    """The types that `map` finds in its first rows, and that the rest is converted to.

    `datasets` looks again in each process and part, and fails where these find others: floats in
    one and only whole numbers in the next. `out` is for what it writes meanwhile. None: it leaves
    no row.

    Raises:
        DataError: see `apply`.
    """
    for first in range(0, tables.read(source / DATA).num_rows, tables.BATCH_ROWS):
        part = Part(range(first, first + tables.BATCH_ROWS))
        with _applied(operation, _rows(source, part.rows), out, part) as after:
            if after.num_rows:
                return after.features
    return None


def merge(operation: Operation, parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Put what `apply` has made of parts together, in their order: its result for all rows.

    Raises:
        DataError: no row is left.
    """
    read = [tables.read(part / DATA) for part in parts]
    found = [read_manifest(part).facts for part in parts]
    batches = (batch for table in read for batch in table.to_batches())
    rows = tables.write(out / DATA, batches, read[0].schema)
    rows_in = sum(facts["rows_in"] for facts in found)
    _check_left(rows, rows_in, operation)
    return {"rows_in": rows_in, "rows": rows, "columns": found[0]["columns"]}


def _check_left(rows: int, of: int, operation: Operation) -> None:
    if rows == 0:
        raise DataError(f"operation {operation.describe()} leaves none of {of} rows")


def _rows(source: Path, part: range | None) -> Any:
    import datasets

    rows = datasets.Dataset.from_file(str(source / DATA))
    if part is None:
        return rows
    return rows.select(range(part.start, min(part.stop, rows.num_rows)), new_fingerprint="ditty")


@contextlib.contextmanager
def _applied(operation: Operation, before: Any, out: Path, part: Part) -> Iterator[Any]:
    """The data set after the operation, for the block; its caches are below `out` meanwhile."""
    label = f"operation {operation.describe()}"
    with (
        functions.importable(),
        tempfile.TemporaryDirectory(prefix=".ditty-", dir=out) as scratch,
        _quiet(),
        _environment(),
    ):
        yield _run(before, operation, label, Path(scratch), part)


def _run(before: Any, operation: Operation, label: str, scratch: Path, part: Part) -> Any:
    """The data set after the operation.

    Raises:
        DataError: what the method refuses, or the rows that came back do not fit one table.
    """
    try:
        if operation.function is None:
            return _by_name(before, operation, scratch)
        function = functions.resolve(operation.function)
        if operation.method is OperationMethod.SELECT:
            numbers = _numbers(before, function, operation, label)
            return before.select(numbers, new_fingerprint="ditty", **_order_in(scratch))
        _check_removed(operation, before.column_names, label)
        first = part.rows.start if part.rows else 0
        return _by_row(before, _Call(function, operation, label, first), scratch, part)
    except DataError:
        raise
    except (TypeError, ValueError, LookupError) as error:  # Arrow's errors are of these kinds
        raise DataError(
            f"{label}: {type(error).__name__}: {error}; the data has the columns "
            f"{', '.join(before.column_names)}"
        ) from error


def _by_name(before: Any, operation: Operation, scratch: Path) -> Any:
    """A method that takes no function; without a place of its own its cache is the source's."""
    import datasets

    options = dict(operation.kwargs)
    if operation.method is OperationMethod.CAST_COLUMN:
        features = before.features
        features[options["column"]] = datasets.Value(options["feature"])
        # As `cast_column` does, which takes no place for its cache.
        place = {"cache_file_name": str(scratch / "result.arrow"), "load_from_cache_file": False}
        return before.cast(features, **place)
    if operation.method in (OperationMethod.SORT, OperationMethod.SHUFFLE):
        options |= {"load_from_cache_file": False, **_order_in(scratch)}
    return getattr(before, operation.method.value)(**options)


def _order_in(scratch: Path) -> dict[str, str]:
    return {"indices_cache_file_name": str(scratch / "order.arrow")}


def _numbers(
    before: Any, function: Callable[..., Any], operation: Operation, label: str
) -> list[int]:
    """The numbers of rows that the function returns."""
    try:
        numbers = [operator.index(number) for number in function(before, **operation.kwargs)]
    except DittyError:
        raise
    except Exception as error:  # the user's code ran: anything can come out of it
        raise DataError(f"{label} failed: {type(error).__name__}: {error}") from error
    for number in numbers:
        if not 0 <= number < before.num_rows:
            raise DataError(f"{label} returned row {number}, the data has {before.num_rows} rows")
    return numbers


class _Call:
    """The user's function with errors that say where; pickled by name for worker processes."""

    def __init__(self, function: Callable[..., Any], operation: Operation, label: str, first: int):
        self.function = function
        self.operation = operation
        self.label = label
        self.first = first  # the number of the first row

    def __call__(self, row: Any, index: Any) -> Any:
        """Call it with a row and its number, or with columns and a list of numbers."""
        try:
            result = self.function(row, **self.operation.kwargs)
        except DittyError:
            raise
        except Exception as error:  # the user's code ran: anything can come out of it
            raise DataError(
                f"{self.label} failed at {self._where(index)}: {type(error).__name__}: {error}"
            ) from error
        problem = self._problem(result, index)
        if problem:
            raise DataError(f"{self.label} at {self._where(index)}: {problem}")
        return result

    def _where(self, index: Any) -> str:
        if not self.operation.batched:
            return f"row {self.first + index}"
        if not index:
            return "no rows"
        return f"rows {self.first + index[0]} to {self.first + index[-1]}"

    def _problem(self, result: Any, index: Any) -> str | None:
        got = f"returned {type(result).__name__} {str(result)[:40]}"
        if self.operation.method is OperationMethod.MAP:
            return None if hasattr(result, "keys") else f"{got}, expected a dict of columns"
        if result is None:
            return f"{got}, expected true or false"
        if self.operation.batched and len(result) != len(index):
            return f"returned {len(result)} values for {len(index)} rows"
        return None


def _by_row(before: Any, call: _Call, scratch: Path, part: Part) -> Any:
    """`Dataset.filter` or `Dataset.map`, its caches off or in `scratch`."""
    operation = call.operation
    processes = _processes(operation, before, part)
    options: dict[str, Any] = {
        "with_indices": True,
        "batched": operation.batched,
        "num_proc": processes if processes > 1 else None,
        "load_from_cache_file": False,
        "cache_file_name": str(scratch / "result.arrow"),
        "new_fingerprint": "ditty",  # or datasets pickles the function to make one
    }
    if operation.remove_columns:
        options["remove_columns"] = operation.remove_columns
    if operation.method is OperationMethod.MAP:
        options["features"] = part.types
    return getattr(before, operation.method.value)(call, **options)


def _processes(operation: Operation, before: Any, part: Part) -> int:
    few = operation.batched or before.num_rows <= tables.BATCH_ROWS
    return 1 if few else part.num_proc


def _check_removed(operation: Operation, present: list[str], label: str) -> None:
    for name in operation.remove_columns:
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(
                f"{label}: remove_columns names {name!r}, the data has {', '.join(present)}{hint}"
            )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Undo what datasets does to the environment where it starts processes.

    It turns the tokenizers' threads off, for the processes' sake, and on again in a copy of
    `os.environ` alone, which the library does not read: tokenization would go on with one thread.
    """
    environment, before = os.environ, os.environ.get(PARALLELISM)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  (datasets has put a copy in its place)
        if before is None:
            environment.pop(PARALLELISM, None)
        else:
            environment[PARALLELISM] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of datasets' for the block: the log is a file."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
