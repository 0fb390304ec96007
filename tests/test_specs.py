"""The spec: what it refuses and how it says so, and every spec that ships."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from ditty.config.dataspec import DataSpec
from ditty.config.spec import RunSpec
from ditty.config.specfile import load_spec, parse_spec
from ditty.dataset.functions import resolve
from ditty.errors import SpecError
from ditty.planning.plan import make_plan
from ditty.planning.preview import preview
from ditty.store.artifacts import Store
from tests.tiny import make_model_folder, tiny_config

ROOT = Path(__file__).parent.parent
SPECS = ROOT / "deployments/specs"
SHIPPED = [*sorted(SPECS.glob("*.yaml")), ROOT / "ditty/planning/demo.yaml"]

MINIMAL = {"name": "x", "data": {"source": "rows.jsonl"}, "model": {"base_model": "org/name"}}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_specs_are_valid_and_name_functions_that_exist(path):
    spec = load_spec(path)
    assert spec.name == path.stem
    for operation in spec.data.operations:
        assert callable(resolve(operation.function))
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_the_shipped_rows_are_there_for_the_shipped_specs(tmp_path, home, monkeypatch):
    """Planned and read as the guides say, in `deployments/`; the model alone is another."""
    monkeypatch.chdir(ROOT / "deployments")
    monkeypatch.setenv("DITTY_MACHINE_RANK", "0")
    monkeypatch.setenv("DITTY_MAIN_HOST", "node0")
    folder = make_model_folder(tmp_path / "model", tiny_config(max_position_embeddings=2048))
    used = []
    for path in sorted(Path("specs").glob("*.yaml")):
        spec = load_spec(path, [f"model.base_model={folder}"])
        if spec.data.source.startswith("/"):
            used.append(Path(spec.data.source).name)
            assert make_plan(spec, Store()).stages[0].title == f"load {used[-1]}"
            rows = preview(spec, Store(), 100)
            assert len(rows) == 20 and all(row.supervised and row.fate is None for row in rows)
    assert sorted(used) == sorted(path.name for path in SPECS.glob("*.jsonl"))
    assert len(used) == 2


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


GOOD = "name: x\ndata: {source: rows.jsonl}\nmodel: {base_model: org/name}\n"


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "train.learnin_rate=1",
            "unknown key train.learnin_rate: did you mean train.learning_rate?",
        ),
        ("train.lr=1", "unknown key train.lr: did you mean train.learning_rate?"),
        ("trian.max_steps=1", "unknown key trian: did you mean train?"),
        (
            "train.schedule=cosin",
            "(did you mean cosine?)",
        ),
        ("train.max_steps=0", "train.max_steps: got 0, expected a whole number from 1"),
        ("train.seed=abc", "train.seed"),
        ("name=Bad/Name", "'Bad/Name' is no run name"),
        ("name=../x", "is no run name"),
        ("upload.url=ftp://x", "expected s3://bucket/prefix or file:///folder"),
        ("upload.url=s3://key:secret@bucket", "is no target"),
        ("model.adapter=none", None),
        (
            "data.loss_on=completion",
            "data.loss_on: completion does not go with format: messages; expected assistant or all",
        ),
        ("data.packing=next", "(did you mean next_fit?)"),
        ("data.packing=none", None),
        ("data.columns={promt: x}", "columns maps ['promt']"),
        ("model.trust_remote_code=true", "pin model.revision to the commit"),
        ("train", "expected section.key=value"),
        ("name.x=1", "name is not a section"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest_valid_one(tmp_path, override, message):
    path = write(tmp_path, GOOD)
    if message is None:
        load_spec(path, [override])
        return
    with pytest.raises(SpecError) as error:
        load_spec(path, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train": {"on_non_finite": "warn"}},
            "train.on_non_finite: got 'warn', expected 'skip' or 'stop'",
        ),
        (
            {"train": {"micro_batch_size": "foo"}},
            "train.micro_batch_size: got 'foo', expected a whole number from 1, or auto",
        ),
        (
            {"train": {"report_to": "mlflow"}},
            "train.report_to: got 'mlflow', expected a list: [mlflow]",
        ),
        (
            {"model": {"base_model": "a/b", "lora_dropout": 1.5}},
            "model.lora_dropout: got 1.5, expected a number from 0 below 1",
        ),
        (
            {"evaluate": {"require": "nonsense"}},
            "evaluate.require: got 'nonsense', expected measure: condition, e.g. "
            '{eval_loss: "< base"}',
        ),
        (
            {"evaluate": {"require": {"eval_loss": 2}}},
            'evaluate.require.eval_loss: got 2, expected a condition in quotes, e.g. "<= 2"',
        ),
        (
            {"evaluate": {"require": {"evalloss": "< 2"}}},
            "evaluate.require: 'evalloss' is measured by nothing; did you mean eval_loss?",
        ),
        (
            {"evaluate": {"require": {"quiz/acc": "> 0"}}},
            "evaluate.require: names quiz/acc, and evaluate.tasks is empty: add quiz to it",
        ),
        (
            {"data": {"sources": ["rows.jsonl"]}},
            "data.sources.0: got 'rows.jsonl', expected {source: rows.jsonl}",
        ),
        (
            {"data": {"source": "a", "operations": ["filter"]}},
            "data.operations.0: got 'filter', expected {method: filter, function: ...}",
        ),
        (
            {"data": {"source": "a", "operations": {"method": "filter"}}},
            "data.operations: got a mapping, expected a list of them: [{method: filter, ...}]",
        ),
        (
            {"data": {"source": "a", "columns": {3: "q"}}},
            "data.columns.3: got 3, expected text",
        ),
        (
            {"data": {"source": "a", "engine": "ray"}},
            "data.engine: ray needs data.engine_address: ray://host:10001",
        ),
        (
            {"launch": {"environment": {"WANDB_API_KEY": "canary"}}},
            "launch.environment: got a mapping, expected a list of names: [WANDB_API_KEY]",
        ),
        (
            {"data": {"source": "a", "operations": [{"method": "sort", "kwargs": {True: 1}}]}},
            "data.operations.0.kwargs.1: got True, expected text as its key",
        ),
        ({"model": "tiny"}, "model: got 'tiny', expected a section: {base_model: tiny}"),
        (
            {"upload": {"url": "gs://x"}},
            "upload.url: 'gs://x' is no target; expected s3://bucket/prefix or file:///folder",
        ),
        (
            {"train": {"foo": 1}},
            "unknown key train.foo: the 39 keys of train are documented in ditty/config/spec.py",
        ),
        (
            {"launch": {"foo": 1}},
            "unknown key launch.foo: the 14 keys of launch are documented in "
            "ditty/config/launchspec.py",
        ),
        ({"upload": {"foo": 1}}, "unknown key upload.foo: expected one of url, checkpoints"),
    ],
)
def test_a_mistake_is_told_whole(changes, message):
    with pytest.raises(SpecError) as error:
        parse_spec(MINIMAL | changes)
    assert str(error.value) == f"spec: {message}"


def test_what_is_missing_is_told_with_its_first_keys(tmp_path):
    with pytest.raises(SpecError) as error:
        parse_spec({"name": "x"})
    sections = ["data: {source: ...}", "model: {base_model: ...}"]
    assert str(error.value).splitlines() == [f"spec: missing section {s}" for s in sections]
    with pytest.raises(SpecError) as error:
        load_spec(write(tmp_path, ""))
    expected = "is empty; expected at least data.source and model.base_model"
    assert str(error.value) == f"{tmp_path}/spec.yaml {expected}"


def test_quantized_base_cannot_be_trained_itself(tmp_path):
    with pytest.raises(SpecError, match="use adapter: lora"):
        load_spec(write(tmp_path, GOOD), ["model.adapter=none", "model.quantization=nf4"])


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "name: x\n"])
def test_files_that_are_no_spec(tmp_path, text):
    with pytest.raises(SpecError):
        load_spec(write(tmp_path, text))


def test_missing_file():
    with pytest.raises(SpecError, match="cannot read the spec nowhere.yaml"):
        load_spec(Path("nowhere.yaml"))


@pytest.mark.parametrize(("old", "new"), [("true", "best_fit"), ("false", "none")])
def test_a_spec_from_when_packing_was_a_switch_means_what_it_did(tmp_path, old, new):
    spec = load_spec(write(tmp_path, GOOD), [f"data.packing={old}"])
    assert spec == load_spec(write(tmp_path, GOOD), [f"data.packing={new}"])
    assert spec.model_dump(mode="json")["data"]["packing"] == new


def test_overrides_are_yaml_and_numbers_in_any_notation(tmp_path):
    overrides = ["train.learning_rate=1e-4", "train.max_steps=7", "data.columns={text: body}"]
    spec = load_spec(write(tmp_path, GOOD), [*overrides, "data.format=text"])
    assert (spec.train.learning_rate, spec.train.max_steps) == (1e-4, 7)
    assert spec.data.columns == {"text": "body"}


def test_relative_paths_follow_the_file_not_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "ops.py").write_text("def keep(row): return True\n")
    text = GOOD + ""
    text = text.replace(
        "{source: rows.jsonl}",
        "{source: rows.jsonl, operations: [{method: filter, function: 'ops.py:keep', "
        "kwargs: {file: rows.jsonl, column: rows.jsonl}}]}",
    )
    path = write(tmp_path, text)
    monkeypatch.chdir("/")
    spec = load_spec(path)
    assert spec.data.source == str(tmp_path / "rows.jsonl")
    assert spec.data.operations[0].function == f"{tmp_path}/ops.py:keep"
    kwargs = {"file": f"{tmp_path}/rows.jsonl", "column": "rows.jsonl"}
    assert spec.data.operations[0].kwargs == kwargs
    assert spec.model.base_model == "org/name"


@pytest.mark.parametrize("pattern", ["part-*.jsonl", "part-**.jsonl", "**/part-0.jsonl"])
def test_a_relative_pattern_follows_the_file(tmp_path, monkeypatch, pattern):
    (tmp_path / "part-0.jsonl").write_text("{}\n")
    path = write(tmp_path, GOOD)
    monkeypatch.chdir("/")
    assert load_spec(path, [f"data.source='{pattern}'"]).data.source == f"{tmp_path}/{pattern}"
    for other in (f"{tmp_path}/{pattern}", f"no/{pattern}"):
        assert load_spec(path, [f"data.source='{other}'"]).data.source == other


def test_the_schema_has_a_description_for_every_key():
    """It is the form in Prefect's UI."""
    schema = parse_spec(MINIMAL).model_json_schema()
    for name, section in {"RunSpec": schema, **schema["$defs"]}.items():
        keys = section.get("properties", {}).values()  # PostgreSQL does not keep their order
        assert [key["position"] for key in keys] == list(range(len(keys)))
        assert section.get("description"), name
        for key, field in section.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def test_two_mistakes_are_both_told(tmp_path):
    with pytest.raises(SpecError) as error:
        load_spec(write(tmp_path, GOOD), ["train.max_step=1", "data.seqlen=4"])
    assert "max_steps" in str(error.value) and "seq_len" in str(error.value)


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [b for b in blocks if containing in b]
    return found


def test_the_readmes_spec_is_valid():
    spec = parse_spec(yaml.safe_load(readme_block("yaml", "name: my-run")))
    assert spec.global_batch_size == 16 and spec.data.supervised == "completion"


def test_the_readmes_ready_made_operations_exist():
    values = yaml.safe_load(readme_block("yaml", "deduplicate_near"))
    for operation in DataSpec(source="x", **values).bound_operations:
        inspect.signature(resolve(operation.function)).bind("the rows", **operation.kwargs)


def test_the_readmes_library_example_runs(tmp_path, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    rows = [{"text": f"a row of text, number {i}, to be learned"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    code = readme_block("python", "class Mine(Pipeline)")
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(folder))
    code = code.replace("max_steps=100", 'max_steps=2, precision="fp32"')
    exec(compile(code, "README", "exec"), {"__name__": "readme"})
    assert (tmp_path / "out/final/adapter_model.safetensors").is_file()
