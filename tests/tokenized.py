"""Rows through the stage `tokenize`, and what of them is supervised, as text."""

import pyarrow as pa

from ditty.config.dataspec import DataSpec
from ditty.dataset import tables
from ditty.dataset.tokenization import tokenize


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def run(tmp_path, rows, tokenizer, **spec):
    """Tokenize; facts, training rows and held-out rows."""
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    tables.write(source / "data.arrow", [table], table.schema)
    data = DataSpec(**({"source": "x", "eval_fraction": 0.0} | spec))
    facts = tokenize(data, tokenizer, source, out)
    return facts, *(tables.read(out / f"{n}.arrow").to_pylist() for n in ("train", "eval"))


def run_chats(tmp_path, chats, tokenizer, **spec):
    return run(tmp_path, [{"messages": messages(c)} for c in chats], tokenizer, **spec)


def supervised(tokenizer, row):
    """The supervised text, a `·` for each stretch that is not."""
    text = ""
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, -100)
        text += "\0" if label == -100 else tokenizer.decode([token])
    return "·".join(part for part in [""] * text.startswith("\0") + text.split("\0") if part)
