"""Sharded QLoRA of a real model, killed, resumed, exported and used. Mark `slow` (some minutes).

python -m pytest -m slow -o addopts= -s tests/test_smollm2.py
"""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ditty.config.choices import Quantization
from ditty.conversion.convert import convert_gguf
from ditty.conversion.ggufexport import FILE
from ditty.data import read_rows
from ditty.models.fp8 import loading_config
from ditty.models.model import keep_4bit_weights
from ditty.pretrained.demo_model import smollm2
from ditty.quantization.quantize import quantize
from ditty.runs.rundir import RunDir
from tests.processes import ROOT, kill_when
from tests.test_harness import write_quiz
from tests.test_kills import adapter_hash

pytestmark = pytest.mark.slow

OVERRIDES = {
    "train.sharding": "fsdp2",
    "launch.num_processes": 2,
    "launch.device": "cpu",
    "train.max_steps": 4,
    "train.gradient_accumulation_steps": 1,
    "train.save_steps": 2,
    "model.lora_dropout": 0.1,
    "data.max_rows": 400,
    "data.eval_max_rows": 4,
}
COMMAND = "from flows.commands.cli import main; main()"


def start(
    home: Path, output: Path, overrides: dict[str, Any] = OVERRIDES
) -> "subprocess.Popen[bytes]":
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return ditty(home, output, "demo", *sets)


def ditty(home: Path, output: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    with open(output, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=ROOT,
            env={**os.environ, "DITTY_HOME": str(home)},
            stdout=file,
            stderr=file,
        )


def test_fsdp2_qlora_of_smollm2_on_two_processes(tmp_path, capsys):
    undisturbed, home, output = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "output"
    assert start(undisturbed, output).wait() == 0, output.read_text()
    run = RunDir.named("demo", home)
    kill_when(start(home, output), lambda: 2 in run.committed_steps())
    assert start(home, output).wait() == 0, output.read_text()
    state = json.loads((run.checkpoint(4) / "state.json").read_text())
    assert state["world_size"] == 2
    assert adapter_hash(home) == adapter_hash(undisturbed)

    records = [r for r in run.metrics() if r["kind"] == "eval"]
    ours, before = records[-1]["loss"], records[0]["loss"]
    theirs = loss_through_peft(home)
    with capsys.disabled():
        print(f"\nheld-out loss {before:.4f} before, {ours:.6f} after; through peft {theirs:.6f}")
    assert theirs == pytest.approx(ours, rel=1e-5) and ours < before


@torch.no_grad()
def loss_through_peft(home: Path) -> float:
    """Held-out loss of the quantized base and the saved adapter as transformers and peft load
    them, each document alone."""
    from peft import PeftModel

    (adapter,) = (home / "store/train").glob("*")
    (base,) = (home / "store/prequantize").glob("*")
    (data,) = (home / "store/pack").glob("*")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keep_4bit_weights(model)  # else a bf16 kernel where the CPU has one: 1e-4 apart
    model = PeftModel.from_pretrained(model, adapter).eval()
    total, count = 0.0, 0
    for row in read_rows(data / "eval.arrow"):
        start = 0
        for length in row["lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])
            labels = torch.tensor(row["labels"][start : start + length])[1:]
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            wanted = labels != -100
            losses = torch.nn.functional.cross_entropy(
                logits[wanted], labels[wanted], reduction="sum"
            )
            total, count = total + float(losses), count + int(wanted.sum())
            start += length
    return total / count


@torch.no_grad()
def test_logits_of_a_float8_base(tmp_path, capsys):
    """The bound: 0.05 nats of mean divergence, 1.5% of the loss, on 1,024 tokens of English."""
    gguf, plain, rounded = Path(smollm2(tmp_path)), tmp_path / "plain", tmp_path / "fp8"
    plain.mkdir()
    rounded.mkdir()
    convert_gguf(gguf, plain)
    quantize(plain, rounded, Quantization.FP8, "bfloat16")
    modules = (json, argparse, textwrap, shutil, inspect)
    text = "\n".join(
        inspect.getdoc(f) or "" for m in modules for f in vars(m).values() if callable(f)
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(plain)(text).input_ids[:1024]])
    options = {"dtype": torch.float32}
    models = (
        AutoModelForCausalLM.from_pretrained(plain, **options),
        AutoModelForCausalLM.from_pretrained(
            rounded, config=loading_config(rounded, False), **options
        ),
    )
    logits = [model(ids).logits[0, :-1] for model in models]
    theirs, ours = (x.log_softmax(-1) for x in logits)
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    before, after = (-float(x.gather(1, ids[0, 1:, None]).mean()) for x in (theirs, ours))
    apart = float((logits[1] - logits[0]).norm() / logits[0].norm())
    same = float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
    with capsys.disabled():
        print(
            f"\nfloat8 SmolLM2: divergence {divergence:.4f} nats, "
            f"loss {before:.4f} to {after:.4f}, "
            f"logits {apart:.3f} apart (relative norm), {same:.1%} the same first choice"
        )
    assert divergence < 0.05 and abs(after / before - 1) < 0.015


def test_the_demo_exported_and_used(tmp_path, monkeypatch, capsys):
    """`ditty demo`, shortened, and what its last lines and the README go on with."""
    home, output = tmp_path / "home", tmp_path / "output"
    small = {"train.max_steps": 8, "launch.device": "cpu", "launch.threads": 1}
    assert start(home, output, small | {"data.max_rows": 400, "data.eval_max_rows": 4}).wait() == 0
    for to, dtype in (("merged", ()), ("gguf", ()), ("gguf", ("--dtype", "q8_0"))):
        out = str(tmp_path / "-".join([to, *dtype[1:]]))
        command = ("export", "demo", "--to", to, "--out", out, *dtype)
        assert ditty(home, output, *command).wait() == 0, output.read_text()
    (base,) = (home / "store/fetch").glob("*")
    texts = said(base, tmp_path)
    with capsys.disabled():
        print(f"\nSmolLM2, merged: {texts['merged']!r}")
    assert texts["gguf"] == texts["merged"] != texts["base"]
    small, large = ((tmp_path / n / FILE).stat().st_size for n in ("gguf-q8_0", "gguf"))
    assert small < 0.55 * large

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(write_quiz(tmp_path).parent)
    known = TaskManager(include_defaults=False)
    wrapped = HFLM(pretrained=str(tmp_path / "merged"), device="cpu")
    scores = simple_evaluate(wrapped, tasks=["quiz.yaml"], task_manager=known)["results"]["quiz"]
    with capsys.disabled():
        print(f"the harness: {scores['acc,none']:.2f} of 12 questions")
    assert 0 <= scores["acc,none"] <= 1


@torch.no_grad()
def said(base: Path, exports: Path) -> dict[str, str]:
    """What the base model and its exports write, greedily, as transformers alone loads them."""
    question = [
        {"role": "user", "content": "Write the docstring of `def add(a, b): return a + b`."}
    ]
    texts = {}
    for name, folder in {"base": base, **{n: exports / n for n in ("merged", "gguf")}}.items():
        file = {"gguf_file": FILE} if name == "gguf" else {}
        unpacked = {"quantization_config": GgufConfig(**file, dequantize=True)} if file else {}
        model = AutoModelForCausalLM.from_pretrained(folder, **file, **unpacked, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, do_sample=False, max_new_tokens=24)
        texts[name] = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    return texts
