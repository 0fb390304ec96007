"""Ready-made operations against pandas, brute force, transformers, and numbers worked by hand."""

import random
from itertools import product
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from ditty.config.dataspec import HELD_OUT, DataSpec, Operation
from ditty.dataset import tables
from ditty.dataset.functions import digest
from ditty.dataset.operations import Part, apply
from ditty.dataset.tokenization import load_tokenizer
from ditty.dedup import decontaminate, deduplicate, deduplicate_near
from ditty.errors import DataError
from ditty.quality import gopher_quality, gopher_repetition, quality, repetition
from ditty.recipes import characters, has_words, tokens
from ditty.stages.stageline import operation_inputs
from tests.tokenized import run
from tests.tokenizers_for_tests import train_tokenizer

CHAT = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": None}]


@pytest.mark.parametrize("columns", [None, ["a"], ["a", "b"]])
def test_exact_duplicates_are_those_of_pandas(columns):
    rng = random.Random(0)
    rows = [
        {"a": rng.choice("xyz"), "b": rng.randrange(4), "c": rng.randrange(2)} for _ in range(2500)
    ]
    rows[7]["a"] = rows[9]["a"] = None
    expected = pd.DataFrame(rows).drop_duplicates(columns).index.tolist()
    found = deduplicate(datasets.Dataset.from_list(rows), columns)
    assert found == expected and len(found) < 30


def test_chats_are_duplicates_only_turn_by_turn():
    chats = [CHAT, CHAT[:1], CHAT, CHAT[::-1], CHAT[:1]]
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    assert deduplicate(rows, ["messages"]) == [0, 1, 3]


def runs(text, size):
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_of_brute_force():
    rng = random.Random(1)
    words = [f"w{i}" for i in range(2000)]
    texts = []
    for _ in range(60):
        base = rng.choices(words, k=150)
        for changes in (0, 1, 6, 12):  # of 146 runs each changes five: 1, 0.93, 0.66, 0.42 alike
            words_now = list(base)
            for change in range(changes):
                words_now[8 + 12 * change] = "changed"
            texts.append(" ".join(words_now))
    rng.shuffle(texts)
    expected, kept = [], []
    for number, text in enumerate(texts):
        own = runs(text, 5)
        if all(jaccard(own, other) < 0.8 for other in kept):
            expected.append(number)
            kept.append(own)
    rows = datasets.Dataset.from_dict({"text": texts})
    assert deduplicate_near(rows) == expected == deduplicate_near(rows)
    assert 175 < len(expected) < 185, "of each four three stay"
    shouted = datasets.Dataset.from_dict(
        {"text": [texts[0], f"{texts[0].upper()}!", "", None, "a"]}
    )
    assert deduplicate_near(shouted) == [0, 2, 4]


def test_near_duplicates_just_above_the_threshold_are_found():
    rng = random.Random(3)
    words = [f"w{i}" for i in range(5000)]
    texts = []
    for _ in range(100):
        base = rng.choices(words, k=300)
        copy = list(base)
        for change in range(5):
            copy[20 + 50 * change] = "changed"
        texts += [" ".join(base), " ".join(copy)]
        assert 0.84 < jaccard(*(runs(text, 5) for text in texts[-2:])) < 0.85
    kept = set(deduplicate_near(datasets.Dataset.from_dict({"text": texts})))
    assert kept >= set(range(0, 200, 2))
    # Of the rest the estimate may be below 0.8: its standard error is 0.023.
    assert len(kept) - 100 <= 5


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_rows_that_share_a_run_of_words_with_a_held_out_set_go(tmp_path, suffix):
    rng = random.Random(2)

    def text(count):
        return [rng.choice("abcdefghij") + rng.choice("klmnopqrst") * 3 for _ in range(count)]

    held_out = [text(40), text(9), text(3)]
    planted = [
        [*text(5), *held_out[0][11:24], *text(5)],  # 13 words of the first
        [*text(5), *held_out[0][11:23], *text(5)],  # 12 words
        [*text(5), *held_out[1], *text(5)],  # all of the second
        [*text(5), *held_out[1][:8], *text(5)],
        [*text(5), *held_out[2], *text(5)],  # too short to tell
        held_out[2],
        text(50),
    ]
    rows = [{"text": " ".join(words), "n": n} for n, words in enumerate(planted)]
    rows[0]["text"] = rows[0]["text"].upper().replace(" ", ", ")
    file = tmp_path / f"held_out{suffix}"
    texts = [{"question": " ".join(words)} for words in held_out]
    texts += [{"question": None}, {"question": ""}, {"question": "!"}]
    table = pd.DataFrame(texts)
    if suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_json(file, orient="records", lines=True)  # compressed as its name says
    given = datasets.Dataset.from_list([*rows, {"text": " ...", "n": 7}])
    assert decontaminate(given, str(file), file_column="question") == [1, 3, 4, 6, 7]
    assert decontaminate(given, str(file), file_column="question", words=12) == [3, 4, 6, 7]
    with pytest.raises(
        DataError, match=f"file: .*{suffix} has no column 'text', but question: set"
    ):
        decontaminate(given, str(file))


