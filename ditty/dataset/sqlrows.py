"""Rows of a SQL query, through `datasets`; the database's URL is in an environment variable."""

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from ditty.config.dataspec import SQL, SourceSpec
from ditty.dataset import columnar, tables
from ditty.errors import DataError, cut
from ditty.store.files import sha256_file

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

    secrets = _secrets(url)
    query = part.source.removeprefix(SQL)
    try:
        found = datasets.Dataset.from_sql(query, url, cache_dir=str(scratch / "datasets"))
    except Exception as error:  # of pandas, SQLAlchemy, a driver that is missing, the database
        if "corresponds to no data" in str(error):
            raise DataError(f"{part.source} has no rows") from error
        told = error.__cause__ or error  # datasets says no more than that something failed
        reason = f"{type(told).__name__}: {told}"
        for secret in secrets:
            reason = reason.replace(secret, "...")
        # Not `from error`: it may hold the password.
        raise DataError(
            f"{part.source} at ${part.connection} failed: {cut(reason, LONGEST_REASON)}"
        ) from None
    batches = found.with_format("arrow").iter(batch_size=tables.BATCH_ROWS)
    tables.write(scratch / FETCHED, batches, found.features.arrow_schema)
    return scratch / FETCHED


# Names in a URL's query whose values are not to be told.
SECRET = re.compile(r"(?i)pass|pwd|token|secret|key|odbc_connect")


def _secrets(url: str) -> list[str]:
    """What is not to be told of a database's URL, as it may stand in a message; longest first.

    The password, the values of its query (`?password=...`, `?odbc_connect=...;PWD=...`), and both
    as they are quoted in a URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    # As it stands, up to the last @: drivers name what follows the first one as the host.
    password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
    found = {url, password, *(part for part in password.split("@") if len(part) > 3)}
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the query fails of it
        return sorted(found - {""}, key=len, reverse=True)
    values = [str(parsed.password or "")]
    for name, several in parsed.normalized_query.items():
        if SECRET.search(name):
            values += several
        values += [x for one in several for x in re.findall(r"(?i)\b(?:pwd|password)=([^;]+)", one)]
    for value in values:
        found |= {value, quote(value), quote(value, safe=""), quote_plus(value)}
    return sorted(found - {""}, key=len, reverse=True)
