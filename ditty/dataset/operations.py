"""Row operations: methods of `datasets.Dataset` over a table, without its caches.

Its fingerprints are not used (see `functions.digest`), and its cache files live in a temporary
directory: the stage's own artifact is the cache.
"""

import contextlib
import difflib
import operator
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ditty.config.choices import OperationMethod
from ditty.config.dataspec import Operation
from ditty.dataset import functions, tables
from ditty.dataset.sources import DATA
from ditty.errors import DataError, DittyError

PARALLELISM = "TOKENIZERS_PARALLELISM"


def apply(operation: Operation, source: Path, out: Path, num_proc: int) -> dict[str, Any]:
    """Apply one operation to `source/data.arrow`; the result is `out/data.arrow`.

    `num_proc` does not change the result: a batched function runs in one process, since more
    would move the borders of its batches.

    Returns:
        rows_in, rows, columns.

    Raises:
        DataError: the function cannot be found, raises (names the row), or returns what the
            method cannot use; the method refuses its arguments, a column is missing; or no row is
            left.
    """
    import datasets

    before = datasets.Dataset.from_file(str(source / DATA))
    label = f"operation {operation.describe()}"
    with (
        functions.importable(),
        tempfile.TemporaryDirectory(prefix=".ditty-", dir=out) as scratch,
        _quiet(),
        _environment(),
    ):
        after = _run(before, operation, label, Path(scratch), num_proc)
        schema = after.features.arrow_schema.remove_metadata()
        batches = after.with_format("arrow").iter(batch_size=tables.BATCH_ROWS)
        rows = tables.write(out / DATA, batches, schema)
    if rows == 0:
        raise DataError(f"{label} leaves none of {before.num_rows} rows")
    return {"rows_in": before.num_rows, "rows": rows, "columns": schema.names}


def _run(before: Any, operation: Operation, label: str, scratch: Path, num_proc: int) -> Any:
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
        return _by_row(before, _Call(function, operation, label), scratch, num_proc)
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

    def __init__(self, function: Callable[..., Any], operation: Operation, label: str):
        self.function = function
        self.operation = operation
        self.label = label

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
            return f"row {index}"
        return f"rows {index[0]} to {index[-1]}" if index else "no rows"

    def _problem(self, result: Any, index: Any) -> str | None:
        got = f"returned {type(result).__name__} {str(result)[:40]}"
        if self.operation.method is OperationMethod.MAP:
            return None if hasattr(result, "keys") else f"{got}, expected a dict of columns"
        if result is None:
            return f"{got}, expected true or false"
        if self.operation.batched and len(result) != len(index):
            return f"returned {len(result)} values for {len(index)} rows"
        return None


def _by_row(before: Any, call: _Call, scratch: Path, num_proc: int) -> Any:
    """`Dataset.filter` or `Dataset.map`, its caches off or in `scratch`."""
    operation = call.operation
    options: dict[str, Any] = {
        "with_indices": True,
        "batched": operation.batched,
        "num_proc": num_proc if num_proc > 1 and not operation.batched else None,
        "load_from_cache_file": False,
        "cache_file_name": str(scratch / "result.arrow"),
        "new_fingerprint": "ditty",  # or datasets pickles the function to make one
    }
    if operation.remove_columns:
        options["remove_columns"] = operation.remove_columns
    return getattr(before, operation.method.value)(call, **options)


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
