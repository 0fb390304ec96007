import random
from itertools import product

import numpy as np
import pyarrow as pa
import pytest

from ditty.config.dataspec import DataSpec
from ditty.dataset import tables
from ditty.dataset.packing import Document, best_fit, next_fit, one_each, pack_tables
from ditty.errors import DataError


def documents(lengths, seed=0):
    """Documents whose ids are all different, so that each can be told wherever it lands."""
    ids = iter(range(1, sum(lengths) + 1))
    made = []
    for n in lengths:
        tokens = [next(ids) for _ in range(n)]
        made.append(Document(tokens, [t if t % 3 else -100 for t in tokens]))
    return made


def unpacked(rows):
    """The documents in packed rows, by the rows' own lengths."""
    found = []
    for row in rows:
        assert sum(row.lengths) == len(row.input_ids) == len(row.labels)
        borders = np.cumsum(row.lengths)[:-1]
        found += zip(np.split(row.input_ids, borders), np.split(row.labels, borders), strict=True)
    return found


@pytest.mark.parametrize("packer", [best_fit, next_fit, one_each])
@pytest.mark.parametrize("window_tokens", [1, 100, 1 << 22])
def test_every_document_comes_out_once_and_whole(packer, window_tokens):
    rng = random.Random(1)
    given = documents([rng.randint(1, 64) for _ in range(500)])
    options = {"window_tokens": window_tokens} if packer is best_fit else {}
    rows = list(packer(given, seq_len=64, **options))
    assert all(len(row.input_ids) <= 64 for row in rows)
    found = sorted((ids.tolist(), labels.tolist()) for ids, labels in unpacked(rows))
    assert found == sorted((d.input_ids, [-100, *d.labels[1:]]) for d in given)


def test_no_label_is_predicted_from_another_document():
    rows = list(best_fit(documents([3, 4, 2, 5]), seq_len=8))
    for row in rows:
        starts = np.cumsum(row.lengths) - row.lengths
        assert (row.labels[starts] == -100).all()
    assert any(len(row.lengths) > 1 for row in rows)


def fewest_rows(lengths, seq_len):
    """By trying every assignment."""
    for rows in range(1, len(lengths) + 1):
        for places in product(range(rows), repeat=len(lengths)):
            loads = [0] * rows
            for place, n in zip(places, lengths, strict=True):
                loads[place] += n
            if max(loads) <= seq_len:
                return rows
    raise AssertionError


def test_rows_are_few():
    rng = random.Random(2)
    for _ in range(20):
        lengths = [rng.randint(1, 10) for _ in range(6)]
        rows = len(list(best_fit(documents(lengths), seq_len=10)))
        assert rows <= 11 / 9 * fewest_rows(lengths, 10) + 6 / 9, lengths


def test_best_fit_fills_what_next_fit_leaves_empty():
    assert [row.lengths.tolist() for row in best_fit(documents([6, 6, 4, 4]), seq_len=10)] == [
        [6, 4],
        [6, 4],
    ]


def next_fit_lengths(lengths, seq_len):
    """A plain loop over lengths."""
    rows = [[]]
    for n in lengths:
        if sum(rows[-1]) + n > seq_len:
            rows.append([])
        rows[-1].append(n)
    return rows


def test_next_fit_keeps_the_order_of_the_documents():
    rng = random.Random(4)
    lengths = [rng.randint(1, 64) for _ in range(500)]
    rows = list(next_fit(documents(lengths), seq_len=64))
    assert [row.lengths.tolist() for row in rows] == next_fit_lengths(lengths, 64)
    tokens = np.concatenate([row.input_ids for row in rows])
    assert tokens.tolist() == list(range(1, sum(lengths) + 1))


def test_next_fit_holds_back_one_row_only():
    taken = iter(documents([5] * 100))
    next(next_fit(taken, seq_len=10))
    assert len(list(taken)) == 97


def test_windows_bound_what_is_held_back():
    taken = 0

    def source():
        nonlocal taken
        for document in documents([5] * 100):
            taken += 1
            yield document

    next(best_fit(source(), seq_len=10, window_tokens=20))
    assert taken == 4


def test_rows_and_documents_keep_their_order():
    rows = list(best_fit(documents([3, 9, 4, 2, 5]), seq_len=10))
    firsts = [row.input_ids[0] for row in rows]
    assert firsts == sorted(firsts)
    assert all((np.diff(row.input_ids) > 0).all() for row in rows)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document([], []), r"document 1 has 0 tokens, expected 1\.\.8"),
        (Document([1] * 9, [1] * 9), r"document 1 has 9 tokens, expected 1\.\.8"),
        (Document([1, 2], [1]), "document 1 has 2 tokens and 1 labels"),
    ],
)
@pytest.mark.parametrize("packer", [best_fit, next_fit, one_each])
def test_documents_that_do_not_fit_are_refused(packer, document, message):
    with pytest.raises(DataError, match=message):
        list(packer([Document([1], [1]), document], seq_len=8))


def token_table(path, given):
    columns = {
        "input_ids": tables.token_lists(d.input_ids for d in given),
        "labels": tables.token_lists(d.labels for d in given),
    }
    table = pa.table(columns)
    tables.write(path, [table], table.schema)


@pytest.mark.parametrize("packing", ["best_fit", "next_fit", "none"])
def test_pack_tables_reconciles_with_its_input(tmp_path, packing):
    import datasets

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    rng = random.Random(3)
    train = documents([rng.randint(2, 64) for _ in range(2500)])
    token_table(source / "train.arrow", train)
    token_table(source / "eval.arrow", train[:7])
    facts = pack_tables(DataSpec(source="x", seq_len=64, packing=packing), source, out)

    packed = datasets.Dataset.from_file(str(out / "train.arrow"))
    assert packed.column_names == ["input_ids", "labels", "lengths"]
    assert sorted(p.name for p in out.iterdir()) == ["eval.arrow", "train.arrow"]
    tokens = sum(len(d.input_ids) for d in train)
    supervised = sum(label != -100 for d in train for label in d.labels[1:])
    assert facts["rows"] == packed.num_rows
    assert facts["documents"] == 2500
    assert facts["tokens"] == tokens == sum(len(row) for row in packed["input_ids"])
    assert facts["supervised_tokens"] == supervised
    assert facts["fill_rate"] == pytest.approx(tokens / (packed.num_rows * 64), abs=1e-4)
    assert facts["eval_documents"] == 7
    low, high = {"best_fit": (0.95, 1), "next_fit": (0.6, 0.85), "none": (0.4, 0.6)}[packing]
    assert low < facts["fill_rate"] < high
    if packing == "next_fit":
        assert packed["lengths"][:] == next_fit_lengths([len(d.input_ids) for d in train], 64)
    if packing == "none":
        assert facts["rows"] == 2500


def test_a_table_without_held_out_rows_is_packed_too(tmp_path):
    token_table(tmp_path / "train.arrow", documents([4]))
    token_table(tmp_path / "eval.arrow", [])
    (tmp_path / "out").mkdir()
    facts = pack_tables(DataSpec(source="x", seq_len=8), tmp_path, tmp_path / "out")
    assert (facts["rows"], facts["eval_rows"], facts["fill_rate"]) == (1, 0, 0.5)
    assert tables.read(tmp_path / "out" / "eval.arrow").column_names[-1] == "lengths"
