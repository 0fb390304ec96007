"""Where rows come from: files here or elsewhere, a folder saved by datasets, a function, the hub.

`identify` says what the rows depend on without reading more than it must; `load` turns them into
`data.arrow`. Local files never go through a cache in the user's home.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.config.dataspec import COLUMNS, SPLIT, DataSpec, SourceSpec
from ditty.dataset import columnar, datafiles, functions, mixing, remotefiles, rows, sqlrows, tables
from ditty.dataset.datafiles import DataFile
from ditty.dataset.quarantine import Describe, Quarantine, row_number
from ditty.errors import DataError
from ditty.store import paths
from ditty.store.files import canonical_json, make_dir, read_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

DATA = "data.arrow"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub to name a commit."""


def identify(data: DataSpec) -> dict[str, Any]:
    """What the rows depend on, as JSON; equal identities have equal rows.

    Raises:
        DataError: there is no such source (with the nearest file name), or the hub is needed and
            does not answer.
        RemoteError: the place of a URL cannot be reached (retryable), or refuses.
    """
    text_columns = _text_columns(data)
    parts = [_identify(part, text_columns) for part in data.parts]
    if data.source is not None:
        return parts[0]
    identity: dict[str, Any] = {"kind": "mixture", "max_rows": data.max_rows, "parts": parts}
    if weights := mixing.weights(data):
        order = {"weights": weights, "seed": data.seed, "until": data.stopping_strategy.value}
        identity |= order | {"numpy": metadata.version("numpy")}  # whose generator draws
    return identity


def _identify(part: SourceSpec, text_columns: list[str]) -> dict[str, Any]:
    kind = _kind(part.source)
    if kind not in ("hub", "folder") and part.split != SPLIT:
        raise DataError(
            f"data.split: got {part.split!r}, which is for hub data sets and folders saved by "
            f"datasets, and the source {part.source} is none: remove it"
        )
    if kind == "files":
        files = datafiles.find(_path(part.source))
        identity: dict[str, Any] = {"files": datafiles.contents(files)}
        if files[0].format == ".csv":
            identity["text_columns"] = text_columns
    elif kind == "url":
        identity = {"files": remotefiles.identify(part.source)}
        if identity["files"][0][0].startswith(".csv"):
            identity["text_columns"] = text_columns
    elif kind == "folder":
        saved = [[p.name, sha256_file(p)] for p in _saved_files(part)]
        identity = {"sha256": sha256_bytes(canonical_json(saved))}
    elif kind == "function":
        fn = functions.resolve(part.source)
        identity = {"digest": functions.digest(fn)}
        functions.check_call(fn, [], {}, part.source)
        identity |= functions.depends_on(fn, {}, part.source)
    elif kind == "sql":
        identity = sqlrows.identify(part)
    else:
        identity = {"id": part.source, "commit": hub_commit(part)}
        identity |= {"subset": part.subset, "split": part.split}
    return {"kind": kind, "max_rows": part.max_rows, **identity}


