"""`data.chat_template`: from the spec through the tokens into the result."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from ditty import worker
from ditty.config.spec import RunSpec
from ditty.config.specfile import load_spec, parse_spec
from ditty.dataset import tables
from ditty.errors import DataError, SpecError
from ditty.runs.rundir import Status
from ditty.stages import stageline
from ditty.store.artifacts import Store
from ditty.store.files import locked
from flows.training import Work
from tests.test_bad_input import GOOD_ROWS, make_spec, prepare
from tests.tiny import make_model_folder, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def spec_file(tmp_path: Path, template: str, base: str | None = None) -> Path:
    make_model_folder(tmp_path / "model", tokenizer=make_tokenizer(chat_template=base))
    train = {"precision": "fp32", "max_steps": 1, "gradient_accumulation_steps": 1}
    spec = make_spec(tmp_path, data__chat_template="{{ }}", train=train)
    values = spec.model_dump(mode="json")
    values["data"]["chat_template"] = template
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def template_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


def keys(spec: RunSpec) -> dict[str, str]:
    return {ref.stage: ref.key for ref in stageline.resolve(spec, Store()).refs}


def test_a_templates_text_is_in_the_spec_and_its_key(tmp_path, template_file, monkeypatch):
    path = spec_file(tmp_path, "chat.jinja")
    monkeypatch.chdir("/")
    spec = load_spec(path)
    assert spec.data.chat_template == TEMPLATE
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec
    by_text = load_spec(path, ["name=other"])
    assert keys(by_text) == keys(spec)
    template_file.write_text(TEMPLATE.replace(": ", "> "))
    edited = keys(load_spec(path))
    assert edited["load"] == keys(spec)["load"]
    changed = {stage for stage, key in edited.items() if key != keys(spec)[stage]}
    assert changed == {"tokenize", "pack", "train"}


@pytest.mark.parametrize("base", [None, "{{ messages[0].content }} of the base"])
def test_what_is_trained_carries_its_template(tmp_path, template_file, base):
    """The base has no template, or another: the result and the merged model have the spec's."""
    spec, store = load_spec(spec_file(tmp_path, "chat.jinja", base)), Store()
    prepare(spec)
    line = stageline.resolve(spec, store)
    tokens, pack, train = (line.need(stage) for stage in ("tokenize", "pack", "train"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs.chat_template = TEMPLATE
    expected = [theirs.apply_chat_template(r["messages"], return_dict=False) for r in GOOD_ROWS]
    folder = store.path("tokenize", tokens.key)
    made = [r for n in ("train", "eval") for r in tables.read(folder / f"{n}.arrow").to_pylist()]
    assert sorted(r["input_ids"] for r in made) == sorted(expected)

    work = Work(spec, store, line.model_dir, store.path("pack", pack.key))
    assert do("train", train, work, tmp_path / "attempt") == TEMPLATE
    merge = stageline.merge_ref(train.key, stageline.model_key(line))
    assert do("merge", merge, work.of_result(train.key), tmp_path / "merging") == TEMPLATE


def do(stage: str, ref: stageline.StageRef, work: Work, attempt: Path) -> str:
    """Run a stage in this process; the chat template of what it has made."""
    attempt.mkdir()
    job = worker.Job(**{**work.job(ref), "spec": work.spec, "home": work.store.home,
                        "model_dir": work.model_dir, "data_dir": work.data_dir,
                        "trained_dir": work.trained_dir})  # fmt: skip
    with locked(work.store.lock(ref.stage, ref.key).path):
        assert worker.STAGES[stage](job, attempt).status is Status.OK
    tokenizer = AutoTokenizer.from_pretrained(work.store.path(ref.stage, ref.key))
    return tokenizer.chat_template


def test_a_tokenizer_without_a_template_names_the_key(tmp_path):
    make_model_folder(tmp_path / "model", tokenizer=make_tokenizer(chat_template=None))
    with pytest.raises(DataError, match="has no chat template: name one in data.chat_template"):
        prepare(make_spec(tmp_path))


def test_a_template_with_a_mistake_is_refused(tmp_path):
    spec = make_spec(tmp_path, data__chat_template="{% for m in messages %}")
    with pytest.raises(DataError, match="x the chat template refuses .*endfor"):
        prepare(spec)


def test_what_is_no_template(tmp_path, template_file):
    path = spec_file(tmp_path, "chats.jinja")
    with pytest.raises(SpecError, match=r"no file .*/chats.jinja; did you mean .*/chat.jinja\?"):
        load_spec(path)
    values = yaml.safe_load(path.read_text())
    with pytest.raises(SpecError, match="'chats.jinja' is no Jinja text"):
        parse_spec(values)
    overrides = [f"data.chat_template={template_file}", "data.format=text"]
    with pytest.raises(SpecError, match="is for format: messages or conversations, not for text"):
        load_spec(path, overrides)
    template_file.write_bytes(b"{{ \xff }}")
    with pytest.raises(SpecError, match="cannot read .*chat.jinja"):
        load_spec(path, [f"data.chat_template={template_file}"])
