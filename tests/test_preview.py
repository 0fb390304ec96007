"""`ditty preview`: it shows what the stages make, from the first rows alone, and keeps nothing."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from ditty.dataset import tables
from ditty.dataset.tokenization import load_tokenizer
from ditty.errors import DataError, ModelError
from ditty.planning import preview as module
from ditty.planning.preview import PreviewRow, Token, preview, token_texts
from ditty.stages import stageline
from ditty.store.artifacts import Store
from flows.commands.cli import app
from flows.commands.preview_command import print_rows, to_html
from tests.fake_hub import REPO, fake_hub
from tests.test_bad_input import make_spec, prepare
from tests.tiny import make_model_folder
from tests.tokenized import messages
from tests.tokenizers_for_tests import train_tokenizer

TALKS = [
    [("user", "<b>Grüße 🙂</b>\nx"), ("assistant", "ja [bold]\x1b[31m"), ("user", "&")],
    [],
    [("user", "q " * 60), ("assistant", "y")],
    [("user", "skip me"), ("assistant", "y")],
    [("user", "only me")],
    [("user", "q"), ("assistant", "y " * 60)],
    [("system", "s"), ("user", "q"), ("assistant", "</pre><script>alert(1)</script>")],
]
KEEP = "def keep(row):\n    return not any('skip' in m['content'] for m in row['messages'])\n"


def talks_spec(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "ops.py").write_text(KEEP)
    changes = {
        "data__operations": [{"method": "filter", "function": f"{tmp_path}/ops.py:keep"}],
        "data__eval_fraction": 0.0,
        **changes,
    }
    return make_spec(tmp_path, [{"messages": messages(talk)} for talk in TALKS], **changes)


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_it_shows_what_the_stages_make(tmp_path, home, overlong):
    spec = talks_spec(tmp_path, data__overlong=overlong)
    shown = preview(spec, Store(), 100)
    assert not home.exists(), "nothing is kept"
    assert [row.number for row in shown] == list(range(len(TALKS) - 1)), "one is filtered out"
    facts = prepare(spec)["tokenize"]
    made = tables.read(
        Store().path("tokenize", stageline.resolve(spec, Store()).need("tokenize").key)
        / "train.arrow"
    ).to_pylist()
    used = [row for row in shown if not (row.fate or "").startswith("dropped")]
    assert made == [
        {
            "input_ids": [token.id for token in row.tokens],
            "labels": [token.id if token.supervised else -100 for token in row.tokens],
        }
        for row in used
    ]
    assert len(shown) - len(used) == sum(facts["dropped"].values()) >= 3
    assert sum(row.supervised for row in used) == facts["supervised_tokens"]
    cut = [row.number for row in shown if (row.fate or "").startswith("cut: ")]
    assert len(cut) == facts["truncated"]
    assert bool(cut) is (overlong == "truncate")
    assert shown[1].fate == "dropped: empty"


@pytest.mark.parametrize("form", ["messages", "tokens"])
def test_it_shows_rows_that_a_run_sets_aside(tmp_path, home, form):
    """Those that the format cannot read, and those that only the encoder refuses."""
    rows: list[Any] = [{"messages": messages(TALKS[0])} for _ in range(4)]
    rows[1] = {"messages": [{"role": "user", "content": None}, *messages(TALKS[0])]}
    if form == "tokens":
        rows = [{"input_ids": ids} for ids in ([1, 2, 3], [4, 10_000], [3, 2, 1], [7, 8])]
    changes = {"data__eval_fraction": 0.0, "data__max_bad_fraction": 0.5}
    spec = make_spec(tmp_path, rows, data__format=form, **changes)
    shown = preview(spec, Store(), 100)
    (reason,) = prepare(spec)["tokenize"]["quarantined"]
    aside = [(row.fate or "").startswith(f"set aside: {reason} (") for row in shown]
    assert aside == [False, True, False, False] == [not row.tokens for row in shown]


def test_it_reads_the_first_rows_alone(tmp_path, monkeypatch):
    source = "def rows():\n    for i in range(51):\n        assert i < 50\n"
    (tmp_path / "rows.py").write_text(
        source + "        yield {'text': 'skip' if i < 40 else 'b'}\n"
    )
    (tmp_path / "ops.py").write_text("def keep(row):\n    return row['text'] != 'skip'\n")
    operations = [{"method": "filter", "function": f"{tmp_path}/ops.py:keep"}]
    changes = {"data__source": f"{tmp_path}/rows.py:rows", "data__operations": operations}
    spec = make_spec(tmp_path, data__format="text", **changes)
    monkeypatch.setattr(module, "SOURCE_ROWS", 50)
    assert len(preview(spec, Store(), 3)) == 3
    assert len(preview(spec, Store(), 100)) == 10
    with pytest.raises(DataError, match="first 40 rows: operation filter .* leaves none of 40"):
        monkeypatch.setattr(module, "SOURCE_ROWS", 40)
        preview(spec, Store(), 3)


# Texts


def test_token_texts_join_to_what_the_tokenizer_decodes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytewise = load_tokenizer(train_tokenizer(tmp_path / "bytes"))
    pieces = ["<unk>", "</s>", "▁", "▁a", "b", "▁b", *(f"<0x{i:02X}>" for i in range(256))]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    for tokenizer in (bytewise, spaced):
        ids = tokenizer("a b\n🙂 ü b</s>")["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert "".join(texts) == tokenizer.decode(ids)
        assert len(texts) == len(ids)
        assert "🙂" in texts and texts[texts.index("🙂") - 1] == ""


# Colours, brackets, HTML


def test_without_colours_brackets_say_what_is_learned(tmp_path, monkeypatch):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(talks_spec(tmp_path).model_dump(mode="json")))
    made = CliRunner().invoke(app, ["preview", str(path), "--html", str(tmp_path / "rows.html")])
    assert made.exit_code == 0, made.output
    assert "\x1b" not in made.output
    first, *others = re.split(r"^row \d: ", made.output, flags=re.MULTILINE)[1:]
    assert len(others) == 2
    stretches = re.findall("⟦(.*?)⟧", first)
    assert [s.replace("¦", "") for s in stretches] == [r"ja [bold]\u001b[31m<|im_end|>"]
    assert "¦G¦r¦�¦ü¦�¦ß¦e¦" in first
    assert others[0].startswith("0 tokens, 0 supervised; dropped: empty\n")
    assert (tmp_path / "rows.html").read_text().count("<pre>") == 3
    none = CliRunner().invoke(app, ["preview", str(path), "--rows", "0"])
    assert none.exit_code != 0
    nowhere = ["preview", str(path), "--html", str(tmp_path / "no" / "rows.html")]
    assert "cannot write" in str(CliRunner().invoke(app, nowhere).exception)


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_what_is_learned_is_green(tmp_path, no_color):
    rows = preview(talks_spec(tmp_path), Store(), 1)
    out = StringIO()
    print_rows(rows, Console(file=out, force_terminal=True, color_system="standard",
                             no_color=no_color, highlight=False))  # fmt: skip
    body = out.getvalue().partition("supervised")[2].rpartition("learned")[0]
    if no_color:
        assert "⟦j¦a¦" in body and "[30;" not in body
        return
    # Each run of characters with its last colour code.
    coded = re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", body)
    green = "".join(text for code, text in coded if code in ("30;42", "30;102"))
    assert green == r"ja [bold]\u001b[31m<|im_end|>"
    assert len([1 for code, _ in coded if code.startswith("30;")]) == rows[0].supervised


class Spans(HTMLParser):
    """A browser's view: the text of each token, and whether it is coloured."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[tuple[str, bool]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.inside = "title" in values
        if self.inside:
            self.tokens.append(("", values.get("class") == "learned"))

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            text, is_learned = self.tokens[-1]
            self.tokens[-1] = (text + data, is_learned)