def load(data: DataSpec, out: Path, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the rows to `out/data.arrow`.

    A row that cannot be used goes to `out/quarantine.jsonl`, see `quarantine`.

    Args:
        identity: what `identify` said: of the hub, that commit is loaded, wherever a branch has
            moved since, and files elsewhere must still be the same.
    Returns:
        read (rows of the source, at most max_rows), rows (those in the table), quarantined (reason
        -> rows), columns (their names).

    Raises:
        DataError: no rows, a file that cannot be read as a whole, a function that failed, or more
            bad rows than `data.max_bad_fraction` allows (says which and why).
    """
    text_columns = _text_columns(data)
    with Quarantine(out, data.source or "the sources", data.max_bad_fraction) as quarantine:
        if data.source is not None:
            kept = _load(data.parts[0], None, text_columns, out, identity or {}, quarantine)
        else:
            kept = _load_several(data, text_columns, out, identity, quarantine)
        quarantined = quarantine.settle(kept)
    made = tables.read(out / DATA)
    facts = {"read": quarantine.read, "rows": made.num_rows, "quarantined": quarantined}
    return {**facts, "columns": made.column_names}


def _load_several(
    data: DataSpec,
    text_columns: list[str],
    out: Path,
    identity: dict[str, Any] | None,
    quarantine: Quarantine,
) -> int:
    """Write the mixed rows of all sources; how many those had to give."""
    identities = identity["parts"] if identity else [{}] * len(data.sources)
    kept, parts = 0, []
    with tempfile.TemporaryDirectory(prefix=".parts-", dir=out) as scratch:
        for number, part in enumerate(data.sources):
            folder = make_dir(Path(scratch) / str(number))
            kept += _load(part, number, text_columns, folder, identities[number], quarantine)
            parts.append(tables.read(folder / DATA))
        schema, batches = mixing.mix(data, parts)
        tables.write(out / DATA, columnar.first(batches, data.max_rows), schema)
    return kept


def _load(
    part: SourceSpec,
    number: int | None,
    text_columns: list[str],
    out: Path,
    identity: dict[str, Any],
    quarantine: Quarantine,
) -> int:
    """Write the rows of one source, of several the one of that number; how many it has."""
    kind = _kind(part.source)
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=out) as scratch:
        files = _files(part, Path(scratch), identity)
        quarantine.reading(*_positions(part, number, files))
        if files:
            load_files(files, text_columns, part.max_rows, out, quarantine)
        elif kind == "function":
            with functions.importable():
                yielded = islice(_generated(part.source), part.max_rows)
                rows.write_rows(yielded, out / DATA, quarantine)
        else:
            schema, found = _tables(part, kind, Path(scratch), identity)
            batches = columnar.valid_text(columnar.first(found, part.max_rows), quarantine)
            tables.write(out / DATA, batches, schema)
    kept = tables.read(out / DATA).num_rows
    if kept == 0:
        quarantine.check()
        raise DataError(f"{part.source} has no rows")
    return kept


def _tables(
    part: SourceSpec, kind: str, scratch: Path, identity: dict[str, Any]
) -> "tuple[pa.Schema, Iterable[pa.Table]]":
    """The rows of a query, a hub data set or a folder saved by datasets."""
    if kind == "sql":
        return sqlrows.read(part, scratch, identity)
    if kind == "hub":
        return _hub(part, identity.get("commit") or hub_commit(part))
    return _saved_folder(part)


def _files(part: SourceSpec, scratch: Path, identity: dict[str, Any]) -> list[DataFile]:
    """The files of a source, here or copied to here; empty where it is none of files."""
    kind = _kind(part.source)
    if kind == "url":
        return remotefiles.fetch(part.source, scratch, identity.get("files"))
    return datafiles.find(_path(part.source)) if kind == "files" else []


def _positions(
    part: SourceSpec, number: int | None, files: list[DataFile]
) -> tuple[Describe, Describe]:
    """How a position in a source is told, without and with names."""
    describe, tell = positions(files, part.source) if files else (row_number, row_number)
    if number is None:
        return describe, tell
    source = f"source {number + 1}"
    return lambda at: f"{source}, {describe(at)}", lambda at: f"{part.source}, {tell(at)}"


def positions(files: list[DataFile], source: str) -> tuple[Describe, Describe]:
    """The same in files, which `source` means."""
    words = rows.position_words(files)
    return datafiles.describe_in(files, words), datafiles.tell_in(files, words, source)


def load_files(
    files: list[DataFile],
    text_columns: list[str],
    max_rows: int | None,
    out: Path,
    quarantine: Quarantine,
) -> None:
    """Write the first rows of files (None: all) to `out/data.arrow`.

    Args:
        text_columns: of CSV files, see `columnar.of_files`.
    Raises:
        DataError: a file cannot be read as a whole.
    """
    if files[0].format in datafiles.TEXT:
        words = rows.position_words(files)
        found = islice(rows.of_files(files, words), max_rows)
        rows.write_rows(found, out / DATA, quarantine)
    else:
        schema, batches = columnar.of_files(files, text_columns, max_rows, quarantine)
        tables.write(out / DATA, batches, schema)


def _kind(source: str) -> str:
    """`sql`, `files`, `url` (of files), `folder` (saved by datasets), `function` or `hub`."""
    if sqlrows.is_query(source):
        return "sql"
    if remotefiles.is_url(source):
        return "url"
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
    if paths.is_glob(source):
        raise DataError(f"no file matches {path}")
    if ":" in source:
        return "function"
    if DataFile(path, source).format or not HUB_ID.fullmatch(source):
        missing = "" if path.parent.is_dir() else f"; {path.parent} does not exist either"
        raise DataError(f"there is no file or folder {path}{missing}{paths.nearest(path)}")
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


def _saved_files(part: SourceSpec) -> list[Path]:
    """The Arrow files of a folder made by `save_to_disk`, of the split where it has splits."""
    folder = _path(part.source)
    splits = (read_json(folder / "dataset_dict.json") or {}).get("splits")
    if splits is not None and part.split not in splits:
        raise DataError(f"{folder} has no split {part.split!r}, expected {' or '.join(splits)}")
    folder = folder / part.split if splits is not None else folder
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


def _saved_folder(part: SourceSpec) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import pyarrow as pa

    files = _saved_files(part)
    try:
        schema = columnar.decoded(tables.read(files[0]).schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} is no Arrow table: {error}") from error
    batches = (batch for file in files for batch in tables.batches(file))
    return schema, columnar.located(part.source, batches)


def hub_commit(part: SourceSpec) -> str:
    """The commit that `revision` (or the default branch) of a hub data set means now.

    Raises:
        DataError: the hub has no such data set or revision, or does not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", part.revision or ""):
        assert part.revision is not None
        return part.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    path = _path(part.source)
    here = f"{part.source}: there is no file or folder of that name{paths.nearest(path)}, and"
    try:
        info = HfApi().dataset_info(part.source, revision=part.revision, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError as error:
        raise DataError(f"hub data set {part.source} has no revision {part.revision}") from error
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


def _hub(part: SourceSpec, commit: str) -> "tuple[pa.Schema, Iterator[pa.Table]]":
    import datasets

    try:
        found = datasets.load_dataset(
            part.source, name=part.subset, split=part.split, revision=commit
        )
    except Exception as error:  # a hundred kinds: unknown split or subset, formats, the network
        raise DataError(
            f"hub data set {part.source} (subset {part.subset}, split {part.split}, commit "
            f"{commit}): {type(error).__name__}: {error}"
        ) from error
    arrow = found.with_format("arrow")
    schema = columnar.decoded(found.data.schema)
    return schema, arrow.iter(batch_size=tables.BATCH_ROWS)
