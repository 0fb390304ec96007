"""A user's mistakes: each a clear error, before a process is started or a GPU touched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditty.config.spec import RunSpec
from ditty.errors import DataError, ModelError, RemoteError, RunMismatch, SpecError, StoreError
from ditty.planning import preflight
from ditty.planning.plan import make_plan
from ditty.planning.preflight import spec_differences
from ditty.runs.rundir import RunDir
from ditty.stages import datastages, stageline
from ditty.store.artifacts import Store, read_manifest
from ditty.store.files import locked, make_dir, write_json
from tests.tiny import make_model_folder, make_tokenizer, tiny_config

GOOD_ROWS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "yes"}]}
    for i in range(20)
]


@pytest.fixture
def no_process(monkeypatch):
    """Starting anything is a failure."""

    def refuse(*arguments: Any, **_: Any) -> None:
        pytest.fail(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def make_spec(tmp_path: Path, rows: Any = GOOD_ROWS, **changes: Any) -> RunSpec:
    if not isinstance(rows, str):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(rows)
    if not (tmp_path / "model").exists():
        make_model_folder(tmp_path / "model")
    values: dict[str, Any] = {
        "name": "x",
        "data": {"source": str(tmp_path / "rows.jsonl"), "seq_len": 64, "eval_fraction": 0.2},
        "model": {"base_model": str(tmp_path / "model")},
        "train": {"precision": "fp32"},
        "launch": {"device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    return RunSpec.model_validate(values)


def prepare(spec: RunSpec) -> dict[str, Any]:
    """What the flow does before the first process: preflight and the data stages."""
    store = Store()
    line = preflight.check(spec, store)
    facts = {}
    for ref in line.data():
        with locked(store.lock(ref.stage, ref.key).path):
            facts[ref.stage] = datastages.build_data(ref, line, spec, store).facts
    return facts


def test_a_good_spec_passes_and_its_plan_turns_cached(tmp_path, no_process):
    spec = make_spec(tmp_path)
    before = make_plan(spec, Store())
    assert [p.stage for p in before.stages] == ["load", "tokenize", "pack", "train"]
    assert {p.state for p in before.stages} == {"will run"} and before.steps is None
    facts = prepare(spec)
    tokens = facts["tokenize"]
    assert tokens["rows"] == 20 == tokens["train_rows"] + tokens["eval_rows"]
    after = make_plan(spec, Store())
    assert [p.state for p in after.stages] == ["cached"] * 3 + ["will run"]
    assert after.steps == -(-facts["pack"]["rows"] // 8)
    assert json.dumps(after.to_json())
    changed = make_plan(make_spec(tmp_path, data__seq_len=32), Store())
    assert [p.state for p in changed.stages] == ["cached"] + ["will run"] * 3
    assert "after tokenize" in changed.stages[2].why


def test_a_plan_says_that_a_step_which_may_be_skipped_waits(tmp_path):
    said = [
        make_plan(make_spec(tmp_path, train__on_spike=action), Store()).strategy
        for action in ("stop", "skip")
    ]
    assert ["each step waits for its numbers" in text for text in said] == [False, True]


def test_a_plan_says_where_the_memory_of_a_gpu_goes(tmp_path, monkeypatch):
    assert make_plan(make_spec(tmp_path), Store()).memory == ""
    for module in ("plan", "fit"):
        monkeypatch.setattr(f"ditty.planning.{module}.resolve_device", lambda _: "cuda")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 16384\necho 24576\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    said = make_plan(make_spec(tmp_path), Store()).memory
    assert f"of {0.92 * 16384 * 2**20 / 1e9:.1f} GB a process" in said  # the smaller card's
    assert "0 of 2 blocks recomputed" in said and "too much" not in said
    tool.write_text("#!/bin/sh\necho 1\n")
    said = make_plan(make_spec(tmp_path, train__micro_batch_size=512), Store()).memory
    assert "2 of 2 blocks recomputed. That is too much: lower train.micro_batch_size" in said
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert " GB a process (weights" in make_plan(make_spec(tmp_path), Store()).memory


def test_a_plan_needs_no_target_before_there_is_a_result(tmp_path, no_process):
    spec = make_spec(tmp_path, upload={"url": f"file://{tmp_path}/not/yet"})
    planned = make_plan(spec, Store()).stages[-1]
    assert (planned.stage, planned.state) == ("upload", "will run")
    assert not (tmp_path / "not").exists(), "a plan creates nothing"


def test_a_plan_refuses_what_a_run_would(tmp_path, no_process, monkeypatch):
    """All but the upload target, which a run writes to."""
    monkeypatch.delenv("DITTY_MACHINE_RANK", raising=False)
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    quiz = str(tmp_path / "quiz.yaml")
    for changes, message in (
        ({"train__report_to": ["wandb"]}, r"train\.report_to: wandb needs"),
        ({"evaluate": {"tasks": [quiz]}}, rf"evaluate\.tasks: cannot read {quiz}"),
        ({"launch__num_machines": 2}, "DITTY_MACHINE_RANK"),
        (
            {"train__optimizer": "paged_adamw"},
            r"train\.optimizer: paged_adamw needs a GPU, and this run is on cpu: use adamw",
        ),
        ({"launch__environment": ["NO_SUCH_TOKEN"]}, "NO_SUCH_TOKEN, which is not set"),
    ):
        for refusing in (make_plan, preflight.check):
            with pytest.raises(SpecError, match=message):
                refusing(make_spec(tmp_path, **changes), Store())


TEXT = {"data__format": "text"}
PAIRS = {"data__format": "prompt_completion"}


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        ([{"massages": []}], {}, "messages"),
        ([{"text": "a", "n": 1}], PAIRS, "prompt"),
        ([{"text": "a"}, {"text": 3}], TEXT, "text"),
        ([{"text": 3}, {"text": 4}], TEXT, "row 0"),
        ([{"text": "a"}, {"text": None}], TEXT, "row 1"),
        ([{"messages": "hello"}], {}, "row 0"),
        ("", {}, "has no rows"),
        ('{"text": "a"}\n{"text": \n', TEXT, "line 2"),
        ([{"prompt": "a", "completion": "b"}], {**PAIRS, "data__columns": {"prompt": "q"}}, "q"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_rows_that_cannot_be_used(tmp_path, no_process, rows, changes, message):
    with pytest.raises(DataError) as error:
        prepare(make_spec(tmp_path, rows, **changes))
    assert message in str(error.value)


def test_a_few_bad_rows_are_kept_beside_the_good_ones(tmp_path, no_process):
    lines = [json.dumps(row) for row in GOOD_ROWS * 10]
    lines[6] = '{"messages":'
    lines[7] = '{"messages": null}'
    rows = "\n".join(lines)
    facts = prepare(make_spec(tmp_path, rows))
    line = stageline.resolve(make_spec(tmp_path, rows), Store())
    for stage, position in (("load", "line 7"), ("tokenize", "row 6")):
        assert sum(facts[stage]["quarantined"].values()) == 1
        folder = Store().path(stage, line.need(stage).key)
        assert "quarantine.jsonl" in read_manifest(folder).files
        assert f'"position": "{position}"' in (folder / "quarantine.jsonl").read_text()
    other = make_spec(tmp_path, rows, data__max_bad_fraction=0.5)
    assert [p.state for p in make_plan(other, Store()).stages][:3] == ["cached"] * 3
    datastages.check_bad_rows(line, other, Store())
    strict = make_spec(tmp_path, rows, data__max_bad_fraction=0.001)
    with pytest.raises(DataError, match=r"load rows.jsonl: 1 of 200 rows \(0.50%\).*quarantine"):
        datastages.check_bad_rows(line, strict, Store())
    first = make_spec(tmp_path, rows)
    assert not spec_differences(first.model_dump(mode="json"), other.model_dump(mode="json"))


def test_unknown_source_and_model(tmp_path, no_process):
    with pytest.raises(DataError, match="rows.jsonl"):
        prepare(make_spec(tmp_path, data__source=str(tmp_path / "row.jsonl")))
    with pytest.raises(DataError, match=r"data\.split: got 'tarin', which is for hub data sets"):
        make_plan(make_spec(tmp_path, data__split="tarin"), Store())
    with pytest.raises(DataError, match="rows.jsonl"):  # the hub is not asked first
        both = {"data__source": str(tmp_path / "row.jsonl"), "model__base_model": "org/nope"}
        make_plan(make_spec(tmp_path, **both), Store())
    with pytest.raises(ModelError, match="did you mean"):
        prepare(make_spec(tmp_path, model__base_model=str(tmp_path / "modle")))


def test_unknown_function(tmp_path, no_process):
    (tmp_path / "ops.py").write_text("def keep(row):\n    return True\n")
    operation = {"method": "filter", "function": f"{tmp_path}/ops.py:kep"}
    with pytest.raises(DataError, match="keep"):
        prepare(make_spec(tmp_path, data__operations=[operation]))


def test_seq_len_beyond_the_models(tmp_path, no_process):
    with pytest.raises(SpecError, match=r"seq_len.*1024.*512"):
        prepare(make_spec(tmp_path, data__seq_len=1024))


def test_layers_that_the_model_has_not(tmp_path, no_process):
    """peft would train what it finds of the list; the names are those of the model's files."""
    message = r"target_modules: this model has no layer 'v_prj'; did you mean v_proj or"
    with pytest.raises(SpecError, match=message):
        make_plan(make_spec(tmp_path, model__target_modules=["q_proj", "v_prj"]), Store())
    message = r"modules_to_save: this model has no layer 'wte'; it has .*embed_tokens.*lm_head"
    with pytest.raises(SpecError, match=message):
        make_plan(make_spec(tmp_path, model__modules_to_save=["wte"]), Store())
    message = r"'q_proj' is a pattern for the whole name of a layer .* write a list, \[q_proj\]"
    with pytest.raises(SpecError, match=message):
        make_plan(make_spec(tmp_path, model__target_modules="q_proj"), Store())
    with pytest.raises(SpecError, match="is no regular expression"):
        make_plan(make_spec(tmp_path, model__target_modules="q_proj("), Store())
    right = {
        "model__target_modules": ["mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"],
        "model__modules_to_save": ["embed_tokens"],
    }
    make_plan(make_spec(tmp_path, **right), Store())
    make_plan(make_spec(tmp_path, model__target_modules=r".*\.[qk]_proj"), Store())


