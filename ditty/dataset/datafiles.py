"""Local files of rows: which ones a path, a glob or a folder means, and their bytes as written.

A format is a suffix; text formats may be compressed: rows.jsonl.gz. Several files are read in the
order of their names.
"""

import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ditty.dataset.quarantine import Describe
from ditty.errors import DataError
from ditty.store import paths
from ditty.store.files import sha256_file

TEXT = (".jsonl", ".json", ".txt")
COLUMNAR = (".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
EXPECTED = (
    f"{', '.join((*TEXT, *COLUMNAR))}, all but the last perhaps with {', '.join(COMPRESSIONS)}"
)


@dataclass(frozen=True)
class DataFile:
    """A file of rows. `name`: where the user has it, for errors."""

    path: Path
    name: str

    @property
    def compression(self) -> str | None:
        """As pyarrow calls it."""
        return COMPRESSIONS.get(self.path.suffix)

    @property
    def format(self) -> str:
        """The suffix of the content, `.jsonl` of rows.jsonl.gz; "" where it is none of ours."""
        inner = Path(self.path.stem).suffix if self.compression else self.path.suffix
        known = inner in TEXT or inner in COLUMNAR
        return inner if known and not (self.compression and inner == ".parquet") else ""

    @property
    def kind(self) -> str:
        """The format with its compression: the same bytes are other rows in another kind."""
        return self.format + (self.path.suffix if self.compression else "")

    def open(self) -> IO[bytes]:
        """Its content, decompressed; reading a damaged file is an OSError."""
        if self.compression is None:
            return self.path.open("rb")
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(self.path), compression=self.compression))


def find(path: Path) -> list[DataFile]:
    """The files that a path means, sorted by name; empty: it is no file, glob or folder of files.

    Of a folder those with a known suffix, not of its subfolders.

    Raises:
        DataError: a file, or what a glob matches, is of no known format; several formats.
    """
    if path.is_file():
        return one_format([DataFile(path, str(path))], str(path))
    if path.is_dir():
        within = [DataFile(p, str(p)) for p in sorted(path.iterdir()) if p.is_file()]
        return one_format([f for f in within if f.format and f.path.name[0] != "."], str(path))
    if not paths.is_glob(str(path)):
        return []
    matching = sorted(Path(p) for p in glob.glob(str(path), recursive=True))  # noqa: PTH207
    return one_format([DataFile(p, str(p)) for p in matching if p.is_file()], str(path))


def one_format(files: Sequence[DataFile], named: str) -> list[DataFile]:
    """The files, all of one known format.

    Raises:
        DataError: they are not.
    """
    for file in files:
        if not file.format:
            raise DataError(
                f"{file.name} has the suffix {file.path.suffix!r}, expected one of {EXPECTED}"
            )
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise DataError(
            f"{named} means files of several formats, {' and '.join(formats)}: name one of them, "
            f"{named.rstrip('/')}/*{formats[0]} for example"
        )
    return list(files)


def contents(files: Sequence[DataFile]) -> list[list[str]]:
    """[kind, SHA-256] of each: neither where a file is nor how it is called counts."""
    return [[file.kind, sha256_file(file.path)] for file in files]


def describe_in(files: Sequence[DataFile], words: Sequence[str]) -> Describe:
    """How a position (index of the file, number) is told without names: `file 2, line 7`.

    Args:
        words: what numbers count in each file.
    """
    several = len(files) > 1
    return lambda at: f"file {at[0] + 1}, " * several + f"{words[at[0]]} {at[1]}"


def tell_in(files: Sequence[DataFile], words: Sequence[str], source: str) -> Describe:
    """The same with names, where those are not `source`: `part-2.jsonl, line 7`."""
    named = [file.name != source for file in files]
    return lambda at: f"{files[at[0]].name}, " * named[at[0]] + f"{words[at[0]]} {at[1]}"
