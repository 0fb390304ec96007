"""`ditty chat`: what base and result answer, against transformers and peft alone; through stdin."""

import io
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ditty.config.choices import Precision
from ditty.config.spec import RunSpec
from ditty.errors import RunError
from ditty.evaluation import talk
from ditty.models.model import load_base, prepare_model, save_trained, trainable
from ditty.runs.rundir import RunDir
from ditty.stages import stageline
from ditty.store.artifacts import Store
from ditty.store.files import make_dir, write_json
from flows.commands.cli import app
from tests.tiny import make_model_folder, make_tokenizer, tiny_config

MESSAGES = ["hello there", "and now?"]


def finished_run(tmp_path, store, adapter="lora", template=True) -> tuple[RunSpec, object]:
    """A run as a training leaves it; its trained weights are random, so that answers differ."""
    tokenizer = make_tokenizer() if template else make_tokenizer(None)
    folder = make_model_folder(
        tmp_path / "model", tiny_config(tie_word_embeddings=False), tokenizer
    )
    values = {
        "name": "mine",
        "data": {"source": "rows.jsonl"},
        "model": {"base_model": str(folder), "adapter": adapter},
        "train": {"precision": "fp32", "max_steps": 1},
        "launch": {"device": "cpu"},
    }
    spec = RunSpec.model_validate(values)
    base = load_base(folder, spec.model, Precision.FP32, torch.device("cpu"))
    module = prepare_model(base, spec.model, seed=0)
    torch.manual_seed(1)
    weights = {n: torch.randn_like(p) * 0.1 for n, p in trainable(module).items()}
    facts = {
        "stage": "train",
        "inputs": {"model": stageline.model_key(stageline.resolve_model(spec, store))},
    }
    with store.commit("train", "a" * 64, facts) as out:
        save_trained(module, weights, str(folder), out)
        tokenizer.save_pretrained(out)
    run = RunDir.named("mine", store.home)
    run.root.mkdir(parents=True)
    write_json(run.trained_file, {"train": "a" * 64, "spec": spec.model_dump(mode="json")})
    return spec, store.path("train", "a" * 64)


def plain_answers(model, template, adapter=None):
    """What transformers says to MESSAGES, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer, history, said = make_tokenizer(), [], []
    for message in MESSAGES:
        history.append({"role": "user", "content": message})
        text = "".join(turn["content"] for turn in history)
        if template:
            text = tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        history.append({"role": "assistant", "content": answer})
        said.append(answer.strip())
    return said


def say(monkeypatch, capsys, lines, temperature="0.0"):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = talk.main(["mine", "8", temperature])
    return code, capsys.readouterr()


@pytest.mark.parametrize(("adapter", "template"), [("lora", True), ("lora", False), ("none", True)])
def test_both_answer_as_transformers_does(tmp_path, home, monkeypatch, capsys, adapter, template):
    spec, trained = finished_run(tmp_path, Store(), adapter, template)
    code, said = say(monkeypatch, capsys, MESSAGES)
    base = plain_answers(spec.model.base_model, template)
    if adapter == "lora":
        mine = plain_answers(spec.model.base_model, template, trained)
    else:
        mine = plain_answers(trained, template)
    assert code == 0 and all({*base, *mine}) and base != mine
    answers = [
        f"{n}: {t}"
        for pair in zip(base, mine, strict=True)
        for n, t in zip(("base", "mine"), pair, strict=True)
    ]
    printed = said.out.partition(f"{talk.QUIT} ends\n")[2]
    assert printed == "".join(f"{answer}\n" for answer in answers)


def test_reset_and_quit(tmp_path, home, monkeypatch, capsys):
    finished_run(tmp_path, Store())
    lines = [MESSAGES[0], talk.RESET, "", MESSAGES[0], MESSAGES[1], talk.QUIT, "never"]
    _, said = say(monkeypatch, capsys, lines)
    answers = said.out.partition(f"{talk.QUIT} ends\n")[2].split("base: ")[1:]
    assert len(answers) == 3
    assert answers[0] == answers[1] != answers[2]


def test_mistakes(tmp_path, home, monkeypatch, capsys):
    store = Store()
    with pytest.raises(RunError, match="there is no run mine"):
        talk.load("mine", store)
    spec, trained = finished_run(tmp_path, store)
    make_model_folder(tmp_path / "model", tiny_config(hidden_size=32))
    code, said = say(monkeypatch, capsys, [])
    assert code == 1 and "is not the model that run mine was trained upon" in said.err
    shutil.rmtree(trained)
    assert "is not in" in say(monkeypatch, capsys, [])[1].err
    RunDir.named("mine", store.home).trained_file.unlink()
    assert (
        "run mine has no result yet: its training has not finished (`ditty status mine`)"
        in say(monkeypatch, capsys, [])[1].err
    )


def test_the_command_hands_over_to_a_process_with_torch(tmp_path, home, monkeypatch):
    """Its arguments are those of `talk.main`, and its exit code is that of the command."""
    calls = []

    def run(command, check):
        calls.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    make_dir(RunDir.named("mine", home).root)
    spec = {"name": "mine", "data": {"source": "a"}, "model": {"base_model": "b"}}
    write_json(RunDir.named("mine", home).trained_file, {"train": "key", "spec": spec})
    assert CliRunner().invoke(app, ["chat", "mine", "--max-tokens", "8"]).exit_code == 3
    assert calls == [[sys.executable, "-m", "ditty.evaluation.talk", "mine", "8", "0.0"]]


@pytest.mark.slow
def test_a_conversation_through_stdin_of_the_real_command(tmp_path, home):
    spec, trained = finished_run(tmp_path, Store())
    command = [sys.executable, "-c", "from flows.commands.cli import main; main()", "chat", "mine"]
    lines = "".join(f"{line}\n" for line in MESSAGES)
    done = subprocess.run(
        [*command, "--max-tokens", "8"], input=lines, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, ""), "other libraries are heard"
    for text in plain_answers(spec.model.base_model, True, trained):
        assert f"mine: {text}" in done.stdout