def test_the_page_is_escaped_and_stands_alone(tmp_path):
    spec = talks_spec(tmp_path)
    whole = Token(7, "<script>alert(1)</script>&amp;", supervised=True)  # a tag in one token
    rows = [*preview(spec, Store(), 100), PreviewRow(9, [whole], "dropped: <i>")]
    page = to_html(rows, spec)
    assert not re.search(r"https?:|src=|href=|url\(", page)
    parsed = Spans(page)
    assert parsed.tags == {"html", "meta", "title", "style", "h1", "p", "span", "h2", "pre"}
    tokens = [token for row in rows for token in row.tokens]
    assert [is_learned for _, is_learned in parsed.tokens] == [t.supervised for t in tokens]
    shown = "".join(text for text, _ in parsed.tokens).replace("⏎", "")
    assert "</pre><script>alert(1)</script>" in shown
    assert r"ja [bold]\u001b[31m" in shown
    assert parsed.tokens[-1] == (whole.text, True)


# Where the tokenizer comes from


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    folder = make_model_folder(tmp_path / "repository")
    with fake_hub(folder, tmp_path / "cache", monkeypatch) as running:
        yield running


def test_of_a_hub_model_only_the_tokenizer_is_fetched(tmp_path, hub):
    local = preview(talks_spec(tmp_path), Store(), 3)
    assert preview(talks_spec(tmp_path, model__base_model=REPO), Store(), 3) == local
    asked = [request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request]
    assert "tokenizer.json" in asked and "model.safetensors" not in asked
    assert (
        stageline.resolve(talks_spec(tmp_path, model__base_model=REPO), Store()).model_dir is None
    )


def test_a_gguf_file_must_be_converted_first(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="model.gguf is not converted yet.*ditty run"):
        preview(talks_spec(tmp_path, model__base_model=str(tmp_path / "model.gguf")), Store(), 1)
