"""Ready-made operations over all rows, for `method: select`: they return the rows to keep.

Of rows that are alike the first stays. They read a batch at a time and keep hashes, not rows.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty.dataset import datafiles, sources, tables
from ditty.dataset.quarantine import Quarantine
from ditty.dataset.tokenization import row_fraction
from ditty.errors import DataError
from ditty.recipes import text_of
from ditty.store import paths

if TYPE_CHECKING:
    import datasets

MISSED_WEIGHS_MORE = (0.05, 0.95)
"""Of pairs found in vain, and of pairs missed: 0.94 of those at a threshold of 0.8 are found."""
SHORTEST = 8
"""Words: a shorter text is found in a row only if it is the row's whole text."""


def deduplicate(rows: "datasets.Dataset", columns: list[str] | None = None) -> list[int]:
    """The first of each set of equal rows.

    Args:
        columns: rows that are equal in these are equal; None: in all.
    """
    seen: set[bytes] = set()
    kept = []
    for number, row in enumerate(_rows(rows, columns)):
        text = json.dumps(row, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(number)
    return kept


def deduplicate_near(
    rows: "datasets.Dataset",
    column: str = "text",
    threshold: float = 0.8,
    words: int = 5,
    permutations: int = 256,
) -> list[int]:
    """The first of each set of texts that share most of their runs of words, by MinHash.

    A row goes if the estimated Jaccard similarity of its runs with those of a row that stays is at
    least `threshold`. Case and punctuation do not count. Needs the package datasketch.

    Args:
        words: in a run; a text with fewer is one run.
        permutations: of a signature. The estimate's standard error is at most 0.5 / their root;
            a signature takes 8 bytes for each, and those of the rows that stay are in memory.

    Source: arXiv:2107.06499 (deduplicating training data); Broder 1997 (MinHash).
    """
    from datasketch import MinHash, MinHashLSH

    # By default half of the pairs at the threshold are missed; a pair too many costs one estimate.
    index = MinHashLSH(threshold=threshold, num_perm=permutations, weights=MISSED_WEIGHS_MORE)
    signatures: dict[int, MinHash] = {}
    empty = MinHash(num_perm=permutations, seed=1)
    for number, row in enumerate(_rows(rows, [column])):
        signature = empty.copy()
        signature.update_batch([run.encode() for run in _runs(_words(text_of(row, column)), words)])
        alike = (signatures[other].jaccard(signature) for other in index.query(signature))
        if not any(similarity >= threshold for similarity in alike):
            signatures[number] = signature
            index.insert(number, signature)
    return list(signatures)


def decontaminate(
    rows: "datasets.Dataset",
    file: str,
    column: str = "text",
    file_column: str | None = None,
    words: int = 13,
) -> list[int]:
    """The rows that share no run of words with a held-out set. Case and punctuation do not count.

    Args:
        file: of the held-out texts: whatever local files `data.source` takes.
        column: of the rows; file_column: of the file, by default of the same name.
        words: in a run. A held-out text with fewer, but at least SHORTEST, is one run.

    Raises:
        DataError: a file or a row of it cannot be read, or there is no such column.

    Source: arXiv:2005.14165, appendix C (runs of 13 words).
    """
    name = file_column or column
    known = _Known((text_of(row, name) for row in _held_out(file, name)), words)
    texts = (text_of(row, column) for row in _rows(rows, [column]))
    return [number for number, text in enumerate(texts) if not known.shares(text)]


def decontaminate_held_out(
    rows: "datasets.Dataset", held_out: dict[str, Any], column: str = "text", words: int = 13
) -> list[int]:
    """The rows that are to be held out, and those others that share no run of words with one.

    Else as `decontaminate`. What the held-out rows of a run share with the rest of its data is
    learned by heart, and their loss says less of anything else.

    Args:
        held_out: what decides which rows those are, which the spec puts in: `eval_fraction`, and
            `columns`, the name of each that the format reads. Hence the last operation: rows are
            held out by the content of these.
        column: what is compared: not one that most rows share, as a system prompt.
    """
    columns = {c: name for c, name in held_out["columns"].items() if name in rows.column_names}
    given = (tuple(row.values()) for row in _rows(rows, list(columns.values())))
    content = (dict(zip(columns, values, strict=True)) for values in given)
    held = {n for n, row in enumerate(content) if row_fraction(row) < held_out["eval_fraction"]}
    texts = (text_of(row, column) for n, row in enumerate(_rows(rows, [column])) if n in held)
    known = _Known(texts, words)
    return [
        number
        for number, row in enumerate(_rows(rows, [column]))
        if number in held or not known.shares(text_of(row, column))
    ]


class _Known:
    """Texts whose runs of words others are not to have."""

    def __init__(self, texts: Iterable[str], words: int):
        self._whole: set[str] = set()
        self._runs: dict[int, set[str]] = {}
        for text in texts:
            spoken = _words(text)
            if not spoken:  # or it would be found in each row without words
                continue
            self._whole.add(" ".join(spoken))
            if len(spoken) >= SHORTEST:
                size = min(words, len(spoken))
                self._runs.setdefault(size, set()).update(_runs(spoken, size))

    def shares(self, text: str) -> bool:
        """Whether one of them has a run of the text, or all of it."""
        spoken = _words(text)
        shared = any(not known.isdisjoint(_runs(spoken, n)) for n, known in self._runs.items())
        return shared or " ".join(spoken) in self._whole


def _rows(rows: "datasets.Dataset", columns: list[str] | None) -> Iterator[dict[str, Any]]:
    """Rows as dicts, with these columns."""
    wanted = rows if columns is None else rows.select_columns(columns)
    for batch in wanted.with_format("arrow").iter(batch_size=tables.BATCH_ROWS):
        yield from batch.to_pylist()


def _held_out(file: str, column: str) -> Iterator[dict[str, Any]]:
    """The rows of the held-out files; one that cannot be read is an error, not left out."""
    files = _files(file)
    with tempfile.TemporaryDirectory(prefix="ditty-held-out-") as scratch:
        with Quarantine(Path(scratch), f"kwargs.file: {file}", max_bad_fraction=1.0) as quarantine:
            quarantine.reading(*sources.positions(files, file))
            sources.load_files(files, [column], None, Path(scratch), quarantine)
            if quarantine.reasons:
                raise DataError(
                    f"kwargs.file: {file} has rows that cannot be read, and so not be found in the "
                    f"data: {quarantine.told()}. Mend or drop them"
                )
        found = tables.read(Path(scratch) / sources.DATA)
        if column not in found.column_names:
            raise DataError(
                f"kwargs.file: {file} has no column {column!r}, but "
                f"{', '.join(found.column_names) or 'no rows'}: set kwargs.file_column"
            )
        for batch in found.select([column]).to_batches():
            yield from batch.to_pylist()


def _files(file: str) -> list[datafiles.DataFile]:
    path = Path(file)
    if files := datafiles.find(path):
        return files
    raise DataError(f"kwargs.file: there are no files {file}{paths.nearest(path)}")


def _held_out_content(file: str, **_: Any) -> dict[str, Any]:
    return {"files": datafiles.contents(_files(file))}


decontaminate.identity = _held_out_content  # type: ignore[attr-defined]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], size: int) -> set[str]:
    """Each run of so many words; all of fewer are one run."""
    last = max(len(words) - size, 0)
    return {" ".join(words[start : start + size]) for start in range(last + 1)}