def test_held_out_files_are_read_as_those_of_a_source(tmp_path):
    """A folder of them, and a row that cannot be read says where it is."""
    given = datasets.Dataset.from_dict({"text": ["one", "two", "three", "four"]})
    folder = tmp_path / "exams"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (folder / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}')
    assert decontaminate(given, str(folder)) == [1]
    operation = Operation(
        method="select", function="ditty.dedup:decontaminate", kwargs={"file": str(folder)}
    )
    before = operation_inputs(operation)
    (folder / "b.jsonl").write_text('{"text": "three"}\n{"text": ')
    assert operation_inputs(operation) != before
    with pytest.raises(
        DataError, match=r"exams has rows that .* x not JSON, at .*b.jsonl, line 2 "
    ):
        decontaminate(given, str(folder))
    (tmp_path / "a.md").touch()
    with pytest.raises(DataError, match="has the suffix '.md', expected one of .jsonl, .json"):
        decontaminate(given, str(tmp_path / "a.md"))
    with pytest.raises(DataError, match="no files .*/exam; did you mean .*/exams"):
        decontaminate(given, str(tmp_path / "exam"))


def test_what_the_runs_own_held_out_rows_have_goes(tmp_path):
    """Against runs of 13 words by hand, and the rows that `tokenize` does hold out."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghijklmnopqrst", k=30)) for _ in range(150)]
    for text, size in product(texts[:60], (11, 12, 13, 14)):
        texts.append(" ".join(text.split()[3 : 3 + size] + rng.choices("uvwxyz", k=15)))
    rows = [{"body": text} for text in texts]
    tokenizer = load_tokenizer(train_tokenizer(tmp_path / "tokenizer"))
    data = {"format": "text", "columns": {"text": "body"}, "eval_fraction": 0.3, "seq_len": 512}
    last = {"method": "select", "function": HELD_OUT, "kwargs": {"column": "body"}}
    (operation,) = DataSpec(source="x", operations=[last], **data).bound_operations

    def held_out(given):
        _, _, held = run(tmp_path, given, tmp_path / "tokenizer", **data)
        return [tokenizer.decode(row["input_ids"][:-1]) for row in held]

    held = held_out(rows)
    known = {gram for text in held for gram in runs(text, 13)}
    expected = [r for r in rows if r["body"] in held or not known & runs(r["body"], 13)]
    (tmp_path / "kept").mkdir()
    apply(operation, tmp_path / "source", tmp_path / "kept", Part())
    kept = tables.read(tmp_path / "kept" / "data.arrow").to_pylist()
    assert kept == expected and 200 < len(kept) < len(rows) - 30
    assert held_out(kept) == held and 80 < len(held) < 150
    other = DataSpec(source="x", operations=[last], **data | {"eval_fraction": 0.2})
    assert operation_inputs(other.bound_operations[0]) != operation_inputs(operation)


def test_held_out_rows_are_known_only_at_the_end():
    last = {"method": "select", "function": HELD_OUT}
    after = {"method": "shuffle", "kwargs": {"seed": 1}}
    with pytest.raises(ValueError, match="decontaminate_held_out must be the last of operations"):
        DataSpec(source="x", operations=[last, after])
    with pytest.raises(ValueError, match="needs held-out rows, and eval_fraction is 0"):
        DataSpec(source="x", operations=[after, last], eval_fraction=0.0)


def test_lengths(tmp_path):
    from transformers import AutoTokenizer

    folder = train_tokenizer(
        tmp_path / "tokenizer", None, post="<s> $A </s>", bos_token="<s>", eos_token="</s>"
    )
    count = len(AutoTokenizer.from_pretrained(folder).tokenize("Hello there, how"))
    row = {"text": "Hello there, how", "messages": CHAT, "nothing": None, "n": 3}
    file = str(folder / "tokenizer.json")
    assert count > 3
    assert tokens(row, file, at_least=count, at_most=count)
    assert not tokens(row, file, at_least=count + 1) and not tokens(row, file, at_most=count - 1)
    assert characters(row, at_least=16, at_most=16) and not characters(row, at_most=15)
    assert characters(row, "messages", 12, 12) and has_words(row, "messages", 2)
    shared = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "a"}]}
    assert characters(shared, "conversations", 7, 7)
    assert not characters(row, "nothing") and not has_words(row, "nothing")
    with pytest.raises(DataError, match="column 'n' holds int, expected a text or a list"):
        characters(row, "n")
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}
    with pytest.raises(DataError, match=r"a turn whose content is list \[.*, expected a string"):
        characters(parts, "messages")


@pytest.mark.parametrize(
    ("function", "method"),
    [("ditty.recipes:tokens", "filter"), ("ditty.dedup:decontaminate", "select")],
)
def test_the_content_of_a_file_is_in_the_key(tmp_path, function, method):
    file = tmp_path / "file.jsonl"
    operation = Operation(method=method, function=function, kwargs={"file": str(file)})
    with pytest.raises(
        DataError, match=r"kwargs.file: (cannot read|there are no files) .*/file.jsonl"
    ):
        operation_inputs(operation)
    file.write_text("{}")
    before = operation_inputs(operation)
    assert operation_inputs(operation) == before
    file.write_text("{} ")
    assert operation_inputs(operation) != before


def test_measures_of_quality_worked_by_hand():
    text = "# One two...\n\n- three 44 5…\n• six\n"
    assert quality(text) == {
        "words": 9,
        "mean_word_length": (1 + 3 + 6 + 1 + 5 + 2 + 2 + 1 + 3) / 9,
        "hash_signs_a_word": 1 / 9,
        "ellipses_a_word": 2 / 9,
        "bullet_lines": 2 / 3,
        "ellipsis_lines": 2 / 3,
        "alphabetic_words": 4 / 9,
    }


def test_measures_of_repetition_worked_by_hand():
    found = repetition("a bb\nc d\na bb\n\na bb")
    assert found["repeated_lines"] == 2 / 4
    assert found["characters_in_repeated_lines"] == 6 / 11
    assert found["repeated_paragraphs"] == found["characters_in_repeated_paragraphs"] == 0
    assert found["characters_in_top_2_gram"] == 9 / 11  # a bb, three times
    assert found["characters_in_top_3_gram"] == 0  # each is there once
    again = repetition("a bb a bb a bb a")
    assert again["characters_in_top_3_gram"] == 1  # a bb a, overlapping
    assert again["characters_in_repeated_5_grams"] == 7 / 10  # from the third word on
    twice = repetition("one\ntwo\n\nx\n\none\ntwo")
    assert twice["repeated_paragraphs"] == 1 / 3
    assert twice["characters_in_repeated_paragraphs"] == 6 / 13


def test_prose_stays_and_spam_goes():
    prose = (Path(__file__).parent.parent / "LICENSE").read_text().split("APPENDIX")[0]
    spam = "Buy cheap watches now at our store. " * 20
    table = "\n".join(f"- {n} {n * n} {n**3}" for n in range(50))
    verdicts = [
        (gopher_quality({"text": t}), gopher_repetition({"text": t})) for t in (prose, spam, table)
    ]
    assert verdicts == [(True, True), (True, False), (False, True)]
    assert gopher_repetition({"body": None}, "body")
    short = {"text": "a few plain words"}
    assert not gopher_quality(short) and gopher_quality(short, limits={"words": [1, 9]})
    with pytest.raises(DataError, match="no measure 'word': did you mean words?"):
        gopher_quality(short, limits={"word": [1, 9]})


def test_a_recipe_over_all_rows_is_an_operation_like_any_other(tmp_path):
    for name in ("source", "one", "three"):
        (tmp_path / name).mkdir()
    table = pa.table({"text": [f"text {n % 700}" for n in range(2100)]})
    tables.write(tmp_path / "source" / "data.arrow", [table], table.schema)
    operation = Operation(method="select", function="ditty.dedup:deduplicate")
    for name, processes in (("one", 1), ("three", 3)):
        facts = apply(operation, tmp_path / "source", tmp_path / name, Part(num_proc=processes))
        assert (facts["rows_in"], facts["rows"]) == (2100, 700)
    files = [(tmp_path / name / "data.arrow").read_bytes() for name in ("one", "three")]
    assert files[0] == files[1]


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(DataError, match="datasketch cannot be imported: .* Is it installed"):
        digest(deduplicate_near)
