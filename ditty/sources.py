"""Where rows come from: a file, a folder saved by datasets, a function, or the hub.

`identify` says what the rows depend on without reading more than it must; `load` turns them into
`data.arrow`. Local files never go through a cache in the user's home.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty import columnar, functions, rows, tables
from ditty.dataspec import DataSpec
from ditty.errors import DataError
from ditty.files import canonical_json, read_json, sha256_bytes, sha256_file
from ditty.quarantine import Quarantine

if TYPE_CHECKING:
    import pyarrow as pa

DATA = "data.arrow"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub to name a commit."""


def identify(data: DataSpec) -> dict[str, Any]:
    """What the rows of a source depend on, as JSON; equal identities have equal rows.

    Raises:
        DataError: there is no such source (with the nearest file name), or the hub is needed and
            does not answer.
    """
    kind = _kind(data.source)
    if kind == "file":
        path = _path(data.source)
        identity: dict[str, Any] = {"format": path.suffix, "sha256": sha256_file(path)}
        if path.suffix == ".csv":
            identity["text_columns"] = _text_columns(data)
    elif kind == "folder":
        files = [[p.name, sha256_file(p)] for p in _saved_files(data)]
        identity = {"sha256": sha256_bytes(canonical_json(files))}
    elif kind == "function":
        fn = functions.resolve(data.source)
        identity = {"digest": functions.digest(fn)}
        if hasattr(fn, "identity"):
            identity["depends_on"] = fn.identity()
    else:
        identity = {"id": data.source, "commit": hub_commit(data)}
        identity |= {"subset": data.subset, "split": data.split}
    return {"kind": kind, "max_rows": data.max_rows, **identity}


def load(data: DataSpec, out: Path) -> dict[str, Any]:
    """Write the rows of a source to `out/data.arrow`.

    A row that cannot be used goes to `out/quarantine.jsonl`, see `quarantine`.

    Returns:
        read (rows of the source, at most max_rows), rows (those in the table), quarantined (reason
        -> rows), columns (their names).

    Raises:
        DataError: no rows, a file that cannot be read as a whole, a function that failed, or more
            bad rows than `data.max_bad_fraction` allows (says which and why).
    """
    word = _position_word(data.source)
    with Quarantine(out, data.source, word) as quarantine:
        schema = _write(data, out, quarantine)
        kept = tables.read(out / DATA).num_rows
        quarantined = quarantine.settle(kept, data.max_bad_fraction)
    if kept == 0:
        raise DataError(f"{data.source} has no rows")
    return {
        "read": quarantine.read,
        "rows": kept,
        "quarantined": quarantined,
        "columns": schema.names,
    }


def _write(data: DataSpec, out: Path, quarantine: Quarantine) -> "pa.Schema":
    kind = _kind(data.source)
    path = _path(data.source)
    if kind == "function":
        with functions.importable():
            yielded = islice(_generated(data.source), data.max_rows)
            return rows.write_rows(yielded, out / DATA, quarantine)
    if kind == "file" and path.suffix in (".jsonl", ".json", ".txt"):
        return rows.write_rows(islice(_text_rows(path), data.max_rows), out / DATA, quarantine)
    if kind == "file" and path.suffix == ".csv":
        text = _text_columns(data)
        schema, batches = columnar.csv_file(path, text, data.max_rows, quarantine)
    else:
        reader = {"file": _parquet, "folder": _saved_folder, "hub": _hub}[kind]
        schema, found = reader(data)
        batches = columnar.valid_text(_first(found, data.max_rows), quarantine)
    tables.write(out / DATA, batches, schema)
    return schema


def _position_word(source: str) -> str:
    """What a position in a source counts."""
    path = _path(source)
    if not path.is_file() or path.suffix not in (".jsonl", ".json", ".txt"):
        return "row"
    return "item" if _is_json_list(path) else "line"


def _kind(source: str) -> str:
    """`file`, `folder`, `function` or `hub`."""
    path = _path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path} has the suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}"
            )
        return "file"
    if path.is_dir():
        return "folder"
    if ":" in source:
        return "function"
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(source):
        missing = "" if path.parent.is_dir() else f"; {path.parent} does not exist either"
        raise DataError(f"there is no file or folder {path}{missing}{_nearest_file(path)}")
    return "hub"


def _path(source: str) -> Path:
    return Path(source).expanduser().absolute()


