"""The commands of the README and of the guides, run as they stand there, one after the other.

Their specs are those of the page, made small: a tiny model, rows that are made here, a few steps in
one process on the CPU. The S3 is moto's. What cannot be run so says what stands in for it; the
first two of the README are .ci/run's, and `ditty demo` is test_smollm2.py's.
"""

import io
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml
from typer.testing import CliRunner

from ditty.evaluation import talk
from flows.commands import chat_command
from flows.commands.cli import app
from tests.remotes import moto_url, s3_env  # noqa: F401
from tests.tiny import make_model_folder

ROOT = Path(__file__).parent.parent
GUIDES, README = (folder / "README.md" for folder in (ROOT / "deployments", ROOT))
STANDS_IN = {
    "serve": "test_serve.py",
    "bench 8b": "test_bench.py: bench tiny",
    "run specs/sharded-qlora.yaml": "test_distributed.py, test_strategies.py: two processes",
    "run specs/chat-lora.yaml --set launch.num_processes=2": "the same",
    "run specs/three-hosts.yaml": "test_machines.py: three machines, which are processes",
    "plan specs/three-hosts.yaml": "test_slurm.py: a queue that only looks like one",
}
SMALL_TRAIN = {"precision": "fp32", "max_steps": 3, "warmup_steps": 0, "save_steps": 3}
HOLD_OUT = 0.2  # of few rows


def lines(page: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(variables, arguments) of each `ditty` command of a page."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if "ditty" in words:
                at = words.index("ditty")
                yield dict(word.split("=", 1) for word in words[:at]), words[at + 1 :]


def small(spec: dict[str, Any], model: Path) -> dict[str, Any]:
    """The same spec, for a tiny model; rows of the hub come from a file."""
    data = spec["data"] | {"seq_len": 64, "eval_fraction": HOLD_OUT}
    if data.pop("subset", None):
        data["source"] = "texts.jsonl" if data.get("format") == "text" else "rows.jsonl"
    train = {**spec["train"], **SMALL_TRAIN, "micro_batch_size": 1}
    launch = {"device": "cpu", "threads": 1, "retries": 0}
    model_part = spec["model"] | {"base_model": str(model)}
    return spec | {"data": data, "model": model_part, "train": train, "launch": launch}


def write_rows(folder: Path) -> None:
    """Rows of each kind that the pages' specs read."""
    folder.mkdir(exist_ok=True)
    answers = [f"{i} and {i} make {2 * i}, as anyone can count" for i in range(30)]
    for name, row in {
        "pairs": lambda i: {"question": f"What do {i} and {i} make?", "answer": answers[i]},
        "questions": lambda i: {"question": f"What do {i} and {i} make?", "answer": answers[i]},
        "texts": lambda i: {"text": f"{answers[i]}; " * 3},
        "rows": lambda i: {
            "messages": [
                {"role": "user", "content": f"What do {i} and {i} make?"},
                {"role": "assistant", "content": answers[i]},
            ]
        },
    }.items():
        text = "".join(json.dumps(row(i)) + "\n" for i in range(30))
        (folder / f"{name}.jsonl").write_text(text)


@pytest.fixture
def place(
    tmp_path: Path,
    s3_env: pytest.MonkeyPatch,  # noqa: F811
    moto_url: str,  # noqa: F811
    prefect_api: str,
    forked_workers: None,
) -> Path:
    """Where the commands are run: in `deployments/`, and beside the README's `my-run.yaml`."""
    boto3.resource("s3", endpoint_url=moto_url).create_bucket(Bucket="my-bucket")
    model = make_model_folder(tmp_path / "model")
    write_rows(tmp_path)
    write_rows(tmp_path / "specs")
    for file in (ROOT / "deployments/specs").glob("*.yaml"):
        spec = small(yaml.safe_load(file.read_text()), model)
        (tmp_path / "specs" / file.name).write_text(yaml.safe_dump(spec))
    (shown,) = re.findall(r"```yaml\n(name: my-run .*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "my-run.yaml").write_text(yaml.safe_dump(small(yaml.safe_load(shown), model)))
    (code,) = re.findall(r"```python\n# ops.py\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "ops.py").write_text(code)
    s3_env.chdir(tmp_path)
    # Chat is a process that imports torch, which this one has: test_chat.py has the command.
    s3_env.setattr(chat_command, "subprocess", SimpleNamespace(run=talked))
    return tmp_path


def talked(command: list[str], *, check: bool) -> "subprocess.CompletedProcess[str]":
    with pytest.MonkeyPatch.context() as now:
        now.setattr("sys.stdin", io.StringIO("hello\n"))
        return subprocess.CompletedProcess(command, talk.main(command[-3:]))


def run(variables: dict[str, str], arguments: list[str], patch: pytest.MonkeyPatch) -> str:
    """What the command prints; it must not fail."""
    with patch.context() as now:
        for name, value in variables.items():
            now.setenv(name, value)
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


def stands_in(arguments: list[str]) -> str | None:
    """What is tested in the place of a command, or None: it is run."""
    text = " ".join(arguments)
    return next((why for start, why in STANDS_IN.items() if text.startswith(start)), None)


@pytest.mark.service
def test_the_guides(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {
        " ".join(arguments): run(variables, arguments, monkeypatch)
        for variables, arguments in lines(GUIDES)
        if not stands_in(arguments)
    }
    assert len(printed) >= 11
    assert "model.lora_r" in printed["compare r16 r64"]
    assert list(place.glob("home/store/upload/*")), "the target was S3"
    assert "in place" in printed["refresh specs/chat-lora.yaml --set promote.margin=0.01"]


@pytest.mark.service
def test_the_readme(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = {
        "HuggingFaceTB/SmolLM2-360M-Instruct": str(place / "model"),
        "~/.cache/ditty": str(place / "home"),
        "step_000000200": "step_000000003",
    }
    printed = {}
    for variables, arguments in lines(README):
        text = " ".join(arguments)
        for shown, ours in instead.items():
            text = text.replace(shown, ours)
        if not stands_in(arguments):
            printed[" ".join(arguments[:3])] = run(variables, text.split(), monkeypatch)
    assert len(printed) >= 14
    assert "3/3" in printed["status my-run -w"] and "base" in printed["evaluate my-run.yaml"]
    assert "held-out loss" in printed["logs my-run -f"]  # of what ran last: evaluate
    assert "train.learning_rate" in printed["compare my-run other-run"]
    assert (place / "my-model/model.safetensors").exists() and (place / "model-nf4").exists()
    assert any("checkpoint" in text for name, text in printed.items() if "lineage" in name)


def test_what_stands_in_for_a_command_is_one_of_a_page() -> None:
    shown = [" ".join(arguments) for page in (README, GUIDES) for _, arguments in lines(page)]
    for start, why in STANDS_IN.items():
        assert any(text.startswith(start) for text in shown), start
        for name in re.findall(r"test_\w+\.py", why):
            assert (ROOT / "tests" / name).exists()