@pytest.mark.fault("tokenizer")
def test_no_chat_template(tmp_path, no_process, figure):
    make_model_folder(tmp_path / "model", tokenizer=make_tokenizer(chat_template=None))
    with pytest.raises(DataError, match="chat template"):
        prepare(make_spec(tmp_path))
    figure("without chat template: refused in plan")


def test_no_end_token(tmp_path, no_process):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    make_model_folder(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(DataError, match="eos"):
        prepare(make_spec(tmp_path))


def test_no_causal_language_model(tmp_path, no_process):
    from transformers import LlamaForSequenceClassification

    folder = tmp_path / "model"
    LlamaForSequenceClassification(tiny_config()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="causal"):
        prepare(make_spec(tmp_path))


def test_unwritable_store(tmp_path, no_process, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITTY_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StoreError, match="DITTY_HOME"):
        prepare(make_spec(tmp_path))


def test_no_gpu(tmp_path, no_process):
    from ditty.config.launchspec import LaunchSpec
    from ditty.processes.environment import resolve_device

    if resolve_device(LaunchSpec()) == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(SpecError, match="no NVIDIA GPU"):
        prepare(make_spec(tmp_path, launch__device="cuda"))


def test_unreachable_s3_and_no_credentials(tmp_path, no_process, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    spec = make_spec(tmp_path, upload={"url": "s3://bucket/x"})
    with pytest.raises(RemoteError, match="AWS_ACCESS_KEY_ID"):
        prepare(spec)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9") as error:
        prepare(spec)
    assert "canary-secret" not in str(error.value)


@pytest.mark.fault("changed spec")
def test_a_name_that_is_taken_by_another_spec(tmp_path, no_process, figure):
    spec = make_spec(tmp_path)
    run = RunDir.named("x", Store().home)
    write_json(make_dir(run.root) / "spec.json", spec.model_dump(mode="json"))
    prepare(spec)
    prepare(make_spec(tmp_path, train={"precision": "fp32", "save_steps": 7}))
    traded = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "precision": "fp32"}
    prepare(make_spec(tmp_path, train=traded))
    other = make_spec(tmp_path, train={"precision": "fp32", "learning_rate": 0.1})
    prepare(other)  # nothing was trained under the name
    run.new_attempt("train")
    with pytest.raises(RunMismatch, match=r"train\.learning_rate was 0\.0002, now 0\.1"):
        prepare(other)
    with pytest.raises(RunMismatch, match="global batch"):
        prepare(make_spec(tmp_path, train={"precision": "fp32", "micro_batch_size": 2}))
    figure("refused before anything starts; 2 harmless changes pass")


def ditty(*arguments: str, home: Path) -> "subprocess.CompletedProcess[str]":
    import os

    code = "from flows.commands.cli import main; main()"
    environment = {**os.environ, "DITTY_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_prefect_server_that_goes_away_is_no_traceback(monkeypatch, capsys):
    import httpx

    from flows.commands import cli

    def gone() -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(cli, "app", gone)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "run the same command again" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_prefect_or_torch(tmp_path, home, monkeypatch):
    from typer.testing import CliRunner

    from flows.commands import cli

    def refuse(*arguments: Any, **_: Any) -> None:
        pytest.fail(f"started {arguments}")

    monkeypatch.setattr(cli, "_call", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    RunDir.named("half", home).new_attempt("train")
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps(make_spec(tmp_path).model_dump(mode="json")))
    paged = ["--set", "train.optimizer=paged_lion"]
    for command, message in (
        (
            ["export", "nope"],
            f"there is no run nope in {home} (DITTY_HOME); runs there: half. Start one with "
            "`ditty run SPEC`, or set DITTY_HOME to where it ran",
        ),
        (
            ["chat", "half"],
            "run half has no result yet: its training has not finished (`ditty status half`). Run "
            "its spec again: it goes on where it was",
        ),
        *(
            (
                [name, str(path), *paged],
                "train.optimizer: paged_lion needs a GPU, and this run is on cpu: use lion",
            )
            for name in ("run", "evaluate", "refresh")
        ),
    ):
        assert str(CliRunner().invoke(cli.app, command).exception) == message


def test_the_command_prints_errors_without_a_traceback(tmp_path):
    spec = make_spec(tmp_path)
    import yaml

    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    home = tmp_path / "home"
    wrong = ditty("plan", str(path), "--set", "train.learning_rat=1", home=home)
    assert wrong.returncode == 1 and "did you mean train.learning_rate?" in wrong.stderr
    assert "Traceback" not in wrong.stderr + wrong.stdout
    good = ditty("plan", str(path), "--json", home=home)
    assert good.returncode == 0, good.stderr
    assert [s["stage"] for s in json.loads(good.stdout)["stages"]][-1] == "train"
    shown = ditty("plan", str(path), home=home)
    assert "will run" in shown.stdout
    assert "no runs" in ditty("status", home=home).stdout
    missing = ditty("status", "nobody", home=home)
    assert missing.returncode == 1 and "there is no run nobody" in missing.stderr