def _nearest_file(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


# Rows as Python dicts: text files and functions.


def _text_rows(path: Path) -> Iterator[rows.Located]:
    if path.suffix == ".txt":
        lines = rows.text_lines(path)
        return ((n, {"text": t} if isinstance(t, str) else t) for n, t in lines)
    return rows.json_items(path) if _is_json_list(path) else rows.json_lines(path)


def _is_json_list(path: Path) -> bool:
    """Whether a .json file starts as a list; many on the hub hold an object a line instead."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _generated(source: str) -> Iterator[rows.Located]:
    """The rows that a function yields, numbered from 0."""
    fn = functions.resolve(source)
    count = 0
    try:
        for row in fn():
            yield count, row
            count += 1
    except DataError:
        raise
    except Exception as error:  # the user's code ran: anything can come out of it
        raise DataError(
            f"{source} failed after {count} rows: {type(error).__name__}: {error}"
        ) from error


# Rows as Arrow batches: columnar files, saved folders, the hub.


def _parquet(data: DataSpec) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import pyarrow as pa
    from pyarrow import parquet

    path = _path(data.source)
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    schema = _decoded(file.schema_arrow)
    return schema, columnar.tables_of(path, file.iter_batches(batch_size=tables.BATCH_ROWS))


def _decoded(schema: "pa.Schema") -> "pa.Schema":
    """The schema with categories as their values."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    ]
    return pa.schema(fields)


def _first(batches: "Iterable[pa.Table]", count: int | None) -> "Iterator[pa.Table]":
    for table in batches:
        if count is None:
            yield table
        elif count > 0:
            yield table.slice(0, count)
            count -= table.num_rows
        else:
            return


def _text_columns(data: DataSpec) -> list[str]:
    standard = {"messages", "prompt", "completion", "text"}
    return sorted(data.columns.get(name, name) for name in standard)


def _saved_files(data: DataSpec) -> list[Path]:
    """The Arrow files of a folder made by `save_to_disk`, of the split where it has splits."""
    folder = _path(data.source)
    splits = (read_json(folder / "dataset_dict.json") or {}).get("splits")
    if splits is not None and data.split not in splits:
        raise DataError(f"{folder} has no split {data.split!r}, expected {' or '.join(splits)}")
    folder = folder / data.split if splits is not None else folder
    state = read_json(folder / "state.json")
    if state is None:
        raise DataError(
            f"{folder} was not saved by datasets (no state.json): name one of its files, or save "
            "it with Dataset.save_to_disk"
        )
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{folder} is incomplete: its state.json names {', '.join(missing)}")
    return files


def _saved_folder(data: DataSpec) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import pyarrow as pa

    files = _saved_files(data)
    try:
        schema = _decoded(tables.read(files[0]).schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} is no Arrow table: {error}") from error
    batches = (batch for file in files for batch in tables.batches(file))
    return schema, columnar.tables_of(_path(data.source), batches)


def hub_commit(data: DataSpec) -> str:
    """The commit that `data.revision` (or the default branch) of a hub data set means now.

    Raises:
        DataError: the hub has no such data set or revision, or does not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", data.revision or ""):
        assert data.revision is not None
        return data.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    path = _path(data.source)
    here = f"{data.source}: there is no file or folder of that name{_nearest_file(path)}, and"
    try:
        info = HfApi().dataset_info(data.source, revision=data.revision, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError as error:
        raise DataError(f"hub data set {data.source} has no revision {data.revision}") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{here} the hub has no such data set (or it is private: set HF_TOKEN)"
        ) from error
    except HfHubHTTPError as error:
        raise DataError(f"{here} the hub refuses: {error}") from error
    except (HTTPError, OSError) as error:
        raise DataError(
            f"{here} the hub does not answer: {error}. Offline, name a file, or set data.revision "
            "to a commit that is in the hub's local cache"
        ) from error
    assert info.sha is not None, info
    return info.sha


def _hub(data: DataSpec) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import datasets

    commit = hub_commit(data)
    try:
        found = datasets.load_dataset(
            data.source, name=data.subset, split=data.split, revision=commit
        )
    except Exception as error:  # a hundred kinds: unknown split or subset, formats, the network
        raise DataError(
            f"hub data set {data.source} (subset {data.subset}, split {data.split}, commit "
            f"{commit}): {type(error).__name__}: {error}"
        ) from error
    arrow = found.with_format("arrow")
    schema = _decoded(found.data.schema)
    return schema, arrow.iter(batch_size=tables.BATCH_ROWS)
