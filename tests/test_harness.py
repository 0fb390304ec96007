"""Tasks of lm-evaluation-harness; the oracle is the harness on the merged model, by its path."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ditty.config.choices import Precision
from ditty.config.spec import EvaluateSpec, ModelSpec, RunSpec, TrainSpec
from ditty.conversion.export import merge
from ditty.distributed.load import load_trained
from ditty.errors import GateFailed, RunError, SpecError
from ditty.planning import preflight
from ditty.stages import evaltasks, stageline
from ditty.stages.evaltasks import identify
from flows.evaluate import evaluate
from flows.events import Event, EventState, listen
from flows.finetune import finetune
from tests.served import tiny_spec
from tests.test_merge import trained
from tests.test_specs import MINIMAL
from tests.tiny import make_model_folder

QUIZ = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}


def write_quiz(folder: Path, rows: int = 12) -> Path:
    questions = [
        {"question": f"What is {i}?", "choices": ["one", f"it is {i}", "a lot"], "answer": i % 3}
        for i in range(rows)
    ]
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "quiz.jsonl").write_text(text)
    (folder / "quiz.yaml").write_text(yaml.safe_dump(QUIZ))
    return folder / "quiz.yaml"


def test_an_adapter_scores_what_the_merged_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from ditty.evaluation.harness import run_task

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    quiz, base = write_quiz(tmp_path), make_model_folder(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", "lora")
    (tmp_path / "merged").mkdir()
    merge(base, adapter, tmp_path / "merged")
    found, expected = [], []
    for limit, result, whole in ((None, adapter, tmp_path / "merged"), (5, None, base)):
        module = load_trained(
            base, result, ModelSpec(base_model=""), TrainSpec(precision="fp32"), torch.device("cpu")
        )
        tokenizer, asked = AutoTokenizer.from_pretrained(base), EvaluateSpec(tasks_limit=limit)
        found.append(run_task(module, tokenizer, str(quiz), asked, Precision.FP32))
        monkeypatch.chdir(tmp_path)
        theirs = simple_evaluate(
            HFLM(pretrained=str(whole), device="cpu", dtype="float32"),
            tasks=["quiz.yaml"],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
        )
        expected.append({"quiz/acc": theirs["results"]["quiz"]["acc,none"]})
    assert found == expected and found[0] != found[1]
    with pytest.raises(RunError, match=r"missing.yaml \(evaluate.tasks\) cannot be run"):
        run_task(module, tokenizer, str(tmp_path / "missing.yaml"), asked, Precision.FP32)


@pytest.mark.slow
def test_a_run_is_stopped_at_the_gate_of_a_task(
    tmp_path: Path, home: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models answer in processes of their own, once; what is worse is not uploaded."""
    values = tiny_spec(tmp_path, "quiz", 4)
    values["data"]["eval_fraction"] = 0
    values["launch"]["environment"] = ["HF_DATASETS_CACHE"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = {"tasks": [str(write_quiz(tmp_path))], "require": {"quiz/acc": "> base + 1"}}
    spec = RunSpec.model_validate(values | {"evaluate": asked})
    with pytest.raises(GateFailed, match=r"quiz/acc is 0.\d{4}, required is > base \+ 1, which is"):
        finetune(spec)
    assert list((tmp_path / "target").rglob("adapter_model.safetensors")) == []
    events: list[Event] = []
    passes = {"evaluate": asked | {"require": {"quiz/acc": ">= 0"}}}
    with listen(events.append):
        finetune(RunSpec.model_validate(values | passes))
        found = evaluate(RunSpec.model_validate(values | passes))
    done = {event.stage: event.state for event in events}
    assert {state for stage, state in done.items() if "task quiz" in stage} == {EventState.CACHED}
    assert len(list((tmp_path / "target").rglob("final/*/adapter_model.safetensors"))) == 1
    assert found["base"].keys() == {"tasks"} and 0 <= found["trained"]["tasks"]["quiz/acc"] <= 1

    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(QUIZ | {"task": "other", "doc_to_text": "{{question}}:"}))
    more = asked | {"tasks": [str(other), *asked["tasks"]], "require": {"other/acc": ">= 0"}}
    events.clear()
    with listen(events.append):
        both = evaluate(RunSpec.model_validate(values | {"evaluate": more}))
    done = {event.stage.split(" of ")[0]: event.state for event in events if "task" in event.stage}
    assert done == {"task quiz": EventState.CACHED, "task other": EventState.DONE}
    scores = both["trained"]["tasks"]
    assert scores.keys() == {"quiz/acc", "other/acc"}
    assert scores["quiz/acc"] == found["trained"]["tasks"]["quiz/acc"]


def spec_with(tasks: list[str], **require: str) -> RunSpec:
    return RunSpec.model_validate(MINIMAL | {"evaluate": {"tasks": tasks, "require": require}})


