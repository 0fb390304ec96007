"""Rows of a SQL query, through `datasets`; the database's URL is in an environment variable."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ditty import columnar, tables
from ditty.dataspec import SQL, SourceSpec
from ditty.errors import DataError, cut
from ditty.files import sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

FETCHED = "fetched.arrow"
LONGEST_REASON = 500


def is_query(source: str) -> bool:
    """Whether a source is a query: `sql:SELECT ...`."""
    return source.startswith(SQL)


def identify(part: SourceSpec) -> dict[str, Any]:
    """What the rows are, as JSON: their content, for which the query is run, or `version`.

    Raises:
        DataError: the variable is not set, or the query fails.
    """
    if part.version is not None:
        return {"query": part.source.removeprefix(SQL), "version": part.version}
    with tempfile.TemporaryDirectory(prefix="ditty-sql-") as scratch:
        return {"sha256": sha256_file(_fetch(part, Path(scratch)))}


def read(
    part: SourceSpec, scratch: Path, known: dict[str, Any]
) -> "tuple[pa.Schema, list[pa.Table]]":
    """The rows, in the order in which the database gives them.

    Args:
        known: what `identify` said before; {}: whatever is there now.
    Raises:
        DataError: as `identify`; or the rows are not those of `known` any more.
    """
    fetched = _fetch(part, scratch)
    if known.get("sha256") not in (None, sha256_file(fetched)):
        raise DataError(
            f"{part.source} gives other rows than when this run began: run again with those of "
            "now. If nothing was written meanwhile, the query leaves the order open: add ORDER BY"
        )
    schema = columnar.decoded(tables.read(fetched).schema)
    return schema, list(columnar.located(part.source, tables.batches(fetched)))


def _fetch(part: SourceSpec, scratch: Path) -> Path:
    """Run the query; its rows as a file."""
    assert part.connection is not None, "the spec was checked"
    url = os.environ.get(part.connection)
    if not url:
        raise DataError(
            f"{part.source}: the environment variable {part.connection} is not set, which "
            "connection names; expected the database's URL, sqlite:////data/rows.db for example"
        )
    import datasets

    query = part.source.removeprefix(SQL)
    try:
        found = datasets.Dataset.from_sql(query, url, cache_dir=str(scratch / "datasets"))
    except Exception as error:  # of pandas, SQLAlchemy, a driver that is missing, the database
        if "corresponds to no data" in str(error):
            raise DataError(f"{part.source} has no rows") from error
        told = error.__cause__ or error  # datasets says no more than that something failed
        reason = cut(f"{type(told).__name__}: {told}", LONGEST_REASON)
        for secret in (url, urlsplit(url).password):
            reason = reason.replace(secret or url, "...")
        # Not `from error`: it may hold the password.
        raise DataError(f"{part.source} at ${part.connection} failed: {reason}") from None
    batches = found.with_format("arrow").iter(batch_size=tables.BATCH_ROWS)
    tables.write(scratch / FETCHED, batches, found.features.arrow_schema)
    return scratch / FETCHED
