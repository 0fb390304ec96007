"""Where rows come from: files, a folder saved by datasets, a function, or the hub.

`identify` says what the rows depend on without reading more than it must; `load` turns them into
`data.arrow`. Local files never go through a cache in the user's home.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty import columnar, datafiles, functions, rows, tables
from ditty.datafiles import DataFile
from ditty.dataspec import COLUMNS, DataSpec
from ditty.errors import DataError
from ditty.files import canonical_json, read_json, sha256_bytes, sha256_file
from ditty.quarantine import Quarantine, row_number

if TYPE_CHECKING:
    import pyarrow as pa

DATA = "data.arrow"
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
    if kind == "files":
        identity = _identify_files(datafiles.find(_path(data.source)), data)
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


def _identify_files(files: list[DataFile], data: DataSpec) -> dict[str, Any]:
    """By content: neither where a file is nor how it is called counts."""
    identity: dict[str, Any] = {"files": [[file.kind, sha256_file(file.path)] for file in files]}
    if files[0].format == ".csv":
        identity["text_columns"] = _text_columns(data)
    return identity


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
    kind = _kind(data.source)
    files = datafiles.find(_path(data.source)) if kind == "files" else []
    words = rows.position_words(files)
    with _quarantine(data, files, words, out) as quarantine:
        if files:
            schema = _load_files(files, words, data, out, quarantine)
        elif kind == "function":
            with functions.importable():
                yielded = islice(_generated(data.source), data.max_rows)
                schema = rows.write_rows(yielded, out / DATA, quarantine)
        else:
            schema, found = _saved_folder(data) if kind == "folder" else _hub(data)
            batches = columnar.valid_text(columnar.first(found, data.max_rows), quarantine)
            tables.write(out / DATA, batches, schema)
        kept = tables.read(out / DATA).num_rows
        quarantined = quarantine.settle(kept, data.max_bad_fraction)
    if kept == 0:
        raise DataError(f"{data.source} has no rows")
    facts = {"read": quarantine.read, "rows": kept, "quarantined": quarantined}
    return {**facts, "columns": schema.names}


def _quarantine(data: DataSpec, files: list[DataFile], words: list[str], out: Path) -> Quarantine:
    if not files:
        return Quarantine(out, data.source, row_number)
    tell = datafiles.tell_in(files, words, data.source)
    return Quarantine(out, data.source, datafiles.describe_in(files, words), tell)


def _load_files(
    files: list[DataFile], words: list[str], data: DataSpec, out: Path, quarantine: Quarantine
) -> "pa.Schema":
    if files[0].format in datafiles.TEXT:
        found = islice(rows.of_files(files, words), data.max_rows)
        return rows.write_rows(found, out / DATA, quarantine)
    text = _text_columns(data)
    schema, batches = columnar.of_files(files, text, data.max_rows, quarantine)
    tables.write(out / DATA, batches, schema)
    return schema


def _kind(source: str) -> str:
    """`files`, `folder` (saved by datasets), `function` or `hub`."""
    path = _path(source)
    if _is_saved(path):
        return "folder"
    if datafiles.find(path):
        return "files"
    if path.is_dir():
        raise DataError(
            f"{path} holds neither rows saved by datasets (state.json) nor files that end in "
            f"{datafiles.EXPECTED}"
        )
    if datafiles.is_glob(source):
        raise DataError(f"no file matches {path}")
    if ":" in source:
        return "function"
    if DataFile(path, source).format or not HUB_ID.fullmatch(source):
        missing = "" if path.parent.is_dir() else f"; {path.parent} does not exist either"
        raise DataError(f"there is no file or folder {path}{missing}{datafiles.nearest(path)}")
    return "hub"


def _path(source: str) -> Path:
    return Path(source).expanduser().absolute()


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


def _text_columns(data: DataSpec) -> list[str]:
    return sorted(data.columns.get(name, name) for name in COLUMNS)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


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
            f"{folder} was not saved whole by datasets (no state.json): save it again with "
            "DatasetDict.save_to_disk"
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
        schema = columnar.decoded(tables.read(files[0]).schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} is no Arrow table: {error}") from error
    batches = (batch for file in files for batch in tables.batches(file))
    return schema, columnar.located(data.source, batches)


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
    here = f"{data.source}: there is no file or folder of that name{datafiles.nearest(path)}, and"
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
    schema = columnar.decoded(found.data.schema)
    return schema, arrow.iter(batch_size=tables.BATCH_ROWS)