def test_the_key_is_of_all_that_decides_the_scores(tmp_path: Path) -> None:
    quiz = write_quiz(tmp_path)

    def key(tasks: list[str] | None = None, trained: str | None = "t", **train: Any) -> str:
        spec = spec_with(tasks or [str(quiz)])
        spec = spec.model_copy(update={"train": TrainSpec(**train)})
        return stageline.harness_refs(spec, "m", trained)[-1].key

    assert key(["hellaswag", str(quiz)]) == key()  # another task beside it changes nothing
    seen = {key(), key(trained=None), key(["hellaswag"]), key(precision="fp16")}
    for name in ("notes.txt", "ops.py"):
        (tmp_path / name).write_text("of = 'no importance'")
    assert key() in seen
    for name, content in (("quiz.jsonl", "{}"), ("quiz.yaml", None)):
        text = content or yaml.safe_dump(QUIZ | {"doc_to_text": "{{question}}:"})
        (tmp_path / name).write_text(text)
        assert key() not in seen
        seen.add(key())
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("data", "changed"),
    [
        ("json, dataset_kwargs: {data_files: {test: 'rows/*.jsonl'}}", "rows/b.jsonl"),
        ("json, dataset_kwargs: {data_files: [rows/a.jsonl]}", "rows/a.jsonl"),
        ("json, dataset_kwargs: {data_dir: rows, data_files: 'a*'}", "rows/a.jsonl"),
        ("json, dataset_kwargs: {data_dir: rows}", "rows/b.jsonl"),
        ("rows", "rows/b.jsonl"),
        ("org/name, process_docs: !function sub/utils.f", "sub/utils.py"),
        ("org/name, process_docs: !function sub.utils.f", "sub/utils.py"),
        ("org/name, metric_list: [{metric: !function sub/utils.f}]", "sub/utils.py"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_file_that_decides_the_questions_is_known_through_each_include(
    tmp_path: Path, data: str, changed: str, depth: int
) -> None:
    for name in ("rows/a.jsonl", "rows/b.jsonl", "sub/utils.py", "sub/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    (tmp_path / "0.yaml").write_text(f"{{task: quiz, dataset_path: {data}}}")
    for number in range(depth):
        (tmp_path / f"{number + 1}.yaml").write_text(f"include: {number}.yaml")
    task = str(tmp_path / f"{depth}.yaml")
    before = identify(task)
    (tmp_path / "sub/other.py").write_text("nobody names it")
    assert identify(task) == before
    (tmp_path / changed).write_text("after")
    assert identify(task) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{task: x, include: none.yaml}", "cannot read .*none.yaml"),
        ("{task: x, include: ./x.yaml}", "includes .*x.yaml, which was read before"),
        (
            "{task: x, process_docs: !function none.f}",
            "neither .*none.py nor a file of an installed module",
        ),
        (
            "{task: x, dataset_path: json, dataset_kwargs: {data_files: '*.jsonl'}}",
            r"names data files \*.jsonl: none in",
        ),
    ],
)
def test_what_a_task_names_and_is_not_there_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        identify(str(tmp_path / "x.yaml"))


def test_a_task_that_cannot_be_run_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiz = write_quiz(tmp_path)
    preflight.check_tasks(spec_with([str(quiz)], **{"quiz/acc": "> 0"}))
    with pytest.raises(SpecError, match="names quizz/acc, and evaluate.tasks measures only quiz"):
        preflight.check_tasks(spec_with([str(quiz)], **{"quizz/acc": "> 0"}))
    with pytest.raises(SpecError, match="cannot read .*none.yaml"):
        preflight.check_tasks(spec_with([str(tmp_path / "none.yaml")]))
    (tmp_path / "utils.py").touch()
    quiz.write_text("dataset_path: !function utils.load\n")
    with pytest.raises(SpecError, match="has no key `task`"):
        preflight.check_tasks(spec_with([str(quiz)]))
    monkeypatch.setattr(evaltasks, "PACKAGE", "no-such-harness")
    with pytest.raises(
        SpecError, match="package lm_eval, .* pip install 'lm_eval>=0.4.13,<0.5' into /"
    ):
        preflight.check_tasks(spec_with(["hellaswag"]))
    monkeypatch.undo()
    preflight.check_tasks(spec_with(["hellaswag", "mmlu", "ai2_arc", "mmlu_*"]))
    message = r"lm-evaluation-harness [\d.]+ has no task 'hellaswagg'; did you mean hellaswag\?$"
    with pytest.raises(SpecError, match=message):
        preflight.check_tasks(spec_with(["hellaswagg"]))
    assert identify("hellaswag") == {"name": "hellaswag"}


@pytest.mark.slow
def test_each_name_that_the_harness_knows_is_taken() -> None:
    from lm_eval.tasks import TaskManager

    names = TaskManager().all_tasks
    assert len(names) > 1000
    evaltasks.check_names(names)  # one by one would take hours


def test_what_no_task_measures_is_refused_in_the_spec() -> None:
    with pytest.raises(
        ValueError, match="names quiz/acc, and evaluate.tasks is empty: add quiz to it"
    ):
        spec_with([], **{"quiz/acc": "> 0"})
    with pytest.raises(
        ValueError, match="'acc' is measured by nothing; expected eval_loss, eval_perplexity, or"
    ):
        spec_with(["quiz"], acc="> 0")
    spec = spec_with([])
    limited = spec.model_copy(update={"evaluate": EvaluateSpec(tasks_limit=5)})
    with pytest.raises(SpecError, match="tasks_limit goes with tasks, and there are none"):
        preflight.check_tasks(limited)
